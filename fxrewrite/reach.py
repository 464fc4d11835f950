"""Account for what a rule looks for and the engine never sees."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from .dialects.lifting import Lifting
from .modules import _parent_name
from .report import Finding
from .ruleset import Rule
from .sites import describe
from .soundness import has_hooks
from .tracing.explaining import Stop
from .view import GraphView


def is_anchor(module: nn.Module, rule: Rule[Any]) -> bool:
    """Whether a module is of the kind that a rule looks for first."""
    return isinstance(module, rule.pattern.anchor_step.modules)


def not_called(
    modules: Mapping[str, nn.Module],
    views: Sequence[GraphView],
    stops: Sequence[Stop] = (),
    owners: Iterable[str] = (),
) -> dict[str, str]:
    """Why no node of the graphs calls a module, for each that is not traced through either.

    Args:
        modules: all modules of the model by qualified name.
        views: the graphs of the model, or of its parts.
        stops: what could not be traced.
        owners: modules that are accounted for, since functional calls are given their tensors.
    """
    called = {id(modules[name]) for name in owners if name}
    through: set[str] = set()
    inside: dict[int, str] = {}
    stopped = {each.name: each for each in stops}
    for view in views:
        for node in view.graph.nodes:
            through.update(path for path, _ in node.meta.get("nn_module_stack", {}).values())
            module = view.module(node)
            if module is not None:
                called.add(id(module))
                through.update(_above(str(node.target)))
                if module._modules and str(node.target) not in stopped:
                    hook = has_hooks(module)
                    because = f", since it carries {hook}" if hook else ""
                    whole = f"{describe(node, view)}, which is kept whole{because}"
                    inside.update((id(each), whole) for each in module.modules())
    reasons = {}
    for name, module in modules.items():
        if id(module) not in called and (name not in through or id(module) in inside):
            called.add(id(module))
            reasons[name] = _reason(name, module, inside, stopped)
    return reasons


def out_of_reach(
    modules: Mapping[str, nn.Module], reasons: Mapping[str, str], rules: Sequence[Rule[Any]]
) -> list[Finding]:
    """A finding for each module of an anchor's type among those that no node calls."""
    findings = []
    for name, reason in reasons.items():
        loud = (rule for rule in rules if not rule.quiet)
        rule = next((rule for rule in loud if is_anchor(modules[name], rule)), None)
        if rule is not None:
            anchor = name or type(modules[name]).__name__
            findings.append(Finding(anchor, "missed", rule.name, cause=reason))
    return findings


def not_lifted(lifting: Lifting, rules: Sequence[Rule[Any]]) -> list[Finding]:
    """A finding for each functional call that is of an anchor's kind, but can't be read as it."""
    findings = []
    for each in lifting.declined:
        for rule in rules:
            if rule.quiet:
                continue
            wanted = rule.pattern.anchor_step.modules
            if any(issubclass(kind, wanted) for kind in each.kinds):
                findings.append(Finding(each.node.name, "missed", rule.name, cause=each.reason))
                break
    return findings


def _reason(
    name: str, module: nn.Module, inside: Mapping[int, str], stops: Mapping[str, Stop]
) -> str:
    if not name:
        return "it is the model itself, which is traced through; wrap it"
    if id(module) in inside:
        return f"it is inside {inside[id(module)]}"
    for above in (name, *_above(name), ""):
        if above in stops:
            return (
                f"no call of it could be traced: tracing stopped in {stops[above].where}, "
                f"because {stops[above]}"
            )
    return "no call of it is in the traced graph"


def _above(name: str) -> Iterator[str]:
    """The qualified names of the modules around one, from the inside."""
    while name := _parent_name(name)[0]:
        yield name
