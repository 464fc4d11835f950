"""All ways that a forward can go, whatever its input is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import fx, nn

from ..errors import TraceError
from .leaves import LeafModules
from .tracer import attempt

_MOST = 64


def ways(
    module: nn.Module, leaf_modules: LeafModules = ()
) -> Iterator[tuple[fx.Graph, dict[str, Any]]]:
    """A graph for each way that a module's forward can go, with the constants that are in it.

    A forward that asks whether a value is true, such as `x.shape[-1] % 2`, goes on with either
    answer. One that asks in which mode the module is goes on as it is. What it calls on its input
    it calls on a tensor; whether that is one it may not ask. Each way is traced once: whether it is
    the same each time shows where they are gone through again.

    >>> class Padded(nn.Conv2d):
    ...     def forward(self, x):
    ...         if x.shape[-1] % 2:
    ...             x = nn.functional.pad(x, (0, 1))
    ...         return super().forward(x)
    >>> ["pad" in str(graph) for graph, _ in ways(Padded(3, 3, 1))]
    [True, False]

    Args:
        module: the module, which stays as it is.
        leaf_modules: modules that become one node each, by type (subclasses included) or by
            qualified name.

    Raises:
        TraceError: not all ways can be had; the message says why, and at which line.
    """
    answers: list[bool] = []
    for _ in range(_MOST):
        found = attempt(module, leaf_modules, guess=answers)
        own = next((each for each in found.stops if not each.name), None)
        taken = next((each for each in found.assumptions if not each.is_mode), None)
        if own is not None or taken is not None:
            raise TraceError(str(own or taken)) from (own.error if own is not None else None)
        found = found.unchecked()
        assert found.graph is not None
        yield found.graph, found.constants
        while answers and not answers[-1]:
            answers.pop()
        if not answers:
            return
        answers[-1] = False
    raise TraceError(f"it can go more than {_MOST} ways")
