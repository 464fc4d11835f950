"""Calls that are written into a graph: a function traced into it, a value split into parts."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.proxy import GraphAppendingTracer

from ..module_utils.torch_private import pytree
from .overlay import Overlay


def spell(
    view: Overlay, place: fx.Node, function: Callable[..., Any], args: Any, kwargs: Any, base: str
) -> tuple[list[fx.Node], fx.Node]:
    """Trace a function into the graph before a node: the nodes that this makes, and the result.

    Nodes among its arguments are values of the graph. Tensors become attributes of the model, whose
    names start with `base`. Raises TypeError where the function returns no value of the graph.
    """
    before = place.prev
    tracer = _Speller(view, base)
    with view.graph.inserting_before(place):
        result = function(*tracer.lift(args), **tracer.lift(kwargs))
    spelt = []
    while before.next is not place:
        before = before.next
        spelt.append(before)
        view.count(before, +1)
    if not isinstance(result, fx.Proxy):
        raise TypeError(f"the function of its Call returned a {type(result).__name__}, not a value")
    return spelt, result.node


def split(graph: fx.Graph, value: fx.Node, sizes: Sequence[int], dim: int) -> list[fx.Node]:
    """Split a value into parts right behind it: the node that splits, then one for each part."""
    with graph.inserting_after(value):
        made = [graph.call_function(torch.split_with_sizes, (value, list(sizes), dim))]
    for i in range(len(sizes)):
        with graph.inserting_after(made[-1]):
            made.append(graph.call_function(operator.getitem, (made[0], i)))
    return made


class _Speller(GraphAppendingTracer):
    """Traces into the graph at hand; tensors become attributes of the model."""

    def __init__(self, view: Overlay, base: str) -> None:
        super().__init__(view.graph)
        self._view = view
        self._base = base

    def lift(self, argument: Any) -> Any:
        """The argument with proxies for the nodes and tensors in it."""
        return pytree.tree_map(self._lift_leaf, argument)

    def _lift_leaf(self, leaf: Any) -> Any:
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
