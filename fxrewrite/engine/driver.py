"""The driver: a walk over the graph that tries rules at each node, until nothing changes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import attrs
from torch import fx

from ..ir.describe import name_of
from ..ir.graph_view import GraphView
from ..module_utils.torch_private import is_erased
from ..rules.rule import Rule
from ..rules.values import Declined
from .applying import Applied, SiteRewriter
from .evaluation import failure
from .match import Miss, Site
from .matcher import Matcher, calls, reads_one_value
from .report import Finding
from .siblings import siblings_of
from .target import Target

# How often rules may rewrite what rules made, before they are taken to feed each other forever.
MAX_GENERATIONS = 100


class Driver:
    """Applies rules to a graph; `run` does it and returns what became of each anchor.

    At each anchor the earlier rules are tried first. At most `limit` sites are rewritten.
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
        self._limit = limit
        self._site_rewriter = SiteRewriter(view, target)
        # The sites that were rewritten, in that order.
        self.applied: list[tuple[Rule[Any], Finding]] = []
        self._order: dict[fx.Node, int] = {}
        self._places: list[int] = []
        self._declined: dict[fx.Node, list[Finding]] = {}
        # Where rules were tried and none applied, with how many sites were rewritten by then.
        self._tried: dict[fx.Node, int] = {}
        self._pending: list[fx.Node] = []
        # What a rule made is no anchor of the model, and not accounted for.
        self._made: set[fx.Node] = set()
        self._lineage: dict[fx.Node, tuple[str, ...]] = {}
        # Why a call had to be left out when its siblings became one.
        self._left_out: dict[fx.Node, str] = {}
        self._rules_by_callee: dict[tuple[str, Any], list[Rule[Any]]] = {}
        self._waits = any(rule.last for rule in rules)

    def run(self) -> list[Finding]:
        """Rewrite until nothing changes; the findings are in the order of the graph."""
        self._settle(self._view.graph.nodes)
        if self._waits:  # now those rules have their turn that wait until no other applies
            self._waits = False
            self._rules_by_callee.clear()
            self._settle(self._view.graph.nodes)
        found = [*zip(self._places, (finding for _, finding in self.applied), strict=True)]
        found += [(self._order[node], _nearest(said)) for node, said in self._declined.items()]
        return [finding for _, finding in sorted(found, key=lambda at: at[0])]

    @property
    def told(self) -> set[str]:
        """The names of the nodes that there are findings of, or that rules made."""
        names = {name for said in self._declined.values() for one in said for name in one.nodes}
        return names | {node.name for node in (*self._declined, *self._made)}

    def _settle(self, nodes: Iterable[fx.Node]) -> None:
        """Walk over nodes, then again over those where a later rewrite may make a difference."""
        self._tried.clear()
        while nodes:
            for node in nodes:
                self._pending = [node] if not is_erased(node) else []
                while self._pending:  # what a rule makes is looked at before the walk goes on
                    self._pending += reversed(self._visit(self._pending.pop()))
            before = len(self.applied)
            again = (node for node, at in self._tried.items() if at < before)
            nodes = sorted(node for node in again if not is_erased(node))

    def _visit(self, node: fx.Node) -> list[fx.Node]:
        """Rewrite at this anchor by the first rule that may; gives the nodes that it makes."""
        self._tried.pop(node, None)
        rules = self._rules_at(node)
        if not rules:
            return []
        self._order.setdefault(node, len(self._order))
        self._tried[node] = len(self.applied)
        declined: list[Finding] = []
        for rule in rules:
            if not rule.pattern.anchor_step.side_inputs and not reads_one_value(node, self._view):
                continue
            found = self._find(rule, node)
            outcome = found if isinstance(found, Declined) else self._apply(rule, node, found)
            if isinstance(outcome, Applied):
                return outcome.nodes
            if outcome.outcome == "refused" or not rule.quiet:
                declined.append(_finding(rule, node, found, outcome))
        if declined and node not in self._made:
            self._declined[node] = declined
        return []

    def _rules_at(self, node: fx.Node) -> Sequence[Rule[Any]]:
        """The rules that look for such a node first."""
        if not node.op.startswith("call") or len(self.applied) == self._limit:
            return ()
        key = (node.op, self._view.callee(node))
        rules = self._rules_by_callee.get(key)
        if rules is None:
            tried = (rule for rule in self._rules if not (self._waits and rule.last))
            rules = [rule for rule in tried if calls(rule.pattern.anchor_step, node, self._view)]
            self._rules_by_callee[key] = rules
        return rules

    def _find(self, rule: Rule[Any], node: fx.Node) -> Site | Declined:
        """The site around an anchor, or why there is none."""
        if rule.pattern.is_group:
            return siblings_of(rule, node, self._view, self._left_out)
        found = Matcher(rule.pattern, self._view, node).match()
        return Declined(found, "missed") if isinstance(found, Miss) else found

    def _apply(self, rule: Rule[Any], anchor: fx.Node, site: Site) -> Applied | Declined:
        """Rewrite a site, and keep the account of it."""
        name, steps = name_of(anchor), site.steps
        nodes = tuple([each.name for each in site.nodes])
        outcome = self._site_rewriter.apply(rule, site)
        if isinstance(outcome, Applied):
            came = outcome.became, outcome.notes, outcome.assurance
            finding = Finding(name, "applied", rule.name, steps, nodes, *came)
            self.applied.append((rule, finding))
            self._places.append(self._order[anchor])
            self._pass_on(rule, site, outcome)
        return outcome

    def _pass_on(self, rule: Rule[Any], site: Site, applied: Applied) -> None:
        """Settle what was known of the chain's nodes, and bound how often rules feed each other."""
        made = applied.nodes
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
                self._made.discard(node)
                for known in (self._order, self._lineage, self._left_out, self._tried):
                    known.pop(node, None)
                if node in self._pending:
                    self._pending.remove(node)
        self._made.update(node for node in made if node not in applied.kept)
        if lineage:
            self._lineage.update(dict.fromkeys(made, lineage))


def _finding(rule: Rule[Any], node: fx.Node, found: Site | Declined, declined: Declined) -> Finding:
    """What a rule said of an anchor where it did not apply."""
    steps: tuple[tuple[str, str], ...] = ()
    nodes: tuple[str, ...] = (node.name,)
    if isinstance(found, Site) and not rule.pattern.is_group:  # each sibling is told of by itself
        steps, nodes = found.steps, tuple([each.name for each in found.nodes])
    return Finding(name_of(node), declined.outcome, rule.name, steps, nodes, cause=declined.cause)


def _nearest(declined: list[Finding]) -> Finding:
    """Of what rules said at one anchor, the first refusal or else the miss that came closest."""
    refused = [each for each in declined if each.outcome == "refused"]
    depths = {each: getattr(each.cause, "depth", len(each.steps)) for each in declined}
    first = refused[0] if refused else max(declined, key=depths.__getitem__)
    others = tuple(each for each in declined if each is not first)
    return attrs.evolve(first, others=others) if others else first
