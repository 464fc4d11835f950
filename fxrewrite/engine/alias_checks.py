"""Whether shared storage could tell what replaces a chain from the chain.

A chain returns its input, a view of it, or new storage; so does what replaces it. Where the two
differ, a write in place, in the graph or by the caller, reaches other values than before.
"""

from __future__ import annotations

from typing import Literal

from torch import fx, nn

from ..ir.aliases import hands_on, is_fresh, is_fresh_module, lends, writes_in_place, written_by
from ..ir.describe import describe
from ..ir.graph_view import GraphView
from .editing import Edit, Kept, NewCall
from .legality import written_meanwhile
from .match import Site

Relation = Literal["new", "same", "unknown"]


def alias_refusal(site: Site, view: GraphView, edit: Edit) -> str | None:
    """Why this may not take the chain's place, or None, once the rule has said what should."""
    if edit.place is not site.first:
        reason = written_meanwhile(site, edit.place, view, [site.input])
        if reason is not None:
            return reason
    for value in edit.reads:
        before, after = _chain_relation(site, value, view), _new_relation(value, view, edit)
        writes = _writes_to(value, view, edit)
        if writes or not before == after != "unknown":
            reason = _storage_refusal(site, value, view, edit, writes=writes)
            if reason is None and {before, after} == {"new", "same"}:
                reason = _callers_refusal(site, value, view)
            if reason is not None:
                return reason
    return None


def _storage_refusal(
    site: Site, value: fx.Node, view: GraphView, edit: Edit, *, writes: bool
) -> str | None:
    """Why others could tell that the chain's output is no longer the same view of a value."""
    own = {*site.nodes, *edit.nodes}
    seen = view.seen_elsewhere(value, own)
    if seen is None:
        return None
    if writes:
        return f"what replaces the chain may write in place to {describe(seen, view)}"
    for each in (site.last, *view.storage(value)):
        later = view.later_write(each, after=site.first)
        if later is not None and later not in own:
            return (
                f"{describe(later, view)} writes in place, and the rewrite would change whether "
                f"the chain's output shares storage with {describe(value, view)}"
            )
    return None


def _callers_refusal(site: Site, value: fx.Node, view: GraphView) -> str | None:
    """Why a caller, who may write to what it gave or got, could tell the rewrite, or None."""
    is_given = any(each.op in ("placeholder", "get_attr") for each in view.storage(value))
    if not view.is_returned(site.last) or not is_given:
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


def _new_relation(value: fx.Node, view: GraphView, edit: Edit) -> Relation:
    """How the storage of what replaces the chain is related to that of a value that it reads."""
    if edit.steps:
        if any(_is_fresh(each, view) for each in edit.steps):
            return "new"
        hand_on = all(hands_on(_module(each)) for each in edit.steps)
        return "same" if len(edit.reads) == 1 and hand_on else "unknown"
    if edit.result is value:
        return "same"
    return "unknown" if view.storage(edit.result) & view.storage(value) else "new"


def _writes_to(value: fx.Node, view: GraphView, edit: Edit) -> bool:
    """Whether what replaces the chain writes to a value that it reads."""
    for each in edit.steps:
        if written_by(each.node, view) if isinstance(each, Kept) else writes_in_place(each.module):
            return True
        if _is_fresh(each, view):
            return False
    return not edit.steps and any(view.touches(node, value) for node in edit.nodes)


def _is_fresh(step: NewCall | Kept, view: GraphView) -> bool:
    return is_fresh(step.node, view) if isinstance(step, Kept) else is_fresh_module(step.module)


def _module(step: NewCall | Kept) -> nn.Module | None:
    return step.link.module if isinstance(step, Kept) else step.module
