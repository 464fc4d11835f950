"""What there is to compare of two models: all their state, and all that a call of them does."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import attrs
import torch
from torch import nn
from torch.utils import _pytree as pytree

from fxrewrite.module_utils.state import Snapshot
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
        self._model = model
        self._objects = self._look()
        self._graph = str(getattr(model, "graph", ""))
        tensors = [each for each in self._objects if isinstance(each[1], torch.Tensor)]
        self._tensors = [
            (name, t, t.detach().clone(), _version(t), t.requires_grad) for name, t in tensors
        ]

    def _look(self) -> list[tuple[str, Any]]:
        found: list[tuple[str, Any]] = []
        for name, module in self._model.named_modules(remove_duplicate=False):
            found += [(name, module), (f"{name} type", type(module))]
            for key, value in vars(module).items():
                found.append((f"{name} {key}", value))
                if isinstance(value, dict):
                    found += [(f"{name} {key} {inner}", each) for inner, each in value.items()]
        return found

    def change(self, *, versions: bool = True) -> str | None:
        """What is not as it was, by name, or None.

        Args:
            versions: whether a tensor that was written to and put back counts as changed.
        """
        now = self._look()
        if [name for name, _ in now] != [name for name, _ in self._objects]:
            names = {name for name, _ in now} ^ {name for name, _ in self._objects}
            return min(names, default="the order of its attributes")
        for (name, each), (_, before) in zip(now, self._objects, strict=True):
            if each is not before:
                return name.strip()
        if str(getattr(self._model, "graph", "")) != self._graph:
            return "its graph"
        for name, tensor, before, version, requires_grad in self._tensors:
            same_version = _version(tensor) == version or not versions
            same_kind = tensor.requires_grad == requires_grad and tensor.dtype == before.dtype
            if not (same_version and same_kind and torch.equal(bits(tensor), bits(before))):
                return f"{name}, a tensor"
        return None

    def assert_unchanged(self, *, versions: bool = True) -> None:
        """Raise AssertionError, naming what changed, unless all is as it was."""
        change = self.change(versions=versions)
        assert change is None, f"changed: {change}"


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """What a tensor holds as bytes, so that NaN equals itself, and 0.0 is not -0.0."""
    if tensor.is_meta:
        return torch.empty(0)
    plain = tensor.detach().resolve_conj().resolve_neg()
    return plain.contiguous().flatten().view(torch.uint8)


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


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
