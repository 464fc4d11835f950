"""What a match holds and a rule may return beside modules: values of the graph and calls."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias, TypeVar

import attrs
import torch
from torch import fx

T_co = TypeVar("T_co", covariant=True)


Alike: TypeAlias = Callable[[Any], Mapping[str, Any]]
"""From a module to what it must have in common with its siblings, by the names of reasons."""


class Siblings(tuple[T_co, ...]):
    """The modules of a group that read one value, two or more, in the order of their calls.

    >>> from torch import nn
    >>> q, k = nn.Linear(2, 3), nn.Linear(2, 1)
    >>> [linear.out_features for linear in Siblings((q, k))]
    [3, 1]
    """

    __slots__ = ()


@attrs.frozen(eq=False)
class Value:
    """A value of the graph: what a chain reads or makes, or another argument of a step.

    Shape, rank and dtype are known where the rewrite was given example inputs, or the graph has
    recorded them; otherwise they are None. Where data decides a size, the shape is None and the
    rank is known all the same.
    """

    name: str
    shape: tuple[int, ...] | None = None
    dtype: torch.dtype | None = None
    rank: int | None = None
    node: fx.Node | None = attrs.field(default=None, repr=False)


class Call:
    """A function and its arguments: seen, as a captured step, or to be made, as an action.

    Captured by a `call(...)` step, `function` is what the graph calls (a module, a function, or
    a method's name) and `kwargs` holds its arguments by name, without the chain's own value,
    which came in by the argument `takes`. A parameter of the model stands there as its tensor,
    another value of the graph as a `Value`. Where the step joins branches, `takes` names the
    arguments by which they came in, in the order of the branches.

    Returned by a rule, the chain becomes what `function(x, *args, **kwargs)` does to the chain's
    input `x`. The function is traced, so each torch function that it calls becomes a node, and
    each tensor among the arguments becomes an attribute of the rewritten model. A captured call
    that is returned is made again, reading the chain's input.

    >>> from torch.nn import functional as F
    >>> Call(F.leaky_relu, negative_slope=0.1).kwargs
    {'negative_slope': 0.1}
    """

    __slots__ = ("args", "function", "kwargs", "node", "takes")

    def __init__(self, function: Any, /, *args: Any, **kwargs: Any) -> None:
        """Of a function with the arguments that follow the chain's value."""
        self.function = function
        self.args = args
        self.kwargs: Mapping[str, Any] = kwargs
        self.takes: str | tuple[str, ...] | None = None
        self.node: fx.Node | None = None

    @classmethod
    def captured(
        cls,
        function: Any,
        kwargs: dict[str, Any],
        takes: str | tuple[str, ...],
        node: fx.Node | None = None,
    ) -> Call:
        """What the engine puts into a match, and a test may too: `takes` is the chain's way in."""
        call = cls(function)
        # It stands for a call that is there, so it can't be given other arguments.
        call.kwargs = types.MappingProxyType(kwargs)
        call.takes, call.node = takes, node
        return call

    def __repr__(self) -> str:
        """The call as it would be written."""
        given = [*map(repr, self.args), *(f"{k}={v!r}" for k, v in self.kwargs.items())]
        return (
            f"Call({', '.join([getattr(self.function, '__name__', repr(self.function)), *given])})"
        )
