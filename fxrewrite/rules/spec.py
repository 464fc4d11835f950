"""What a pattern is made of, and what a match holds: steps, branches, siblings, calls, values."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import attrs
from torch import nn

from ..module_utils.subclassing import Family
from .values import Alike

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
        names = list(dict.fromkeys(filter(None, names)))
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
