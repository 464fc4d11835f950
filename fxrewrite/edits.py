"""Carry out an action at a site; nothing else edits a graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.fx.proxy import GraphAppendingTracer

from .actions import Replace
from .declare import Call, Value
from .matching import Link, Site
from .view import GraphView


def replace(
    view: GraphView, site: Site, action: Replace, target: str, slot: Link | None
) -> list[fx.Node]:
    """Let the chain become one call of the new module under `target`, made by the slot's node."""
    inputs = tuple(_node_of(value) for value in action.inputs)
    place = site.last if inputs else site.links[0].node
    if slot is None:
        with view.graph.inserting_before(place):
            node = view.graph.create_node("call_module", target)
    else:
        node = slot.node
        view.count(node, -1)
        if node.target != target:
            node.target = target
        if node is not place:
            place.prepend(node)
    # What FX keeps up to date on assignment is not cheap, and most sites need none of it.
    if node.args != (site.input, *inputs):
        node.args = (site.input, *inputs)
    if node.kwargs:
        node.kwargs = {}
    view.place(target, action.module)
    view.count(node, +1)
    _hand_over(view, site, [node], node)
    return [node]


def call(view: GraphView, site: Site, action: Call) -> list[fx.Node]:
    """Let the chain become the nodes that the action's function spells, and return them.

    Raises:
        TypeError: the function returns something other than one value of the graph.
    """
    tracer = _Speller(view, site)
    place = site.last if tracer.reads_side_inputs(action) else site.links[0].node
    before = place.prev
    with view.graph.inserting_before(place):
        args = tracer.lift((site.input, *action.args))
        result = action.function(*args, **tracer.lift(action.kwargs))
    if not isinstance(result, fx.Proxy):
        raise TypeError(f"the function of its Call returned a {type(result).__name__}, not a value")
    made = []
    while before.next is not place:
        before = before.next
        made.append(before)
        view.count(before, +1)
    _hand_over(view, site, made, result.node)
    return made


def bypass(view: GraphView, site: Site) -> list[fx.Node]:
    """Let whoever reads the chain's output read its input."""
    _hand_over(view, site, [], site.input)
    return []


def _hand_over(view: GraphView, site: Site, made: list[fx.Node], result: fx.Node) -> None:
    """Move the readers of the chain to its replacement and erase what is left of it."""
    last = site.last
    for node in made:
        node.meta = last.meta if node is result else _provenance(last)
    if result is not last:
        last.replace_all_uses_with(result)
    for node in reversed(site.nodes):
        if node not in made:
            read = [each for each in node.all_input_nodes if each.op == "get_attr"]
            _erase(view, node)
            for attribute in read:
                if not attribute.users:
                    _erase(view, attribute)


def _erase(view: GraphView, node: fx.Node) -> None:
    view.count(node, -1)
    view.graph.erase_node(node)


def _provenance(node: fx.Node) -> dict[str, Any]:
    """Where a node came from, without what is known of its value."""
    return {k: v for k, v in node.meta.items() if k in ("stack_trace", "nn_module_stack")}


def _node_of(value: Value) -> fx.Node:
    if not isinstance(value, Value) or value.node is None:
        raise TypeError(f"expected a Value that this match captured, found {value!r}")
    return value.node


class _Speller(GraphAppendingTracer):
    """Traces a function into the graph at hand; tensors become attributes of the model."""

    def __init__(self, view: GraphView, site: Site) -> None:
        super().__init__(view.graph)
        self._view = view
        self._base = f"{site.last.name}_constant"

    @staticmethod
    def reads_side_inputs(action: Call) -> bool:
        leaves = torch.utils._pytree.tree_leaves((action.args, action.kwargs))
        return any(isinstance(leaf, Value) for leaf in leaves)

    def lift(self, argument: Any) -> Any:
        """The argument with nodes, values and tensors in it made proxies."""
        return torch.utils._pytree.tree_map(self._lift_leaf, argument)

    def _lift_leaf(self, leaf: Any) -> Any:
        if isinstance(leaf, Value):
            leaf = _node_of(leaf)
        if isinstance(leaf, torch.Tensor):
            leaf = self._constant(leaf)
        return self.proxy(leaf) if isinstance(leaf, fx.Node) else leaf

    def create_arg(self, a: Any) -> Any:
        """Lower an argument; a tensor that the function closes over becomes an attribute too."""
        return self._constant(a) if isinstance(a, torch.Tensor) else super().create_arg(a)

    def _constant(self, tensor: torch.Tensor) -> fx.Node:
        target = self._view.free_name(self._base)
        self._view.place(target, tensor)
        return self.graph.create_node("get_attr", target)
