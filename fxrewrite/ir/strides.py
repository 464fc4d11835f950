"""Who can tell how a value lies in memory: what it shares storage with, and by which strides."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn

from ..module_utils.hooks import runs_its_forward_alone
from ..rules.spec import Step
from .aliases import base_name, hands_on, is_fresh, is_torch, written_by
from .describe import describe
from .graph_view import GraphView
from .inplace_activations import can_be_calmed
from .tensor_metadata import asks_sizes

# What gives the same numbers whatever the strides are, in new storage or a view.
_INDIFFERENT = frozenset(
    "bfloat16 chunk contiguous detach double dropout einsum expand flatten float getitem half "
    "masked_fill movedim narrow permute repeat reshape select split split_with_sizes squeeze "
    "swapaxes t to transpose type unbind unflatten unsqueeze where".split()
)
_INDIFFERENT_MODULES = (nn.Flatten, nn.Unflatten)
_SPLITS = frozenset({"chunk", "split", "split_with_sizes"})
_VIEWS = frozenset({"view", "_unsafe_view"})


def told_apart(value: fx.Node, step: Step, view: GraphView) -> str | None:
    """Why a sibling's value can't be a part of a larger one, or None.

    What only computes with the numbers can't tell. What writes in place, returns the value to the
    caller or asks for its strides can; of what is not known here, that is assumed. An activation
    that need not write in place will be calmed. What is split already is left so, since it would be
    split twice.

    Args:
        value: a value that is contiguous, in storage of its own.
        step: the siblings' step, which has the dimension along which it would be a part.
        view: the graph.
    """
    # The second entry says whether strides may differ, and not only what shares the storage.
    pending, seen = [(value, True)], {value}
    while pending:
        node, strided = pending.pop()
        for reader in node.users:
            is_view = _name(reader) in _VIEWS
            if node is value and can_be_calmed(reader, value, view):
                continue
            if node in written_by(reader, view):
                return f"{describe(reader, view)} writes in place to {_what(node, value)}"
            if reader.op == "output":
                return f"{_what(node, value)} is returned, and the caller could tell the difference"
            if _only_computes(reader, view) or asks_sizes(reader):
                continue
            if node is value and _name(reader) in _SPLITS:
                return f"its output is split already, by {describe(reader, view)}"
            if is_view and strided:
                if value.meta.get("val") is None:
                    return (
                        f"whether {describe(reader, view)} only splits the last dimension is not "
                        "known; example_inputs would decide it"
                    )
                if node is not value or not _splits(reader, value, step, view):
                    return (
                        f"{describe(reader, view)} may need {_what(node, value)} to be contiguous"
                    )
            elif not is_view and not _is_indifferent(reader, view):
                return (
                    f"{describe(reader, view)} might tell that {_what(node, value)} is a part of a "
                    "larger tensor"
                )
            if reader not in seen:
                seen.add(reader)
                pending.append((reader, strided and _name(reader) != "contiguous"))
    return None


def _what(node: fx.Node, value: fx.Node) -> str:
    return "its output" if node is value else f"a view of its output, {node.name},"


def _name(node: fx.Node) -> str:
    if node.op == "call_method":
        return str(node.target)
    is_known = node.op == "call_function" and is_torch(node.target)
    return base_name(node.target) if is_known else ""


def _only_computes(node: fx.Node, view: GraphView) -> bool:
    """Whether a node makes new storage, by the numbers that it reads alone."""
    if not is_fresh(node, view):
        return False
    module = view.module(node)
    return module is None or runs_its_forward_alone(module)


def _is_indifferent(node: fx.Node, view: GraphView) -> bool:
    module = view.module(node)
    if module is None:
        return _name(node) in _INDIFFERENT
    is_known = hands_on(module) or type(module) in _INDIFFERENT_MODULES
    return is_known and runs_its_forward_alone(module)


def _splits(reader: fx.Node, value: fx.Node, step: Step, view: GraphView) -> bool:
    """Whether a view only splits the last dimension of a value, whatever its other sizes are.

    The others lie in memory as they did if the value is a part of a wider one, so that they can be
    joined and split in any way.
    """
    known, sizes = value.meta.get("val"), _sizes(reader)
    width = known.shape[-1] if isinstance(known, torch.Tensor) and known.dim() else None
    if known is None or step.dim != -1 or not isinstance(width, int):
        return False
    product = 1
    for at in range(len(sizes) - 1, -1, -1):
        if sizes[at] == -1:  # what is left, which is the rest of the last dimension
            before = [_is_size(each, i, value, step, view) for i, each in enumerate(sizes[:at])]
            return len(before) == known.dim() - 1 and all(before)
        if not isinstance(sizes[at], int):
            return False
        product *= sizes[at]
        if product == width:
            return True
    return False


def _sizes(reader: fx.Node) -> Sequence[Any]:
    sizes = reader.args[1:]
    if len(sizes) == 1 and isinstance(sizes[0], list | tuple):
        sizes = tuple(sizes[0])
    return () if reader.kwargs else sizes


def _is_size(size: Any, dim: int, value: fx.Node, step: Step, view: GraphView) -> bool:
    """Whether a number is the size of that dimension of a value, whatever the value is."""
    if isinstance(size, int):
        known = value.meta["val"].shape[dim]  # to compare a symbol would fix what it stands for
        return view.sizes_are_fixed and isinstance(known, int) and known == size
    if not isinstance(size, fx.Node):
        return False
    of, at = size.args[:1], size.args[1:]
    if size.target is operator.getitem:
        shape = size.args[0]
        if not isinstance(shape, fx.Node) or not _asks_for_shape(shape):
            return False
        of = shape.args[:1]
    elif _name(size) not in ("size", "sym_size"):
        return False
    known = [value, *value.all_input_nodes[: step.keeps_sizes]]
    return at == (dim,) and of[0] in known


def _asks_for_shape(node: fx.Node) -> bool:
    given = node.args[1:]
    return given == ("shape",) if node.target is getattr else _name(node) == "size" and not given
