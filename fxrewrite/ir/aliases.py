"""Which nodes write in place, and which may hand on the storage they were given."""

from __future__ import annotations

import functools
import operator
from typing import Any

from torch import fx, nn

from ..module_utils.torch_private import OpOverload, written_arguments
from .op_traits import (
    IN_PLACE_OPERATORS,
    Trait,
    base_name,
    has_inplace_argument,
    is_in_place_name,
    is_torch,
    traits_of_function,
    traits_of_module,
    traits_of_name,
    updated_statistics,
    writes_first_argument,
)
from .overlay import Overlay


def written_by(node: fx.Node, view: Overlay) -> list[fx.Node]:
    """The values that a node writes to in place."""
    target = node.target
    if node.op == "call_module":
        return node.all_input_nodes[:1] if writes_in_place(view.module(node)) else []
    if node.op == "call_method":
        return node.all_input_nodes[:1] if is_in_place_name(str(target)) else []
    if node.op != "call_function":
        return []
    names: tuple[str, ...] = ()
    if isinstance(target, OpOverload):
        known = _written_arguments(target)
        names = tuple(view.inputs(node)) if known is None else known
    if Trait.UPDATES in traits_of_function(target):
        names = (*names, *updated_statistics(view.arguments(node)))
    inputs = view.inputs(node) if names else {}
    written = [inputs[name] for name in names if name in inputs]
    if isinstance(target, OpOverload):
        return written
    fx.node.map_arg(node.kwargs.get("out"), written.append)
    if writes_first_argument(target) or (
        has_inplace_argument(target) and view.arguments(node).get("inplace")
    ):
        written += node.all_input_nodes[:1]
    return written


def lends(node: fx.Node, view: Overlay) -> list[fx.Node]:
    """The values whose storage a node's output may share."""
    if is_fresh(node, view):
        return []
    return written_by(node, view) if _returns_what_it_writes(node) else node.all_input_nodes


def _returns_what_it_writes(node: fx.Node) -> bool:
    name = str(node.target)
    if node.op == "call_function":
        if node.target in IN_PLACE_OPERATORS:
            return node.target is not operator.setitem
        name = base_name(node.target) if is_torch(node.target) else ""
    is_in_place = node.op in ("call_function", "call_method") and name.endswith("_")
    return is_in_place and Trait.FRESH in traits_of_name(name[:-1])


def is_fresh(node: fx.Node, view: Overlay) -> bool:
    """Whether a node's output is sure to share no storage with its inputs."""
    if node.op == "call_module":
        return is_fresh_module(view.module(node))
    if node.op == "call_function":
        return is_fresh_function(node.target) and not written_by(node, view)
    return node.op != "call_method" or Trait.FRESH in traits_of_name(str(node.target))


def is_fresh_function(function: Any) -> bool:
    """Whether a function gives new storage, unless it is told where to write."""
    return Trait.FRESH in traits_of_function(function)


def is_fresh_module(module: nn.Module | None) -> bool:
    """Whether a module's output is sure to share no storage with its input."""
    return Trait.FRESH in traits_of_module(module) and not writes_in_place(module)


def hands_on(module: nn.Module | None) -> bool:
    """Whether a module in eval mode is sure to return its very input."""
    return Trait.HANDS_ON in traits_of_module(module)


def writes_in_place(module: nn.Module | None) -> bool:
    """Whether a module, or one in it, says that it writes to its input."""
    if module is None or not module._modules:
        return module is not None and module.__dict__.get("inplace") is True
    return any(each.__dict__.get("inplace") is True for each in module.modules())


@functools.lru_cache(maxsize=4096)
def _written_arguments(overload: OpOverload) -> tuple[str, ...] | None:
    names = written_arguments(overload)
    return names and tuple("input" if name == "self" else name for name in names)
