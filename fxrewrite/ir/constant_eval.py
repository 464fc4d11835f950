"""Values of a graph that depend on the model's own tensors alone, such as `gamma.view(1, -1, 1)`.

To a rule they are constants, as a parameter is that a step reads as it is.
"""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from ..module_utils.torch_private import OpOverload, operator_name

# Functions and methods that only depend on their arguments, and write to none of them.
_PURE = frozenset(
    "abs add clone contiguous detach div double exp expand float flatten getitem mul neg permute "
    "pow reciprocal reshape rsqrt sigmoid sqrt squeeze sub t tanh to transpose true_divide "
    "truediv unflatten unsqueeze view".split()
)


def is_constant(node: fx.Node, known: set[fx.Node]) -> bool:
    """Whether a node reads a tensor of the model, or computes something of `known` alone."""
    if node.op == "get_attr":
        return True
    if node.op not in ("call_function", "call_method") or _base_name(node.target) not in _PURE:
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


def _base_name(target: Any) -> str:
    if isinstance(target, str):
        return target
    if isinstance(target, OpOverload):
        return operator_name(target).removeprefix("aten::")
    module = getattr(target, "__module__", None) or "torch"
    is_known = module == operator.__name__ or module == "_operator" or module.startswith("torch")
    return getattr(target, "__name__", "") if is_known else ""
