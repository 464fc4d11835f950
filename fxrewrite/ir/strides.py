"""Who can tell how a value lies in memory: what it shares storage with, and by which strides."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from ..module_utils.hooks import runs_its_forward_alone
from .aliases import hands_on, is_fresh, written_by
from .describe import describe
from .inplace_activations import can_be_out_of_place
from .op_traits import Trait, called_name, traits_of_module, traits_of_name
from .overlay import Overlay
from .tensor_metadata import asks_sizes


def strides_observable(value: fx.Node, view: Overlay, dim: int, keeps_sizes: bool) -> str | None:
    """Why a sibling's value can't be a part of a larger one, or None.

    What only computes with the numbers can't tell. What writes in place, returns the value to the
    caller or asks for its strides can; of what is not known here, that is assumed. An activation
    that need not write in place will be made to write elsewhere. What is split already is left so,
    since it would be split twice.

    The value is contiguous, in storage of its own. It would be a part along the dimension `dim`;
    with `keeps_sizes` its other sizes are those of what was read for it.
    """
    # The second entry says whether strides may differ, and not only what shares the storage.
    pending, seen = [(value, True)], {value}
    while pending:
        node, strided = pending.pop()
        for reader in node.users:
            is_view = Trait.VIEW in _traits(reader)
            if node is value and can_be_out_of_place(reader, value, view):
                continue
            if node in written_by(reader, view):
                return f"{describe(reader, view)} writes in place to {_what(node, value)}"
            if reader.op == "output":
                return f"{_what(node, value)} is returned, and the caller could tell the difference"
            if _only_computes(reader, view) or asks_sizes(reader):
                continue
            if node is value and Trait.SPLITS in _traits(reader):
                return f"its output is split already, by {describe(reader, view)}"
            if is_view and strided:
                if value.meta.get("val") is None:
                    return (
                        f"whether {describe(reader, view)} only splits the last dimension is not "
                        "known; example_inputs would decide it"
                    )
                if node is not value or not _splits(reader, value, view, dim, keeps_sizes):
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
                pending.append((reader, strided and called_name(reader) != "contiguous"))
    return None


def _what(node: fx.Node, value: fx.Node) -> str:
    return "its output" if node is value else f"a view of its output, {node.name},"


def _traits(node: fx.Node) -> Trait:
    return traits_of_name(called_name(node))


def _only_computes(node: fx.Node, view: Overlay) -> bool:
    """Whether a node makes new storage, by the numbers that it reads alone."""
    if not is_fresh(node, view):
        return False
    module = view.module(node)
    return module is None or runs_its_forward_alone(module)


def _is_indifferent(node: fx.Node, view: Overlay) -> bool:
    module = view.module(node)
    if module is None:
        return Trait.ANY_STRIDES in _traits(node)
    is_known = hands_on(module) or Trait.ANY_STRIDES in traits_of_module(module)
    return is_known and runs_its_forward_alone(module)


def _splits(reader: fx.Node, value: fx.Node, view: Overlay, dim: int, keeps_sizes: bool) -> bool:
    """Whether a view only splits the last dimension of a value, whatever its other sizes are.

    The others lie in memory as they did if the value is a part of a wider one, so that they can be
    joined and split in any way.
    """
    known, sizes = value.meta.get("val"), _sizes(reader)
    width = known.shape[-1] if isinstance(known, torch.Tensor) and known.dim() else None
    if known is None or dim != -1 or not isinstance(width, int):
        return False
    product = 1
    for at in range(len(sizes) - 1, -1, -1):
        if sizes[at] == -1:  # what is left, which is the rest of the last dimension
            before = [
                _is_size(each, i, value, view, keeps_sizes) for i, each in enumerate(sizes[:at])
            ]
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


def _is_size(size: Any, dim: int, value: fx.Node, view: Overlay, keeps_sizes: bool) -> bool:
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
    elif called_name(size) not in ("size", "sym_size"):
        return False
    known = [value, *value.all_input_nodes[:keeps_sizes]]
    return at == (dim,) and of[0] in known


def _asks_for_shape(node: fx.Node) -> bool:
    given = node.args[1:]
    return (
        given == ("shape",) if node.target is getattr else called_name(node) == "size" and not given
    )
