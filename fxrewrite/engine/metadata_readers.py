"""Whether those who ask a chain's inner value for its shape may ask what stands there afterwards.

An inner value goes with its chain, or gets other numbers. Who reads no number of it, but its shape,
dtype or device, may read them off the value that the chain has at that place from now on, where
that surely has the same.
"""

from __future__ import annotations

from torch import fx

from ..ir.describe import describe
from ..ir.graph_view import GraphView
from ..ir.tensor_metadata import keeps, may_change, same_layer
from .editing import Edit
from .match import Link, Site


def metadata_refusal(site: Site, view: GraphView, edit: Edit) -> str | None:
    """Why a reader of an inner value's shape can't read it afterwards, or None."""
    if not edit.now:
        return None
    nodes = site.nodes
    for i, node in enumerate(nodes[:-1]):
        for reader in node.users if len(node.users) > 1 else ():
            if reader in nodes:
                continue
            also = f"the output of {describe(node, view)} is also read by {describe(reader, view)}"
            if not _has_its_shape(site, edit, i):
                return (
                    f"{also}, and what stands there after the rewrite is not sure to have the same "
                    "shape, dtype and device"
                )
            if edit.place is not site.first and not edit.revises and reader < edit.place:
                return f"{also}, before there would be what replaces the chain"
            for write in view.writes_between(site.first, reader):
                values = (node, site.input, site.last)
                if may_change(write, view) and any(view.touches(write, each) for each in values):
                    return f"{also}, after {describe(write, view)} may have changed its shape"
    return None


def _has_its_shape(site: Site, edit: Edit, i: int) -> bool:
    """Whether what stands at a link from now on has the metadata of what stood there.

    Where the chain begins and where it ends it has, or else the rule would be wrong.
    """
    if i < 0:
        return True
    link, now = site.links[i], edit.now[i]
    if now is edit.result and all(map(_keeps, site.links[i + 1 :])):
        return True
    before: fx.Node = edit.now[i - 1] if i else site.input
    if now is before or (now is link.node and any(link is each.link for each in edit.kept)):
        return _keeps(link) and _has_its_shape(site, edit, i - 1)
    call = next((each for each in edit.calls if each.slot is link and each.node is now), None)
    same = call is not None and same_layer(link.module, call.module)
    return same and _has_its_shape(site, edit, i - 1)


def _keeps(link: Link) -> bool:
    return keeps(link.node, link.module, link.takes)
