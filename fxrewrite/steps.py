"""What a pattern is made of, and what a match holds: steps, branches, siblings, calls, values."""

from __future__ import annotations

import operator
import types
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias, TypeVar

import attrs
import torch
from torch import fx, nn

from .family import Family

T_co = TypeVar("T_co", covariant=True)

Alike: TypeAlias = Callable[[Any], Mapping[str, Any]]
"""From a module to what it must have in common with its siblings, by the names of reasons."""


class Siblings(tuple[T_co, ...]):
    """The modules of a group that read one value, two or more, in the order of their calls.

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


# Of a step that may be many things, as many as make clear what they have in common.
_NAMES_SHOWN = 8


@attrs.frozen
class Step:
    """One step of a chain: the module types, functions and methods that a node may call.

    With `siblings` it is several calls that read one value. Their outputs can be parts of one
    value, one after the other along the dimension `dim`; `keeps_sizes` says that all other sizes
    are those of what is read, and `alike` what the modules must have in common.
    """

    name: str
    modules: tuple[type[nn.Module], ...] = ()
    functions: tuple[Callable[..., Any], ...] = ()
    methods: tuple[str, ...] = ()
    optional: bool = False
    repeats: bool = False
    captures_call: bool = False
    chain: str | tuple[str, ...] | None = None
    side_inputs: bool = True
    siblings: bool = False
    dim: int = 0
    keeps_sizes: bool = False
    alike: Alike | None = None

    def __str__(self) -> str:
        """The alternatives as a reader would list them: `Conv1d, Conv2d or Conv3d`.

        A function in place, an operator and a method are what the function is called.
        """
        names = [str(t) if issubclass(t, Family) else t.__name__ for t in self.modules]
        names += [f"{_plain(f)}()" for f in self.functions]
        methods = [m.removesuffix("_") for m in self.methods]
        names += [f".{m}()" for m in methods if f"{m}()" not in names]
        names = list(dict.fromkeys(names))
        if len(names) > _NAMES_SHOWN:
            names[_NAMES_SHOWN - 1 :] = ["the like"]
        return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"


def _plain(function: Callable[..., Any]) -> str:
    """A function's name without what tells its overloads and its form in place apart."""
    name = str(getattr(function, "__name__", function)).partition(".")[0]
    if getattr(operator, f"i{name[1:]}", None) is function:
        return name[1:]
    return name.removesuffix("_")


@attrs.frozen
class Branch:
    """A chain that ends in a join: a pattern of its own, or, where optional, nothing."""

    name: str
    pattern: Pattern
    optional: bool = False


@attrs.frozen
class Pattern:
    """A declared chain: its steps in data order, and the one that is looked for first.

    `values` names fields that capture a value, each with the index of the step that follows it.
    Where there are `branches`, the first step joins them.
    """

    cls: type[Any]
    steps: tuple[Step, ...]
    anchor: int
    values: tuple[tuple[str, int], ...] = ()
    branches: tuple[Branch, ...] = ()

    @property
    def name(self) -> str:
        """The name of the class that declares it."""
        return self.cls.__name__

    @property
    def anchor_step(self) -> Step:
        """The step that is looked for first."""
        return self.steps[self.anchor]

    @property
    def is_group(self) -> bool:
        """Whether it is a group of siblings, and no chain."""
        return self.steps[0].siblings

    @property
    def module_types(self) -> tuple[type[nn.Module], ...]:
        """All module types that a step, of a branch too, may call."""
        inner = (kind for each in self.branches for kind in each.pattern.module_types)
        return (*inner, *(kind for step in self.steps for kind in step.modules))

    def __str__(self) -> str:
        """The chain in one line; `?` may be absent, `*` any number of times, `|` parts branches."""
        if self.is_group:
            return f"({self.steps[0].name} | ...)"
        marks = ("*" if s.repeats else "?" if s.optional else "" for s in self.steps)
        parts = [f"{s.name}{mark}" for s, mark in zip(self.steps, marks, strict=True)]
        if self.branches:
            inner = [f"{b.name}: {b.pattern}{' ?' if b.optional else ''}" for b in self.branches]
            parts.insert(0, f"({' | '.join(inner)})")
        return " -> ".join(parts)
