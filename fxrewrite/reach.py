"""Account for the modules that a rule looks for and no graph calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .report import Finding
from .ruleset import Rule
from .sites import describe
from .soundness import has_hooks
from .view import GraphView


def out_of_reach(view: GraphView, rules: Sequence[Rule[Any]]) -> list[Finding]:
    """A finding for each module of an anchor's type that no node of the graph calls."""
    called: set[int] = set()
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
