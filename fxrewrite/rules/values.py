"""What a match holds, beside modules, and what a guard answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias, TypeVar

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

    Shape, rank and dtype come from example inputs or from the graph; where they are None, `unknown`
    says why, or what would decide them. Where data decides a size, the rank is known all the same.
    """

    name: str
    shape: tuple[int, ...] | None = None
    dtype: torch.dtype | None = None
    rank: int | None = None
    node: fx.Node | None = attrs.field(default=None, repr=False)
    unknown: str = attrs.field(default="example_inputs would decide it", repr=False)


Guard: TypeAlias = "Callable[[Any], str | Declined | None]"
"""A check on a match: None when the rule may go on, or the reason why it may not."""


@attrs.frozen
class Declined:
    """Why a rule is not applied: its chain is there and may not change, or is not there at all.

    A guard that returns a reason refuses the match. One that returns `Declined(reason, "missed")`
    says that the match is not what the rule is about; of a `quiet` rule that is no finding.

    >>> import torch
    >>> import fxrewrite as fxr
    >>> ToFloat = fxr.chain(to=fxr.call("to", side_inputs=False))
    >>> def to_float(m):
    ...     if torch.float32 not in m.to.kwargs.values():
    ...         return fxr.Declined("to another type", "missed")
    >>> print(to_float(ToFloat(to=fxr.Call("to", dtype=torch.float64))))
    to another type

    Args:
        cause: the reason, or what gives it as its `str()`.
        outcome: "refused" or "missed".
    """

    cause: Any
    outcome: Literal["refused", "missed"] = "refused"

    def __str__(self) -> str:
        """The reason."""
        return str(self.cause)
