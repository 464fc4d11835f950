"""Apply rules to a graph view, from lifting to lowering, and account for all of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import attrs

from .destination import Destination
from .engine import Engine
from .lifting import Lifting
from .lowering import lower
from .reach import not_lifted, out_of_reach
from .renaming import renamed
from .replaying import Script
from .report import Finding, Report
from .ruleset import RuleSet
from .view import GraphView


@attrs.frozen
class Applied:
    """What rules did to a view, from which a report is made once there is a result."""

    rule_sets: Sequence[RuleSet]
    findings: tuple[Finding, ...]
    bystanders: Any
    nodes: frozenset[str]
    names: Mapping[str, str]
    became: Mapping[str, str]

    @property
    def is_change(self) -> bool:
        """Whether any rule was applied."""
        return any(finding.outcome == "applied" for finding in self.findings)

    def report(self, model: Any, made: Any, into: str) -> Report:
        """The report of the rewrite of a model into what was made of the view."""
        names: dict[str, dict[str, None]] = {}
        for each in self.rule_sets:
            names.setdefault(each.name, {}).update(dict.fromkeys(rule.name for rule in each.rules))
        of_sets = {name: tuple(rules) for name, rules in names.items()}
        parameters = renamed(model, made, self.became)
        return Report(
            self.findings, of_sets, self.names, self.nodes, self.bystanders, into, parameters
        )


def apply(
    view: GraphView, rule_sets: Sequence[RuleSet], destination: Destination, script: Script
) -> Applied:
    """Edit the view's graph as the rules say; what is asked and done is in the script."""
    rules = list(dict.fromkeys(rule for rule_set in rule_sets for rule in rule_set.rules))
    nodes = frozenset(node.name for node in view.graph.nodes)
    lifting = Lifting(view, rules)
    owners = lifting.owners
    not_called = out_of_reach(view, rules, owners)
    engine = Engine(view, rules, destination, script)
    findings = (*engine.run(), *not_lifted(lifting, rules), *not_called)
    bystanders = engine.bystanders()
    lowered = lower(view, lifting)
    became = {name: each.became for each in findings if each.became for _, name in each.steps}
    # From the layer whose tensors a call reads to that call, and from there back to a layer.
    ends = {*lowered.values()}
    became = {k: v for k, v in {**owners, **became}.items() if k not in ends} | lowered
    return Applied(rule_sets, findings, bystanders, nodes, {**view.aliases, **owners}, became)
