"""Lift, drive and lower: rules applied to the graphs of a model, each with what it is for."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import Any

import attrs
from torch import nn

from ..dialects.lifting import Lifting
from ..dialects.lowering import lower
from ..engine.driver import Driver
from ..engine.report import OUTCOMES, Finding
from ..engine.target import Target
from ..explain.coverage import Coverage, not_lifted
from ..explain.near_misses import NearMiss, near_misses
from ..explain.report import Report
from ..explain.state_dict_map import StateDictMap
from ..ir.graph_view import GraphView
from ..rules.registry import RuleSet
from ..rules.rule import Rule
from ..tracing.stops import Stop
from .first_names import restore_names, with_names
from .rule_lists import rules_of


@attrs.frozen
class Applied:
    """What rules did to graphs, from which a report is made once there is a result.

    `sites` are in the order in which they were rewritten, each with its rule; `became` has what
    stands where a module or a call stood.
    """

    rule_sets: Sequence[RuleSet]
    sites: tuple[tuple[Rule[Any], Finding], ...]
    findings: tuple[Finding, ...]
    near_misses: Mapping[str, tuple[NearMiss, ...]]
    coverage: Coverage
    nodes: frozenset[str]
    became: Mapping[str, str]

    def report(self, model: Any, made: Any, into: str) -> Report:
        """The report of the rewrite of a model into what was made of the graphs."""
        names: dict[str, dict[str, None]] = {}
        for each in self.rule_sets:
            names.setdefault(each.name, {}).update(dict.fromkeys(rule.name for rule in each.rules))
        return Report(
            findings=self.findings,
            rule_sets={name: tuple(rules) for name, rules in names.items()},
            modules=self.coverage.names,
            calls=self.coverage.calls,
            nodes=self.nodes,
            near_misses=self.near_misses,
            unreached=self.coverage.unreached,
            into=into,
            stops=self.coverage.stops,
            parameter_names=StateDictMap(model, made, self.became),
        )


def apply(
    targets: Mapping[GraphView, Target],
    rule_sets: Sequence[RuleSet],
    modules: Mapping[str, nn.Module],
    stops: Sequence[Stop] = (),
    limit: int | None = None,
    *,
    ran: bool = False,
) -> Applied:
    """Edit the graphs of a model as the rules say.

    Args:
        targets: the graphs, each with what it is rewritten for.
        rule_sets: the rules; earlier ones are tried first.
        modules: all modules of the model, by qualified name.
        stops: what of the model could not be traced.
        limit: how many sites to rewrite at most, of all graphs together.
        ran: whether a run on example inputs showed what else the model calls.
    """
    rules = rules_of(rule_sets)
    nodes = frozenset(view.shown(node.name) for view in targets for node in view.graph.nodes)
    liftings = {view: Lifting(view, rules) for view in targets}
    coverage = Coverage(modules, liftings, stops, rules, ran)
    sites: list[tuple[Rule[Any], Finding]] = []
    graphs: list[Sequence[Finding]] = []
    near: dict[str, tuple[NearMiss, ...]] = {}
    lowered: dict[str, str] = {}
    for view, target in targets.items():
        driver = Driver(view, rules, target, None if limit is None else limit - len(sites))
        found = [*driver.run(), *not_lifted(liftings[view], rules)]
        for name, said in near_misses(view, rules, driver.told).items():
            near[view.shown(name)] = (*near.get(view.shown(name), ()), *said)
        lowered |= lower(view, liftings[view])
        restored = restore_names(view)
        coverage.note_replaced(view.placed)
        sites += [(rule, with_names(each, restored)) for rule, each in driver.applied]
        found = [with_names(each, restored) for each in found]
        graphs.append([each.renamed(view.shown) for each in found] if view.part else found)
    findings = [*_told_once(graphs, modules), *coverage.findings()]
    became = _became(findings, coverage, lowered)
    return Applied(rule_sets, tuple(sites), tuple(findings), near, coverage, nodes, became)


def _told_once(graphs: Sequence[Sequence[Finding]], modules: Container[str]) -> list[Finding]:
    """Of a call that several graphs have, what the first says that rewrote it, or that had it.

    What was traced, and is next to code that was not, is in several; so is what comes before a
    question that has two answers.
    """
    if len(graphs) == 1:  # and no reason need be put into words
        return [*graphs[0]]
    teller: dict[tuple[str, str], int] = {}
    for wanted in (("applied",), OUTCOMES):
        for i, found in enumerate(graphs):
            for each in found:
                if each.outcome in wanted:
                    teller.setdefault(_call(each, modules), i)
    return [
        each
        for i, found in enumerate(graphs)
        for each in found
        if teller[_call(each, modules)] == i
    ]


def _call(finding: Finding, modules: Container[str]) -> tuple[str, str]:
    """What a finding is of; functions that several graphs call may have the same name."""
    return finding.anchor, "" if finding.anchor in modules else finding.reason


def _became(
    findings: Sequence[Finding], coverage: Coverage, lowered: Mapping[str, str]
) -> dict[str, str]:
    """From the layer whose tensors a call reads to that call, and from there back to a layer."""
    became = {owner: calls[0] for owner, calls in coverage.calls.items()}
    became |= {name: each.became for each in findings if each.became for _, name in each.steps}
    ends = {*lowered.values()}
    return {name: to for name, to in became.items() if name not in ends} | dict(lowered)
