"""Apply rules to graph views, from lifting to lowering, and account for all of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import attrs

from ..dialects.lifting import Lifting
from ..dialects.lowering import lower
from ..engine.driver import Driver
from ..engine.report import Finding
from ..engine.target import Target
from ..explain.coverage import Reach, is_anchor, not_lifted
from ..explain.near_misses import NearMiss, near_misses
from ..explain.report import Report
from ..explain.state_dict_map import Renamed
from ..ir.graph_view import GraphView
from ..rules.rule import Rule, RuleSet
from ..tracing.stops import Stop


@attrs.frozen
class Applied:
    """What rules did to views, from which a report is made once there is a result."""

    rule_sets: Sequence[RuleSet]
    findings: tuple[Finding, ...]
    sites: tuple[tuple[Rule[Any], Finding], ...]
    near_misses: Mapping[str, tuple[NearMiss, ...]]
    reach: Reach
    nodes: frozenset[str]
    became: Mapping[str, str]
    stops: tuple[Stop, ...] = ()

    @property
    def is_change(self) -> bool:
        """Whether any rule was applied."""
        return any(finding.outcome == "applied" for finding in self.findings)

    def report(self, model: Any, made: Any, into: str) -> Report:
        """The report of the rewrite of a model into what was made of the views."""
        names: dict[str, dict[str, None]] = {}
        for each in self.rule_sets:
            names.setdefault(each.name, {}).update(dict.fromkeys(rule.name for rule in each.rules))
        of_sets = {name: tuple(rules) for name, rules in names.items()}
        return Report(
            self.findings,
            of_sets,
            self.reach.names,
            self.reach.calls,
            self.nodes,
            self.near_misses,
            self.reach.unreached,
            into,
            self.stops,
            Renamed(model, made, self.became),
        )


def apply(
    view: GraphView, rule_sets: Sequence[RuleSet], target: Target, limit: int | None = None
) -> Applied:
    """Edit the view's graph as the rules say, at so many sites at most."""
    return apply_to_parts(view.modules, {view: target}, rule_sets, limit=limit)


def apply_to_parts(
    modules: Mapping[str, Any],
    views: Mapping[GraphView, Target],
    rule_sets: Sequence[RuleSet],
    stops: Sequence[Stop] = (),
    limit: int | None = None,
) -> Applied:
    """Edit the graphs of a model's parts, each with its target, as the rules say.

    `modules` are all of the model by qualified name, and `stops` what of it could not be traced.
    `limit` is how many sites to rewrite at most, of all parts together.
    """
    rules = list(dict.fromkeys(rule for rule_set in rule_sets for rule in rule_set.rules))
    nodes = frozenset(view.shown(node.name) for view in views for node in view.graph.nodes)
    liftings = {view: Lifting(view, rules) for view in views}
    reach = Reach(modules, liftings, stops, rules)
    findings: list[Finding] = []
    sites: list[tuple[Rule[Any], Finding]] = []
    near: dict[str, tuple[NearMiss, ...]] = {}
    lowered: dict[str, str] = {}
    for view, target in views.items():
        driver = Driver(view, rules, target, None if limit is None else limit - len(sites))
        found = (*driver.run(), *not_lifted(liftings[view], rules))
        findings += [each.renamed(view.shown) for each in found] if view.part else found
        sites += driver.applied
        for name, said in near_misses(view, rules, driver.told).items():
            near[view.shown(name)] = (*near.get(view.shown(name), ()), *said)
        lowered |= lower(view, liftings[view])
    findings += reach.findings()
    became = {name: each.became for each in findings if each.became for _, name in each.steps}
    # From the layer whose tensors a call reads to that call, and from there back to a layer.
    ends = {*lowered.values()}
    first_calls = {owner: calls[0] for owner, calls in reach.calls.items()}
    became = {k: v for k, v in {**first_calls, **became}.items() if k not in ends} | lowered

    def with_anchors(stop: Stop) -> Stop:
        inside = modules[stop.name].modules()
        count = sum(any(is_anchor(each, rule) for rule in rules) for each in inside)
        return attrs.evolve(stop, anchors=count)

    return Applied(
        rule_sets,
        tuple(findings),
        tuple(sites),
        near,
        reach,
        nodes,
        became,
        tuple(map(with_anchors, stops)),
    )
