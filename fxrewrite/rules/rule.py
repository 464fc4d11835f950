"""What a rule is: a pattern, its guards, and the function that builds the replacement."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import attrs

from .actions import Action
from .spec import Pattern
from .values import Guard

M = TypeVar("M")


@attrs.frozen(eq=False)
class Rule(Generic[M]):
    """A pattern, guards, and a pure function from a match to an action; made by `rule`.

    Calling it calls that function, so a rule is tested without any graph.
    """

    name: str
    pattern: Pattern = attrs.field(repr=str)
    build: Callable[[M], Action] = attrs.field(repr=False)
    guards: tuple[Guard, ...] = attrs.field(default=(), repr=False)
    any_mode: bool = False
    quiet: bool = attrs.field(default=False, repr=False)
    last: bool = attrs.field(default=False, repr=False)
    doc: str = ""
    source: str = ""

    def __call__(self, match: M) -> Action:
        """The action for a match."""
        return self.build(match)
