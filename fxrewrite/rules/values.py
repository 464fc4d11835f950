"""What a match holds and a rule may return beside modules: values of the graph and calls."""

from __future__ import annotations

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
