"""Rule sets: groups of rules by name, registered by a program or shipped by a package."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from importlib.metadata import entry_points
from typing import Any, TypeAlias

import attrs

from ..errors import PatternError, UnknownRuleSetError
from .rule import Rule


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


ENTRY_POINT_GROUP = "fxrewrite.rule_sets"

Rules: TypeAlias = "str | RuleSet | Rule[Any] | Iterable[str | RuleSet | Rule[Any]]"

_registered: dict[str, RuleSet] = {}


def register(rule_set: RuleSet) -> RuleSet:
    """Make a rule set known by its name, for `rewrite` and the command line.

    >>> import fxrewrite as fxr
    >>> nothing = fxr.register(fxr.RuleSet("example-nothing", []))
    >>> fxr.get_rule_set("example-nothing") is nothing
    True

    An installed package ships a rule set by an entry point in the group `fxrewrite.rule_sets`,
    whose object is the rule set; that is how the built-in ones are found.

    Raises:
        ValueError: another rule set is registered or installed under that name.
    """
    known = _registered.get(rule_set.name)
    if known is not None and known is not rule_set:
        raise ValueError(f"a rule set named {rule_set.name!r} is registered already")
    installed = _installed().get(rule_set.name)
    # The module that ships a set may register it as well.
    caller = sys._getframe(1).f_globals.get("__name__")
    if known is None and installed is not None and installed.module != caller:
        raise ValueError(f"a rule set named {rule_set.name!r} is installed already")
    return _registered.setdefault(rule_set.name, rule_set)


def get_rule_set(name: str) -> RuleSet:
    """The rule set of that name; raises UnknownRuleSetError, which lists the names there are."""
    if name in _registered:
        return _registered[name]
    installed = _installed()
    if name not in installed:
        raise UnknownRuleSetError(
            f"no rule set is named {name!r}; there are: {', '.join(rule_set_names())}"
        )
    try:
        loaded = installed[name].load()
    except Exception as error:
        raise UnknownRuleSetError(
            f"rule set {name!r} can't be loaded from {installed[name].value}: {error!r}"
        ) from error
    if not isinstance(loaded, RuleSet):
        raise UnknownRuleSetError(
            f"rule set {name!r}: {installed[name].value} is a {type(loaded).__name__}, no RuleSet"
        )
    return _registered.setdefault(name, loaded)


def rule_set_names() -> list[str]:
    """The names of all registered and installed rule sets, sorted."""
    return sorted({*_registered, *_installed()})


def resolve(rules: Rules) -> tuple[RuleSet, ...]:
    """What a caller may give as rules, as rule sets; a rule by itself is a set of its own name."""
    if isinstance(rules, str):
        return (get_rule_set(rules),)
    if isinstance(rules, RuleSet):
        return (rules,)
    if isinstance(rules, Rule):
        return (RuleSet(rules.name, [rules], doc=rules.doc),)
    if not isinstance(rules, Iterable):
        raise PatternError(f"expected a rule set, its name, a rule, or a list of those: {rules!r}")
    return tuple(rule_set for each in rules for rule_set in resolve(each))


def _installed() -> dict[str, Any]:
    return {found.name: found for found in entry_points(group=ENTRY_POINT_GROUP)}
