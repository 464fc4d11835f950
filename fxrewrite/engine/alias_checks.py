"""Whether shared storage could tell what replaces a chain from the chain.

A chain returns its input, a view of it, or new storage; so does what replaces it. Where the two
differ, a write in place, in the graph or by the caller, reaches other values than before.
"""

from __future__ import annotations

from typing import Literal

import attrs
from torch import fx

from ..ir.aliases import (
    Effects,
    hands_on,
    is_fresh,
    is_fresh_module,
    lends,
    writes_in_place,
    written_by,
)
from ..ir.describe import describe
from ..ir.graph_view import GraphView
from ..rules.actions import Action, Replace, Revise, Split
from .editing import Made
from .legality import seen_elsewhere, touches, written_meanwhile
from .match import Site

Relation = Literal["new", "same", "unknown"]


def action_refusal(
    site: Site, view: GraphView, effects: Effects, action: Action, made: Made
) -> str | None:
    """Why this may not take the chain's place, or None, once the rule has said what should."""
    if made.place is not site.first:
        reason = written_meanwhile(site, made.place, view, effects)
        if reason is not None:
            return reason
    for value in made.reads:
        before = _chain_relation(site, value, view)
        after = _new_relation(site, value, view, effects, action, made)
        writes = _writes_to(site, value, view, effects, action, made)
        if writes or not before == after != "unknown":
            reason = _storage_refusal(site, value, writes, view, effects, made)
            if reason is None and {before, after} == {"new", "same"}:
                reason = _callers_refusal(site, value, effects)
            if reason is not None:
                return reason
    return None


def _storage_refusal(
    site: Site, value: fx.Node, writes: bool, view: GraphView, effects: Effects, made: Made
) -> str | None:
    """Why others could tell that the chain's output is no longer the same view of a value."""
    own = {*site.nodes, *made.nodes}
    seen = seen_elsewhere(value, own, effects)
    if seen is None:
        return None
    if writes:
        return f"what replaces the chain would write in place to {describe(seen, view)}"
    for each in (site.last, *effects.storage(value)):
        later = effects.later_write(each, after=site.first)
        if later is not None and later not in own:
            return (
                f"{describe(later, view)} writes in place, and the rewrite would change whether "
                f"the chain's output shares storage with {describe(value, view)}"
            )
    return None


def _callers_refusal(site: Site, value: fx.Node, effects: Effects) -> str | None:
    """Why a caller, who may write to what it gave or got, could tell the rewrite, or None."""
    storage = effects.storage(value)
    is_given = any(each.op in ("placeholder", "get_attr") for each in storage)
    if not effects.is_returned(site.last) or not is_given:
        return None
    return (
        "it would change whether what the model returns shares storage with what it is given, "
        "which a caller that writes in place could tell"
    )


def _chain_relation(site: Site, value: fx.Node, view: GraphView) -> Relation:
    """How the storage of a chain's output is related to that of a value that it reads."""
    if is_fresh(site.last, view):
        return "new"
    known: dict[fx.Node, Relation] = {value: "same"}
    for node in site.nodes:
        if known.keys().isdisjoint(node.all_input_nodes):
            continue
        given = {known[each] for each in lends(node, view) if each in known}
        if given <= {"new"}:
            known[node] = "new"
        else:
            is_same = given == {"same"} and hands_on(view.module(node))
            known[node] = "same" if is_same else "unknown"
    return known.get(site.last, "unknown")


def _new_relation(
    site: Site, value: fx.Node, view: GraphView, effects: Effects, action: Action, made: Made
) -> Relation:
    if isinstance(action, Revise):
        steps = _remaining(site, action, view)
        if any(step.is_fresh for step in steps):
            return "new"
        return "same" if all(step.hands_on for step in steps) else "unknown"
    if isinstance(action, Replace | Split):
        if is_fresh_module(action.module):
            return "new"
        only_input = len(made.reads) == 1
        return "same" if only_input and hands_on(action.module) else "unknown"
    if made.result is value:
        return "same"
    return "unknown" if effects.storage(made.result) & effects.storage(value) else "new"


@attrs.frozen
class _Remaining:
    """A step that a revision leaves: whether its output is new storage, and so on."""

    is_fresh: bool
    hands_on: bool
    writes: bool


def _remaining(site: Site, action: Revise, view: GraphView) -> list[_Remaining]:
    found = []
    for link in site.links:
        module = action.steps.get(link.step.name)
        if module is not None:
            about = is_fresh_module(module), hands_on(module), writes_in_place(module)
        elif link.step.name not in action.steps:
            writes = bool(written_by(link.node, view))
            about = is_fresh(link.node, view), hands_on(view.module(link.node)), writes
        else:
            continue
        found.append(_Remaining(*about))
    return found


def _writes_to(
    site: Site, x: fx.Node, view: GraphView, effects: Effects, action: Action, made: Made
) -> bool:
    if isinstance(action, Revise):
        steps = _remaining(site, action, view)
        new = next((i for i, step in enumerate(steps) if step.is_fresh), len(steps))
        return any(step.writes for step in steps[: new + 1])
    if isinstance(action, Replace | Split):
        return writes_in_place(action.module)
    return any(touches(node, x, view, effects) for node in made.nodes)
