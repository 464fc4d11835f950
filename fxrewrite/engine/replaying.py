"""What the rules decided, in order, so that a rewrite can be done again in part."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs
from torch import fx

from ..errors import FxRewriteError
from ..ir.graph_view import GraphView
from ..module_utils.torch_private import pytree
from ..rules.actions import Action, Replace
from ..rules.rules import Rule
from ..rules.values import Call, Value
from .bindings import Shown, capture, capture_elsewhere
from .evaluation import decide, same_action
from .match import Site
from .report import Finding

NOT_THE_SAME = "the model is not traced the same way twice, so no rewrite of it can be done again"


class Script:
    """Asks the rules for each site, and notes what they answered and which sites were rewritten."""

    def __init__(self) -> None:
        self.answers: list[tuple[Rule[Any], str, Action | str]] = []
        self.applied: list[tuple[Rule[Any], Finding]] = []

    @property
    def is_over(self) -> bool:
        """Whether no further site may be rewritten."""
        return False

    def decide(
        self, rule: Rule[Any], site: Site, view: GraphView, elsewhere: Sequence[Shown | None] = ()
    ) -> Action | str:
        """The action that a rule wants for a site, or the reason why it is refused.

        Args:
            rule: the rule.
            site: the site.
            view: the graph that it is of.
            elsewhere: what the chain is called on elsewhere, where the rule has to want the same.
        """
        answer = decide(rule, site, capture(site, view))
        for shown in elsewhere:
            if isinstance(answer, str):
                break
            other = decide(rule, site, capture_elsewhere(site, view, shown))
            if isinstance(other, str) or not same_action(answer, other):
                answer = _undecided(shown, other)
        self.answers.append((rule, site.last.name, answer))
        return answer


class Replay(Script):
    """Gives the answers of an earlier rewrite of the same model once more, as far as some site.

    Up to there the engine takes the same way, and so asks the same in the same order.

    Args:
        script: what was decided.
        sites: how many sites to rewrite.
    """

    def __init__(self, script: Script, sites: int) -> None:
        super().__init__()
        self._left = iter(script.answers)
        self._sites = sites

    @property
    def is_over(self) -> bool:
        """Whether all sites that were wanted are rewritten."""
        return len(self.applied) >= self._sites

    def decide(
        self, rule: Rule[Any], site: Site, view: GraphView, elsewhere: Sequence[Shown | None] = ()
    ) -> Action | str:
        """The answer of the time before, about the graph at hand."""
        known, at, answer = next(self._left, (None, "", ""))
        if known is None or known.name != rule.name or at != site.last.name:
            raise FxRewriteError(NOT_THE_SAME)
        return answer if isinstance(answer, str) else _moved(answer, view)


def _undecided(shown: Shown | None, other: Action | str) -> str:
    """Why a rule can't have its way where it would not have it at another call."""
    said = other if isinstance(other, str) else "the rule asks for something else there"
    if shown is None:
        return f"it may also be called on nobody knows what: {said}"
    return f"it is also called on a tensor of shape {tuple(shown[0])}: {said}"


def _moved(action: Action, view: GraphView) -> Action:
    """The same action, reading the values of this graph that have the same names."""
    leaves = pytree.tree_leaves(_read_by(action))
    if not any(isinstance(leaf, Value | fx.Node) for leaf in leaves):
        return action
    nodes = {node.name: node for node in view.graph.nodes}

    def moved(leaf: Any) -> Any:
        return attrs.evolve(leaf, node=nodes.get(leaf.name)) if isinstance(leaf, Value) else leaf

    if isinstance(action, Replace):
        return attrs.evolve(action, inputs=tuple(map(moved, action.inputs)))
    assert isinstance(action, Call)
    again = Call(action.function, *pytree.tree_map(moved, action.args))
    again.kwargs = pytree.tree_map(moved, dict(action.kwargs))
    again.takes = action.takes
    again.node = None if action.node is None else nodes[action.node.name]
    return again


def _read_by(action: Action) -> Any:
    if isinstance(action, Replace):
        return action.inputs
    return (action.args, dict(action.kwargs), action.node) if isinstance(action, Call) else ()
