"""Account for what a rule looks for and the engine never sees."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from .lifting import Lifting
from .report import Finding
from .ruleset import Rule
from .sites import describe
from .soundness import has_hooks
from .view import GraphView


def out_of_reach(
    view: GraphView, rules: Sequence[Rule[Any]], owners: Iterable[str] = ()
) -> list[Finding]:
    """A finding for each module of an anchor's type that no node of the graph calls.

    `owners` are modules that are accounted for, since functional calls are given their tensors.
    """
    called = {id(view.modules[name]) for name in owners if name}
    inside: dict[int, str] = {}
    for node in view.graph.nodes:
        module = view.module(node)
        if module is not None:
            called.add(id(module))
            if module._modules:
                hook = has_hooks(module)
                because = f", since it carries {hook}" if hook else ""
                whole = f"{describe(node, view)}, which is kept whole{because}"
                inside.update((id(each), whole) for each in module.modules())
    findings = []
    for name, module in view.modules.items():
        if id(module) not in called:
            called.add(id(module))
            for rule in rules:
                if isinstance(module, rule.pattern.steps[rule.pattern.anchor].modules):
                    reason = "no call of it is in the traced graph"
                    if id(module) in inside:
                        reason = f"it is inside {inside[id(module)]}"
                    if not name:
                        reason = "it is the model itself, which is traced through; wrap it"
                    anchor = name or type(module).__name__
                    findings.append(Finding(anchor, "missed", rule.name, cause=reason))
                    break
    return findings


def not_lifted(lifting: Lifting, rules: Sequence[Rule[Any]]) -> list[Finding]:
    """A finding for each functional call that is of an anchor's kind, but can't be read as it."""
    findings = []
    for each in lifting.declined:
        for rule in rules:
            wanted = rule.pattern.steps[rule.pattern.anchor].modules
            if any(issubclass(kind, wanted) for kind in each.kinds):
                findings.append(Finding(each.node.name, "missed", rule.name, cause=each.reason))
                break
    return findings
