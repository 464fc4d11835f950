"""Values of a graph that depend on the model's own tensors alone, such as `gamma.view(1, -1, 1)`.

To a rule they are constants, as a parameter is that a step reads as it is.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from .op_traits import traits_of


def is_constant(node: fx.Node, known: set[fx.Node]) -> bool:
    """Whether a node reads a tensor of the model, or computes something of `known` alone."""
    if node.op == "get_attr":
        return True
    if not traits_of(node, None).pure:
        return False
    read = node.all_input_nodes
    return bool(read) and known.issuperset(read) and "out" not in node.kwargs


def evaluate(node: fx.Node, attribute: Any) -> Any:
    """The value of a constant node, `attribute` giving that of a `get_attr` node."""
    if node.op == "get_attr":
        return attribute(node)
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda each: evaluate(each, attribute))
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    return node.target(*args, **kwargs)  # type: ignore[operator]
