"""What is no anchor and took part in no match: where the chains around it stopped."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import attrs
from torch import fx

from ..engine.match import Miss
from ..engine.matcher import FOUND_AT_MOST, Matcher, accepts, calls
from ..ir.describe import Seen, name_of
from ..ir.graph_view import GraphView
from ..rules.rule import Rule
from ..rules.spec import Pattern, Step


@attrs.frozen(eq=False)
class NearMiss:
    """A node that could have been a step of a rule's chain other than its anchor, and was not."""

    rule: str
    step: str
    miss: Miss

    @property
    def role(self) -> str:
        """The step that it could be, in words."""
        return f"the {self.step} of {self.rule}"

    def __str__(self) -> str:
        """Where the chain stopped, seen from this step."""
        return f"it could be {self.role}, but {self.miss}"


@attrs.frozen
class _Role:
    """A step that a node could be, in a pattern or in one of its branches.

    `within` are the patterns from the rule's own down to the one that has the step.
    """

    within: tuple[Pattern, ...]
    at: int
    name: str

    @property
    def step(self) -> Step:
        """The step itself."""
        return self.within[-1].steps[self.at]


def near_misses(
    view: GraphView, rules: Sequence[Rule[Any]], told: Collection[str]
) -> dict[str, tuple[NearMiss, ...]]:
    """For each call that could be a step of a rule's chain, where that chain stopped.

    Args:
        view: the graph as the rules left it.
        rules: the rules.
        told: the names of the nodes that there are findings of.
    """
    chains = [rule for rule in rules if not rule.pattern.is_group]  # of a group all are anchors
    roles = [(rule, role) for rule in chains for role in _roles((rule.pattern,), "")]
    by_callee: dict[tuple[str, Any], list[tuple[Rule[Any], _Role]]] = {}
    found: dict[str, tuple[NearMiss, ...]] = {}
    for node in view.graph.nodes:
        if not node.op.startswith("call") or node.name in told:
            continue
        key = (node.op, view.callee(node))
        if key not in by_callee:
            by_callee[key] = [each for each in roles if calls(each[1].step, node, view)]
        for rule, role in by_callee[key]:
            miss = _miss(view, role, node) if accepts(role.step, node, view) else None
            if miss is not None:
                near = NearMiss(rule.name, role.name, miss)
                for name in {name_of(node): None, node.name: None}:
                    found[name] = (*found.get(name, ()), near)
    return found


def _roles(within: tuple[Pattern, ...], prefix: str) -> Iterator[_Role]:
    pattern = within[-1]
    for at, step in enumerate(pattern.steps):
        if not step.repeats:
            yield _Role(within, at, prefix + step.name)
    known: list[Pattern] = []
    for branch in pattern.branches:
        if branch.pattern not in known:  # of branches that are alike, the first will do
            known.append(branch.pattern)
            yield from _roles((*within, branch.pattern), f"{prefix}{branch.name}.")


def _miss(view: GraphView, role: _Role, node: fx.Node) -> Miss | None:
    """Where the chain around a node stopped, from its own branch outwards; None if nowhere."""
    *outer, inner = role.within
    found = Matcher(inner, view, node, role.at).match()
    last = node
    while not isinstance(found, Miss):
        if not outer:
            return None
        joined, last = outer.pop(), found.last
        join = next((each for each in last.users if accepts(joined.steps[0], each, view)), None)
        if join is None:
            beside = None if last is node else Seen.of(last, view)
            readers = [Seen.of(each, view) for each in list(last.users)[:FOUND_AT_MOST]]
            return Miss(joined, 0, False, beside, tuple(readers), frozenset(), 0)
        found, last = Matcher(joined, view, join, 0).match(), join
    if found.beside is None and last is not node:
        return attrs.evolve(found, beside=Seen.of(last, view))
    return found
