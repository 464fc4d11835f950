"""What a rule is: a pattern, its guards, and the function that builds the replacement."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Generic, TypeVar

import attrs

from ..errors import PatternError
from .actions import Action
from .guards import Guard
from .spec import Pattern

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


def _as_tuple(rules: Any) -> Any:
    return tuple(rules) if isinstance(rules, Iterable) else rules


@attrs.frozen(eq=False)
class RuleSet:
    """An ordered, named group of rules; at each anchor the earlier ones are tried first.

    >>> RuleSet("nothing", [], doc="No rules at all.").rules
    ()
    """

    name: str
    rules: tuple[Rule[Any], ...] = attrs.field(converter=_as_tuple)
    doc: str = attrs.field(default="", kw_only=True)

    @rules.validator
    def _check(self, _: Any, rules: Any) -> None:
        if not isinstance(rules, tuple):
            raise PatternError(f"rule set {self.name!r}: expected a list of rules, found {rules!r}")
        for each in rules:
            if not isinstance(each, Rule):
                raise PatternError(f"rule set {self.name!r}: expected rules, found {each!r}")
        names = [each.name for each in rules]
        if len(set(names)) < len(names):
            raise PatternError(f"rule set {self.name!r}: two of its rules share a name: {names}")
