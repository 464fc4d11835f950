"""What a rewrite has to know of its rules beforehand: the types that they want, and their names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import attrs
from torch import nn

from ..errors import PatternError
from ..rules.registry import RuleSet
from ..rules.rule import Rule


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
