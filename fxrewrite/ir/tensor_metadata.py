"""What reads, keeps or changes a tensor's metadata: its shape, dtype, device and strides."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn

from ..module_utils.evolve import differs_in_numbers
from ..module_utils.hooks import runs_its_forward_alone
from .aliases import is_fresh, written_by
from .describe import describe
from .inplace_activations import can_be_out_of_place
from .op_traits import traits_of, traits_of_module
from .overlay import Overlay


def reads_metadata_only(reader: fx.Node, value: fx.Node, view: Overlay) -> bool:
    """Whether a node reads no more of a value than its shape, dtype and device.

    What has the strides of the value as well counts where a layer made it: that lies in memory in
    one of torch's own formats, which what keeps the shape keeps.
    """
    asks = traits_of(reader, view.module(reader)).asks
    if not asks:
        return False
    read: list[fx.Node] = []
    fx.node.map_arg((reader.args, reader.kwargs), read.append)
    if read.count(value) != 1:
        return False
    if asks == "other":
        return value in (*reader.args[1:2], reader.kwargs.get("other"))
    if asks == "metadata":
        return True
    made_by_layer = traits_of(value, view.module(value)).layer
    is_subject = value in (*reader.args[:1], reader.kwargs.get("input"))
    return is_subject and (asks == "new" or made_by_layer)


def keeps(node: fx.Node, module: nn.Module | None, takes: str | tuple[str, ...]) -> bool:
    """Whether a call always gives the shape, dtype and device of what it takes by that argument."""
    traits = traits_of(node, module)
    return traits.keeps == "metadata" and (module is not None or takes == "input")


def same_layer(one: nn.Module | None, other: nn.Module) -> bool:
    """Whether two layers give the same shape, dtype and device, whatever they read."""
    return one is not None and traits_of_module(one).layer and differs_in_numbers(one, other)


def may_change(write: fx.Node, view: Overlay) -> bool:
    """Whether a write in place may change more of what it writes to than numbers."""
    module = view.module(write)
    if module is None:
        return "out" in write.kwargs or not traits_of(write, None).pointwise
    writing = (each for each in module.modules() if each.__dict__.get("inplace") is True)
    return not all(traits_of_module(each).keeps == "metadata" for each in writing)


def strides_observable(value: fx.Node, view: Overlay, dim: int, keeps_sizes: bool) -> str | None:
    """Why a sibling's value can't be a part of a larger one, or None.

    What only computes with the numbers can't tell. What writes in place, returns the value to the
    caller or asks for its strides can; of what is not known here, that is assumed. An activation
    that need not write in place will make new storage. What is split already is left so, since it
    would be split twice.

    Args:
        value: a value that is contiguous, in storage of its own.
        view: the graph.
        dim: the dimension along which it would be a part.
        keeps_sizes: whether its other sizes are those of what the sibling reads.
    """
    # The second entry says whether strides may differ, and not only what shares the storage.
    pending, seen = [(value, True)], {value}
    while pending:
        node, strided = pending.pop()
        for reader in node.users:
            module = view.module(reader)
            traits = traits_of(reader, module)
            if node is value and can_be_out_of_place(reader, value, view):
                continue
            if node in written_by(reader, view):
                return f"{describe(reader, view)} writes in place to {_what(node, value)}"
            if reader.op == "output":
                return f"{_what(node, value)} is returned, and the caller could tell the difference"
            is_plain = module is None or runs_its_forward_alone(module)
            if (is_plain and is_fresh(reader, view)) or traits.asks == "metadata":
                continue
            if node is value and traits.strides == "split":
                return f"its output is split already, by {describe(reader, view)}"
            if traits.strides == "fitting" and strided:
                if value.meta.get("val") is None:
                    return (
                        f"whether {describe(reader, view)} only splits the last dimension is not "
                        f"known; {view.unknown}"
                    )
                if node is not value or not _splits(reader, value, view, dim, keeps_sizes):
                    return (
                        f"{describe(reader, view)} may need {_what(node, value)} to be contiguous"
                    )
            elif traits.strides == "observed" or not is_plain:
                return (
                    f"{describe(reader, view)} might tell that {_what(node, value)} is a part of a "
                    "larger tensor"
                )
            if reader not in seen:
                seen.add(reader)
                pending.append((reader, strided and traits.strides != "contiguous"))
    return None


def _what(node: fx.Node, value: fx.Node) -> str:
    return "its output" if node is value else f"a view of its output, {node.name},"


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
        if not isinstance(shape, fx.Node) or not _is_shape(shape):
            return False
        of = shape.args[:1]
    elif size.target is getattr or traits_of(size, None).gives != "size":
        return False
    known = [value, *value.all_input_nodes[:keeps_sizes]]
    return at == (dim,) and of[0] in known


def _is_shape(node: fx.Node) -> bool:
    """Whether a node gives all sizes of a value, as `x.shape` and `x.size()` do."""
    is_whole = node.target is getattr or len(node.args) == 1
    return traits_of(node, None).gives == "size" and is_whole
