"""Which nodes write in place, and which may hand on the storage they were given."""

from __future__ import annotations

import functools
import operator
from typing import Any

import torch
from torch import fx, nn

from ..dialects.op_table import SPELLINGS
from ..module_utils.subclassing import overridden
from .overlay import Overlay

IN_PLACE_OPERATORS = {
    getattr(operator, name)
    for name in dir(operator)
    if name.startswith("i") and hasattr(operator, f"__{name}__")
} | {operator.setitem}

_IN_PLACE_METHODS = {f"__{function.__name__}__" for function in IN_PLACE_OPERATORS}

# What is listed here always returns new storage; of anything else that is not assumed.
_FRESH_MODULES = {
    f"torch.nn.modules.{family}"
    for family in ("activation", "batchnorm", "conv", "linear", "normalization", "pooling")
}
_FRESH_CALLS = frozenset(
    "abs add addcmul addmm avg_pool1d avg_pool2d avg_pool3d baddbmm batch_norm bmm cat clone "
    "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d cos div elu exp "
    "gelu group_norm hardsigmoid hardswish hardtanh layer_norm leaky_relu linear log log_softmax "
    "logical_and logical_not logical_or matmul max_pool1d max_pool2d max_pool3d mean mish mm mul "
    "neg pow reciprocal relu relu6 rsqrt rsub scaled_dot_product_attention selu sigmoid silu sin "
    "softmax softplus sqrt stack sub sum tanh true_divide truediv".split()
)

_IN_PLACE_CALLS = {f"{name}_" for name in _FRESH_CALLS}


def written_by(node: fx.Node, view: Overlay) -> list[fx.Node]:
    """The values that a node writes to in place."""
    target = node.target
    if node.op == "call_module":
        return node.all_input_nodes[:1] if writes_in_place(view.module(node)) else []
    if node.op == "call_method":
        return node.all_input_nodes[:1] if _is_in_place_name(str(target)) else []
    if node.op != "call_function":
        return []
    if isinstance(target, torch._ops.OpOverload):
        inputs = view.inputs(node)
        return [inputs[name] for name in _mutable_arguments(target) if name in inputs]
    written: list[fx.Node] = []
    if target in SPELLINGS:  # a functional batch norm in training mode updates its statistics
        inputs = view.inputs(node)
        updated = SPELLINGS[target].meaning.updates(view.arguments(node))
        written += [inputs[name] for name in updated if name in inputs]
    fx.node.map_arg(node.kwargs.get("out"), written.append)
    if _writes_first_argument(target) or (
        _has_inplace_argument(target) and view.arguments(node).get("inplace")
    ):
        written += node.all_input_nodes[:1]
    return written


def lends(node: fx.Node, view: Overlay) -> list[fx.Node]:
    """The values whose storage a node's output may share."""
    if is_fresh(node, view):
        return []
    return written_by(node, view) if _returns_what_it_writes(node) else node.all_input_nodes


def _returns_what_it_writes(node: fx.Node) -> bool:
    if node.op == "call_function":
        known = node.target in IN_PLACE_OPERATORS and node.target is not operator.setitem
        return known or (base_name(node.target) in _IN_PLACE_CALLS and is_torch(node.target))
    return node.op == "call_method" and node.target in _IN_PLACE_CALLS


def is_fresh(node: fx.Node, view: Overlay) -> bool:
    """Whether a node's output is sure to share no storage with its inputs."""
    if node.op == "call_module":
        return is_fresh_module(view.module(node))
    if node.op == "call_function":
        return is_fresh_function(node.target) and not written_by(node, view)
    return node.op != "call_method" or node.target in _FRESH_CALLS


def is_fresh_function(function: Any) -> bool:
    """Whether a function gives new storage, unless it is told where to write."""
    return base_name(function) in _FRESH_CALLS and is_torch(function)


def is_fresh_module(module: nn.Module | None) -> bool:
    """Whether a module's output is sure to share no storage with its input."""
    kind: Any = type(module)  # mypy takes the hash of a class for that of its instances
    return _is_fresh_kind(kind) and not writes_in_place(module)


@functools.lru_cache(maxsize=4096)
def _is_fresh_kind(kind: type[Any]) -> bool:
    known = (each for each in kind.__mro__ if each.__module__ in _FRESH_MODULES)
    base = next(known, None)
    return base is not None and base is not nn.Identity and overridden(kind, base) is None


def hands_on(module: nn.Module | None) -> bool:
    """Whether a module in eval mode is sure to return its very input."""
    return isinstance(module, (nn.Identity, nn.modules.dropout._DropoutNd))


def writes_in_place(module: nn.Module | None) -> bool:
    """Whether a module, or one in it, says that it writes to its input."""
    if module is None or not module._modules:
        return module is not None and module.__dict__.get("inplace") is True
    return any(each.__dict__.get("inplace") is True for each in module.modules())


def base_name(function: Any) -> str:
    """What a function or operator is called, without its namespace and overload."""
    if isinstance(function, torch._ops.OpOverload):
        return str(function._schema.name).rpartition("::")[2]
    return getattr(function, "__name__", "")


@functools.lru_cache(maxsize=4096)
def is_torch(function: Any) -> bool:
    """Whether a function is one of torch, or an operator of Python."""
    module = getattr(function, "__module__", None) or "torch"
    return module == "_operator" or module.partition(".")[0] == "torch"


@functools.lru_cache(maxsize=4096)
def _mutable_arguments(overload: torch._ops.OpOverload) -> tuple[str, ...]:
    written = [a.name for a in overload._schema.arguments if a.alias_info and a.alias_info.is_write]
    return tuple("input" if name == "self" else name for name in written)


def _is_in_place_name(name: str) -> bool:
    return (name.endswith("_") and not name.endswith("__")) or name in _IN_PLACE_METHODS


@functools.lru_cache(maxsize=4096)
def _writes_first_argument(function: Any) -> bool:
    return function in IN_PLACE_OPERATORS or _is_in_place_name(getattr(function, "__name__", ""))


@functools.lru_cache(maxsize=4096)
def _has_inplace_argument(function: Any) -> bool:
    code = getattr(function, "__code__", None)
    return code is not None and "inplace" in code.co_varnames[: code.co_argcount]
