"""Account for what a rule looks for and the engine never sees."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import attrs
from torch import nn

from ..dialects.lifting import Lifting, any_is
from ..engine.report import Finding
from ..ir.describe import describe
from ..ir.graph_view import GraphView
from ..module_utils.hooks import has_hooks
from ..module_utils.names import parent_name
from ..rules.rule import Rule
from ..tracing.stops import Stop


class Coverage:
    """How far the graphs of a model reach its modules; made before rules change the graphs.

    `names` are all modules, each with the first of its names. `calls` has for each layer the calls
    of functions that are given its tensors. `unreached` says why no node calls a module, for each
    that is not traced through, and for which no such call answers. `stops` says what could not be
    traced, and how many anchors are inside of it.

    Args:
        modules: all modules of the model by qualified name.
        liftings: the graphs, with their functional calls.
        stops: what could not be traced.
        rules: the rules, whose anchors are to be accounted for.
        ran: whether a run on example inputs showed what else is called.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        liftings: Mapping[GraphView, Lifting],
        stops: Sequence[Stop],
        rules: Sequence[Rule[Any]],
        ran: bool = False,
    ) -> None:
        self._modules, self._ran = modules, ran
        self._rules = [rule for rule in rules if not rule.quiet]
        first: dict[int, str] = {}
        self.names = {name: first.setdefault(id(each), name) for name, each in modules.items()}
        self.calls: dict[str, tuple[str, ...]] = {}
        self._spelt: set[int] = set()
        self._gone: set[str] = set()
        for view, lifting in liftings.items():
            for owner, call, kinds in lifting.behind:
                if owner and owner in modules:
                    self._note(owner, view.shown(call), kinds)
        self.unreached = self._unreached(list(liftings), {each.name: each for each in stops})
        self.stops = tuple(attrs.evolve(each, anchors=self._inside(each, rules)) for each in stops)

    def note_replaced(self, placed: Mapping[str, Any]) -> None:
        """Note what rules put in the place of modules: what was in these may be part of it."""
        inside = (n for n in self.unreached if any(map(placed.__contains__, _above(n))))
        for name in inside:
            names = [each for each, first in self.names.items() if first == self.names[name]]
            above = [next(filter(placed.__contains__, _above(each)), None) for each in names]
            found = [each for each in above if each is not None]
            held = (each for one in found for each in placed[one].modules())
            if len(found) == len(names) and self._modules[name] not in held:
                self.unreached[name] = f"it is part of what {found[0]} does now"
                self._gone.add(name)

    def findings(self) -> list[Finding]:
        """A finding for each module of an anchor's type among those that no node calls."""
        findings = []
        for name, reason in self.unreached.items():
            if name in self._gone:
                continue
            rule = next(self._looking_for(self._modules[name]), None)
            if rule is not None:
                anchor = name or type(self._modules[name]).__name__
                findings.append(Finding(anchor, "missed", rule.name, cause=reason))
        return findings

    def _inside(self, stop: Stop, rules: Sequence[Rule[Any]]) -> int:
        """How many anchors are inside a module that could not be traced."""
        inside = self._modules[stop.name].modules()
        return sum(any(_is_anchor(each, rule) for rule in rules) for each in inside)

    def _note(self, owner: str, call: str, kinds: tuple[type[nn.Module], ...]) -> None:
        """Note that a call that spells these types is given a module's tensors."""
        known, module = self.names[owner], self._modules[owner]
        self.calls[known] = tuple(dict.fromkeys((*self.calls.get(known, ()), call)))
        looking = (rule.pattern.anchor_step.modules for rule in self._looking_for(module))
        if any(any_is(kinds, wanted) for wanted in looking):
            self._spelt.add(id(module))  # the call answers for it

    def _looking_for(self, module: nn.Module) -> Iterator[Rule[Any]]:
        return (rule for rule in self._rules if _is_anchor(module, rule))

    def _unreached(self, views: Sequence[GraphView], stopped: Mapping[str, Stop]) -> dict[str, str]:
        called = set(self._spelt)
        through: set[str] = set()
        inside: dict[int, str] = {}
        above: set[str] = set()
        for view in views:
            paths: set[str] = set()
            for node in view.graph.nodes:
                stack = node.meta.get("nn_module_stack", {})
                paths.update([path for path, _ in stack.values()])
                module = view.module(node)
                if module is not None:
                    called.add(id(module))
                    above.add(parent_name(str(node.target))[0])
                    if module._modules and str(node.target) not in stopped:
                        hook = has_hooks(module)
                        because = f", since it carries {hook}" if hook else ""
                        whole = f"{describe(node, view)}, which is kept whole{because}"
                        inside.update((id(each), whole) for each in module.modules())
            through.update(map(view.shown, paths))
        for name in above - {""}:
            through.update((name, *_above(name)))
        reasons = {}
        for name, module in self._modules.items():
            if id(module) in called:
                continue
            # An anchor is one call or none: who calls what is inside of it passes it by.
            is_through = name in through and not any(self._looking_for(module))
            if not is_through or id(module) in inside:
                called.add(id(module))
                reasons[name] = _reason(name, module, inside, stopped, self._ran)
        return reasons


def _is_anchor(module: nn.Module, rule: Rule[Any]) -> bool:
    """Whether a module is of the kind that a rule looks for first."""
    return isinstance(module, rule.pattern.anchor_step.modules)


def not_lifted(lifting: Lifting, rules: Sequence[Rule[Any]]) -> list[Finding]:
    """A finding for each functional call that is of an anchor's kind, but can't be read as it."""
    loud = [rule for rule in rules if not rule.quiet]
    findings = []
    for each in lifting.declined:
        anchors = ((rule, rule.pattern.anchor_step.modules) for rule in loud)
        rule = next((r for r, wanted in anchors if any_is(each.kinds, wanted)), None)
        if rule is not None:
            name, why = each.node.name, each.reason
            findings.append(Finding(name, "missed", rule.name, nodes=(name,), cause=why))
    return findings


def _reason(
    name: str, module: nn.Module, inside: Mapping[int, str], stops: Mapping[str, Stop], ran: bool
) -> str:
    if not name:
        return "it is the model itself, which is traced through; wrap it"
    if id(module) in inside:
        return f"it is inside {inside[id(module)]}"
    for above in (name, *_above(name), ""):
        if above in stops:
            run = "the run on the example_inputs did not call it either"
            if not ran:
                run = "a run on example_inputs would show what is called there"
            return (
                f"no call of it could be traced: tracing stopped in {stops[above].where}, "
                f"because {stops[above]}; {run}"
            )
    return "no call of it is in the traced graph"


def _above(name: str) -> Iterator[str]:
    """The qualified names of the modules around one, from the inside."""
    while name := parent_name(name)[0]:
        yield name
