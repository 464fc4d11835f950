"""What there is to compare of two models: all their state, and all that a call of them does."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import attrs
import torch
from torch import nn

from fxrewrite.module_utils.state import Snapshot
from fxrewrite.module_utils.torch_private import pytree
from fxrewrite.verification import compare


class Record:
    """All there is to a model: module tree, attributes, hooks, modes, tensors bit for bit.

    >>> model = nn.Sequential(nn.ReLU())
    >>> before = Record(model)
    >>> _ = model.eval()
    >>> print(before.change())
    training
    """

    def __init__(self, model: nn.Module) -> None:
        self._model, self._state = model, Snapshot({"": model})
        self._graph = str(getattr(model, "graph", ""))

    def change(self, *, versions: bool = True) -> str | None:
        """What is not as it was, by name, or None.

        Args:
            versions: whether a tensor that was written to and put back counts as changed.
        """
        graph = "its graph" if str(getattr(self._model, "graph", "")) != self._graph else None
        return self._state.difference(versions=versions) or graph

    def assert_unchanged(self, *, versions: bool = True) -> None:
        """Raise AssertionError, naming what changed, unless all is as it was."""
        change = self.change(versions=versions)
        assert change is None, f"changed: {change}"


@attrs.frozen
class Run:
    """What one call of a model returned, did to its arguments, and left in its state."""

    output: Any
    arguments: Any
    state: dict[str, torch.Tensor]


def run(model: nn.Module, args: tuple[Any, ...]) -> Run:
    """Call a model on copies of the arguments, always with the same random numbers.

    What the call does to the model is put back. A copy of the model would not do, since a copy of
    a GraphModule has lost its hooks.
    """
    args, before = copy.deepcopy(args), Snapshot([model])
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            output = model(*args)
        state = {name: t.detach().clone() for name, t in model.state_dict(keep_vars=True).items()}
        return Run(pytree.tree_map(_copied, output), args, state)
    finally:
        before.restore()


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


def difference(
    expected: Run, found: Run, tolerance: float, state: Iterable[str] = ()
) -> str | None:
    """How two calls differ, in words, or None where they are the same up to rounding.

    Args:
        expected: the call of the original.
        found: the other call.
        tolerance: the largest error of an element allowed, relative to its tensor's largest.
        state: names of parameters and buffers that both must have left alike.
    """
    before, after = ({name: run.state[name] for name in state} for run in (expected, found))
    return (
        compare.difference(expected.output, found.output, tolerance)
        or compare.difference(expected.arguments, found.arguments, tolerance, "argument")
        or compare.difference(before, after, tolerance, "state")
    )
