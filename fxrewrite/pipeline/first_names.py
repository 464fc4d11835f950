"""Give new modules the names of those that they replace, once no call of those is left."""

from __future__ import annotations

import re
from collections.abc import Mapping

import attrs

from ..engine.report import Finding
from ..ir.graph_view import GraphView


def restore_names(view: GraphView) -> dict[str, str]:
    """Rename the modules that stand beside ones which nothing uses any more; from old to new name.

    A module that is called several times keeps its name in the state dict, if all calls of it
    became calls of one new module. Of several new modules, none has more right to the name.
    """
    calls = view.graph.find_nodes(op="call_module")
    new = dict.fromkeys(str(node.target) for node in calls)
    wanted = [view.first_name(name) for name in new]
    renamed = {
        name: first
        for name, first in zip(new, wanted, strict=True)
        if name != first and wanted.count(first) == 1 and _is_free(first, view)
    }
    for node in calls:
        if node.target in renamed:
            view.count(node, -1)
            module, node.target = view.placed[node.target], renamed[node.target]
            view.place(node.target, module)
            view.count(node, +1)
    for name in renamed:
        del view.placed[name]
    return renamed


def _is_free(name: str, view: GraphView) -> bool:
    old = view.modules.get(name)
    inside = () if old is None else old.modules()
    return not view.is_used(name) and not any(map(view.users, inside))


def with_names(finding: Finding, renamed: Mapping[str, str]) -> Finding:
    """The same finding with other names for what stands where its match was."""
    if not renamed or not finding.became:
        return finding
    became = re.sub(r"[^\s,]+", lambda name: renamed.get(name[0], name[0]), finding.became)
    return attrs.evolve(finding, became=became)
