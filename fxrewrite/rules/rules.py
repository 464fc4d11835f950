"""Rules and rule sets: a pattern, its guards, and the function that builds the replacement."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Generic, TypeAlias, TypeVar, overload

import attrs
from torch import nn

from ..errors import PatternError
from .actions import Action
from .declare import annotations_of, pattern_of, source_of
from .spec import Pattern

M = TypeVar("M")

Guard: TypeAlias = Callable[[Any], "str | None"]
"""A check on a match: None when the rule may go on, or the reason why it may not."""


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
    pure: bool = attrs.field(default=False, repr=False)
    quiet: bool = attrs.field(default=False, repr=False)
    last: bool = attrs.field(default=False, repr=False)
    doc: str = ""
    source: str = ""

    def __call__(self, match: M) -> Action:
        """The action for a match."""
        return self.build(match)


@overload
def rule(build: Callable[[M], Action], /) -> Rule[M]: ...
@overload
def rule(
    *,
    where: Iterable[Guard] = (),
    pattern: type[Any] | None = None,
    name: str | None = None,
    any_mode: bool = False,
    pure: bool = False,
    quiet: bool = False,
    last: bool = False,
) -> Callable[[Callable[[M], Action]], Rule[M]]: ...
def rule(
    build: Callable[[Any], Action] | None = None,
    /,
    *,
    where: Iterable[Guard] = (),
    pattern: type[Any] | None = None,
    name: str | None = None,
    any_mode: bool = False,
    pure: bool = False,
    quiet: bool = False,
    last: bool = False,
) -> Any:
    """Make a function from a match to an action a rule.

    >>> from torch import nn
    >>> import fxrewrite as fxr
    >>> Relu = fxr.chain(relu=nn.ReLU)
    >>> @fxr.rule(pattern=Relu)
    ... def relu_to_gelu(m):
    ...     return fxr.Replace(nn.GELU())
    >>> print(relu_to_gelu(Relu(relu=nn.ReLU())).module)
    GELU(approximate='none')

    Args:
        build: the function. It must not change what it is given, and runs without gradients.
        where: guards, asked in order; the first reason refuses the match.
        pattern: the pattern class; by default the annotation of the function's parameter.
        name: by default the function's name.
        any_mode: match modules in training mode too. By default the engine refuses those.
        pure: take the author's word that the rule and its guards change nothing they are given.
            By default the engine compares afterwards, which costs about as much as a fold.
        quiet: for a rule whose anchor is common and seldom meant, as each product is for one that
            looks for constants: that it missed its chain is no finding of the report.
        last: wait until no other rule applies, of whatever set; for a rule that would take from
            others what they look for.

    Raises:
        PatternError: no pattern is given, or what is given is not one.
    """
    caller = sys._getframe(1).f_locals
    guards = tuple(where) if isinstance(where, Iterable) else (where,)
    if not isinstance(where, Iterable) or not all(map(callable, guards)):
        raise PatternError(f"where= takes a list of guards, which are functions; found {where!r}")

    def declare(build: Callable[[Any], Action]) -> Rule[Any]:
        return Rule(
            name=name or build.__name__,
            pattern=pattern_of(pattern or _annotated_pattern(build, caller)),
            build=build,
            guards=guards,
            any_mode=any_mode,
            pure=pure,
            quiet=quiet,
            last=last,
            doc=(build.__doc__ or "").strip().partition("\n")[0],
            source=source_of(build),
        )

    return declare if build is None else declare(build)


def _annotated_pattern(build: Callable[[Any], Action], local_names: dict[str, Any]) -> type[Any]:
    hints = annotations_of(build, local_names)
    hints.pop("return", None)
    if len(hints) != 1:
        raise PatternError(
            f"{build.__qualname__}: annotate its one parameter with the pattern class, "
            "or give pattern=... to the decorator"
        )
    annotated: type[Any] = next(iter(hints.values()))
    return annotated


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


def rules_of(rule_sets: Iterable[RuleSet]) -> list[Rule[Any]]:
    """The rules of some rule sets in order, each once."""
    return list(dict.fromkeys(rule for rule_set in rule_sets for rule in rule_set.rules))


def leaf_types(rules: Iterable[Rule[Any]]) -> tuple[type[nn.Module], ...]:
    """The module types that rules name, whose modules are one node of a graph each."""
    return tuple(kind for rule in rules for kind in rule.pattern.module_types)


def wanted_types(rules: Sequence[Rule[Any]]) -> tuple[type[nn.Module], ...]:
    """The types of which a part of a model holds one, if rules have to do with it.

    That is any type, where a rule looks for a function first.
    """
    anchors = (rule.pattern.anchor_step for rule in rules)
    return leaf_types(rules) if all(step.modules for step in anchors) else (nn.Module,)


def apart(rule_sets: Sequence[RuleSet]) -> list[RuleSet]:
    """The rule sets with rules of one name told apart by the names of their sets."""
    uses = Counter(rule.name for rule in rules_of(rule_sets))
    renamed = {
        rule: attrs.evolve(rule, name=f"{rule_set.name}.{rule.name}")
        for rule_set in rule_sets
        for rule in rule_set.rules
        if uses[rule.name] > 1
    }
    names = Counter(rule.name for rule in renamed.values())
    for name, count in names.items():
        if count > 1:
            raise PatternError(f"{count} different rules are called {name}; give each its own name")
    return [
        attrs.evolve(rule_set, rules=[renamed.get(rule, rule) for rule in rule_set.rules])
        if any(rule in renamed for rule in rule_set.rules)
        else rule_set
        for rule_set in rule_sets
    ]
