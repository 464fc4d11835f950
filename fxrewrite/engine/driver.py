"""The engine: a walk over the graph that matches, checks and commits, until nothing changes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import attrs
from torch import fx, nn

from ..engine import editing as edits
from ..ir.aliases import Effects, written_by
from ..ir.describe import name_of
from ..ir.fake_values import renew
from ..ir.graph_view import GraphView
from ..ir.inplace_activations import calm
from ..module_utils.parametrization import is_parametrized
from ..rules.actions import Action, Replace, Split
from ..rules.guards import Missed
from ..rules.rules import Rule
from .alias_checks import action_refusal
from .evaluation import decide_everywhere, failure, same_action
from .legality import refusal
from .match import Alone, Link, Miss, Site
from .matcher import Matcher, calls, reads_one_value
from .metadata_readers import rereading_refusal
from .report import Finding, Outcome
from .siblings import fit, group
from .target import Target

# How often rules may rewrite what rules made, before they are taken to feed each other forever.
MAX_GENERATIONS = 100
_CALLS = ("call_module", "call_function", "call_method")


@attrs.frozen(eq=False)
class _Rewritten:
    made: list[fx.Node]
    became: str
    notes: tuple[str, ...]


@attrs.frozen(eq=False)
class _Placed:
    """New modules that further sites share, where they are, and what they were made from."""

    action: Action
    targets: tuple[tuple[str, nn.Module], ...]
    made_from: tuple[nn.Module | None, ...]


class Engine:
    """Applies rules to a graph view; `run` does it and returns what became of each anchor.

    Rules are pure, so a second engine takes the same way through the same graph, as far as a limit.

    Args:
        view: the graph, which is edited.
        rules: the rules; at each anchor the earlier ones are tried first.
        target: what the graph is rewritten for.
        limit: how many sites to rewrite at most; by default all.
    """

    def __init__(
        self,
        view: GraphView,
        rules: Sequence[Rule[Any]],
        target: Target,
        limit: int | None = None,
    ) -> None:
        self._view = view
        self._rules = rules
        self._target = target
        self._limit = limit
        self._effects = Effects(view)
        self._rules_by_callee: dict[tuple[str, Any], list[Rule[Any]]] = {}
        self._order: dict[fx.Node, int] = {}
        self._declined: dict[fx.Node, list[Finding]] = {}
        self._applied: list[tuple[int, Rule[Any], Finding]] = []
        self._pending: list[fx.Node] = []
        # Rules that wait until no other applies.
        self._waiting = any(rule.last for rule in rules)
        # What a rule made is no anchor of the model, and not accounted for.
        self._made: set[fx.Node] = set()
        self._lineage: dict[fx.Node, tuple[str, ...]] = {}
        # Why a call had to be left out when its siblings became one.
        self._left_out: dict[fx.Node, str] = {}
        self._shared: dict[tuple[Any, ...], _Placed] = {}

    def run(self) -> list[Finding]:
        """Rewrite until nothing changes; the findings are in the order of the graph."""
        while self._walk():
            pass
        if self._waiting:
            self._waiting = False
            self._rules_by_callee.clear()
            while self._walk():
                pass
        declined = [(self._order[node], _nearest(said)) for node, said in self._declined.items()]
        applied = [(order, finding) for order, _, finding in self._applied]
        return [found for _, found in sorted(applied + declined, key=lambda at: at[0])]

    @property
    def applied(self) -> list[tuple[Rule[Any], Finding]]:
        """The sites in the order in which they were rewritten, each with its rule."""
        return [(rule, finding) for _, rule, finding in self._applied]

    @property
    def told(self) -> set[str]:
        """The names of the graph's nodes that findings tell of, or that rules made."""
        told = {name for said in self._declined.values() for one in said for name in one.nodes}
        told.update(node.name for node in (*self._declined, *self._made))
        return told

    def _walk(self) -> bool:
        before = len(self._applied)
        for node in self._view.graph.nodes:
            self._pending = [node]
            while self._pending:  # what a rule makes is looked at again before the walk goes on
                self._pending += reversed(self._visit(self._pending.pop()) or ())
        return len(self._applied) > before

    def _visit(self, node: fx.Node) -> list[fx.Node] | None:
        """Rewrite at this anchor by the first rule that may; the nodes made, or else None."""
        rules = self._rules_at(node)
        if not rules:
            return None
        order = self._order.setdefault(node, len(self._order))
        declined: list[Finding] = []
        for rule in rules:
            anchor, itself = name_of(node), (node.name,)
            found = self._find(rule, node)
            if isinstance(found, str):
                declined.append(Finding(anchor, "refused", rule.name, nodes=itself, cause=found))
                continue
            if not isinstance(found, Site):
                if not rule.quiet:
                    declined.append(Finding(anchor, "missed", rule.name, nodes=itself, cause=found))
                continue
            steps, nodes = found.steps, tuple([each.name for each in found.nodes])
            outcome = self._apply(rule, found)
            if isinstance(outcome, _Rewritten):
                finding = Finding(
                    anchor, "applied", rule.name, steps, nodes, outcome.became, outcome.notes
                )
                self._applied.append((order, rule, finding))
                return outcome.made
            if rule.pattern.is_group:  # each sibling is told of by itself
                steps, nodes = (), itself
            is_missed = isinstance(outcome, Missed)
            if not (is_missed and rule.quiet):
                what: Outcome = "missed" if is_missed else "refused"
                declined.append(Finding(anchor, what, rule.name, steps, nodes, cause=outcome))
        if declined and node not in self._made:
            self._declined[node] = declined
        return None

    def _find(self, rule: Rule[Any], node: fx.Node) -> Site | Miss | Alone | str:
        """The site around an anchor, why there is none, or why none of what is there may change."""
        if not rule.pattern.is_group:
            return Matcher(rule.pattern, self._view, node).match()
        try:
            found = group(rule.pattern, self._view, node)
        except Exception as error:
            raise failure(rule, name_of(node), f"its alike= raised {error!r}") from error
        if isinstance(found, Alone):
            return self._left_out.get(node, found)
        chosen, left_out = fit(found, node, self._view, self._effects, any_mode=rule.any_mode)
        self._left_out.update(left_out)
        return self._left_out.get(node, chosen) if isinstance(chosen, str) else chosen

    def _rules_at(self, node: fx.Node) -> Sequence[Rule[Any]]:
        is_over = self._limit is not None and len(self._applied) >= self._limit
        if node.op not in _CALLS or is_over:
            return ()
        key = (node.op, self._view.callee(node))
        rules = self._rules_by_callee.get(key)
        if rules is None:
            tried = (rule for rule in self._rules if not (self._waiting and rule.last))
            anchors = [(rule, rule.pattern.anchor_step) for rule in tried]
            rules = [rule for rule, step in anchors if calls(step, node, self._view)]
            self._rules_by_callee[key] = rules
        if rules and not all(rule.pattern.anchor_step.side_inputs for rule in rules):
            one = reads_one_value(node, self._view)
            return [r for r in rules if one or r.pattern.anchor_step.side_inputs]
        return rules

    def _apply(self, rule: Rule[Any], site: Site) -> _Rewritten | str:
        """Rewrite a site, or give the reason why it stays."""
        reason = refusal(site, self._view, self._effects, any_mode=rule.any_mode)
        if reason is not None:
            return reason
        modules = tuple([link.module for link in site.links])
        key = (rule, *map(id, modules))
        shared = self._shared.get(key)
        if shared is not None and not all(self._view.stands_at(*at) for at in shared.targets):
            shared = None  # it has been rewritten once more where it was
        # Sites that differ in more than their modules may be decided differently.
        only_modules = not rule.pattern.values and not any(
            link.step.captures_call for link in site.links
        )
        decided = (
            shared.action
            if shared is not None and only_modules
            else decide_everywhere(
                rule, site, self._view, () if only_modules else self._target.elsewhere(site)
            )
        )
        if isinstance(decided, str):
            return decided
        if shared is not None and not only_modules:
            shared = shared if same_action(shared.action, decided) else None
            decided = shared.action if shared is not None else decided
        slot = _slot(rule, site, decided)
        try:
            made = edits.prepare(self._view, site, decided, slot)
        except Exception as error:
            raise failure(rule, site, f"it asked for what can't be made: {error}") from error
        reason = action_refusal(site, self._view, self._effects, decided, made)
        reason = reason or rereading_refusal(site, made, self._view, self._effects)
        reason = reason or self._target.refusal(site, decided, slot, self._effects)
        if reason is not None:
            edits.discard(self._view, made)
            return reason
        if shared is not None:
            targets = [target for target, _ in shared.targets]
        else:
            named = [self._named(call.slot, call.module) for call in made.calls]
            targets = [target for target, _ in named]
            if named and not any(is_own for _, is_own in named):
                placed = [(t, c.module) for t, c in zip(targets, made.calls, strict=True)]
                self._shared[key] = _Placed(decided, tuple(placed), modules)
        for call in made.calls:
            self._adopt(call.module, modules)
        return self._commit(rule, site, modules, made, targets)

    def _adopt(self, module: nn.Module, matched: tuple[nn.Module | None, ...]) -> None:
        """Give a new module the mode of those it replaces."""
        training = any(old.training for old in matched if old is not None)
        for each in module.modules() if module._modules else (module,):
            if each.training != training and id(each) not in self._view.ids:
                each.training = training

    def _named(self, slot: Link | None, module: nn.Module) -> tuple[str, bool]:
        """The name for a new module, and whether it is the slot's own."""
        if slot is None:
            return self._view.free_name(type(module).__name__.lower()), False
        old, name = slot.module, name_of(slot.node)
        if old is module or (old is not None and self._view.only_user(old)):
            return name, True
        return self._view.free_name(name), False

    def _commit(
        self,
        rule: Rule[Any],
        site: Site,
        modules: tuple[nn.Module | None, ...],
        made: edits.Made,
        targets: Sequence[str],
    ) -> _Rewritten:
        notes = (
            *self._notes(site, modules, made),
            *self._calm_readers(site, made),
            *self._target.notes(site),
        )
        for node in site.nodes:
            self._effects.forget(node)
        try:
            for call, target in zip(made.calls, targets, strict=True):
                edits.call_module(self._view, made, call, target)
            nodes = edits.hand_over(self._view, site, made)
            renew(self._view, nodes)
        except Exception as error:
            raise failure(rule, site, f"it asked for what can't be made: {error}") from error
        for node in nodes:
            self._effects.note(node)
        kept = {link.node for link, _ in made.kept}
        self._pass_on(rule, site, nodes, kept)
        became = " -> " if made.revises else ", "
        new = nodes[:1] if made.parts else nodes
        return _Rewritten(nodes, became.join(map(name_of, new)), notes)

    def _calm_readers(self, site: Site, made: edits.Made) -> list[str]:
        """Let no reader of siblings write to what will be a part of one tensor."""
        values = [link.node for link in site.links] if made.parts else []
        readers = [(user, value) for value in values for user in value.users]
        notes = []
        for user in (user for user, value in readers if value in written_by(user, self._view)):
            calm(user, self._view)
            self._effects.forget(user)
            notes.append(f"{name_of(user)} no longer writes in place")
        return notes

    def _notes(
        self, site: Site, modules: tuple[nn.Module | None, ...], made: edits.Made
    ) -> Iterator[str]:
        """What a user would want to know of a site that was rewritten."""
        stays = [link.module for link, _ in made.kept] + [call.module for call in made.calls]
        kept = (each for module in stays if module is not None for each in module.parameters())
        kept_ids = set(map(id, kept)) if self._view.ties else set()
        for link, module in zip(site.links, modules, strict=True):
            if module is None:
                continue
            if is_parametrized(module):
                yield (
                    f"the parametrized tensors of {name_of(link.node)} are baked in as they are now"
                )
            for parameter in module._parameters.values() if self._view.ties else ():
                if id(parameter) in self._view.ties and id(parameter) not in kept_ids:
                    yield f"the tie of {' and '.join(self._view.ties[id(parameter)])} ends here"

    def _pass_on(
        self, rule: Rule[Any], site: Site, made: list[fx.Node], kept: set[fx.Node]
    ) -> None:
        """Settle what was known of the chain's nodes, and bound how often rules feed each other."""
        lineage = max((self._lineage.get(node, ()) for node in site.nodes), key=len)
        if len(made) >= len(site.links):  # what shrinks the graph comes to an end by itself
            lineage = (*lineage, rule.name)
        if len(lineage) > MAX_GENERATIONS:
            names = ", ".join(sorted(set(lineage)))
            raise failure(
                rule, site, f"it never comes to an end; these rules feed each other: {names}"
            )
        for node in site.nodes:
            self._declined.pop(node, None)
            if node not in made:
                # Nothing may keep a node that is gone: its memory serves the next one.
                self._order.pop(node, None)
                self._lineage.pop(node, None)
                self._made.discard(node)
                self._left_out.pop(node, None)
                if node in self._pending:
                    self._pending.remove(node)
        self._made.update(node for node in made if node not in kept)
        if lineage:
            self._lineage.update(dict.fromkeys(made, lineage))


def _nearest(declined: list[Finding]) -> Finding:
    """Of what rules said at one anchor, the first refusal or else the miss that came closest."""
    refused = [each for each in declined if each.outcome == "refused"]
    first = refused[0] if refused else max(declined, key=_depth)
    others = tuple(each for each in declined if each is not first)
    return attrs.evolve(first, others=others) if others else first


def _depth(missed: Finding) -> int:
    cause = missed.cause
    return cause.depth if isinstance(cause, Miss | Alone) else len(missed.steps)


def _slot(rule: Rule[Any], site: Site, action: Action) -> Link | None:
    """The link whose node and name a new module takes over, if the chain has such a one."""
    if isinstance(action, Split):
        return site.links[0]
    if not isinstance(action, Replace):
        return None
    calls_module = [link for link in site.links if link.node.op == "call_module"]
    if action.slot is None:
        return calls_module[0] if calls_module else None
    named = [link for link in site.links if link.name == action.slot]
    if not named:
        steps = ", ".join(step for step, _ in site.steps)
        raise failure(rule, site, f"it named the slot {action.slot!r}; this match has {steps}")
    return named[0] if named[0] in calls_module else None
