"""Make attributes of a graph inputs of it."""

from __future__ import annotations

from typing import Any

import attrs
from torch import fx


@attrs.frozen
class Input:
    """An input that a graph shall have, and the nodes that stand for it until then."""

    name: str
    meta: dict[str, Any]
    nodes: list[fx.Node]


def as_inputs(graph: fx.Graph, inputs: list[Input]) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    """A copy of a graph that has these inputs and no other, and which node became which."""
    flat = fx.Graph()
    made: dict[fx.Node, fx.Node] = {}
    for each in inputs:
        node = flat.placeholder(each.name)
        node.name = node.target = each.name  # FX would not have it named `input`, say
        node.meta = each.meta
        made.update(dict.fromkeys(each.nodes, node))
    for node in graph.nodes:
        is_tensor = node.op == "get_attr" and not node.users
        if node not in made and not is_tensor:
            made[node] = flat.node_copy(node, made.__getitem__)
    return flat, made
