"""What reads, keeps or changes a tensor's metadata: its shape, dtype and device."""

from __future__ import annotations

from torch import fx, nn

from ..module_utils.evolve import differs_in_numbers
from .op_traits import (
    IN_PLACE_OPERATORS,
    METADATA,
    Trait,
    called_name,
    traits_in_place,
    traits_of_module,
    traits_of_name,
)
from .overlay import Overlay


def reads_metadata_only(reader: fx.Node, value: fx.Node, view: Overlay) -> bool:
    """Whether a node reads no more of a value than its shape, dtype and device.

    What has the strides of the value as well counts where a layer made it: that lies in memory in
    one of torch's own formats, which what keeps the shape keeps.
    """
    read: list[fx.Node] = []
    fx.node.map_arg((reader.args, reader.kwargs), read.append)
    if read.count(value) != 1:
        return False
    if asks_sizes(reader):
        return True
    traits = traits_of_name(called_name(reader))
    if Trait.AS_OTHER in traits:
        return value in (*reader.args[1:2], reader.kwargs.get("other"))
    if value not in (*reader.args[:1], reader.kwargs.get("input")):
        return False
    is_layers = Trait.LAYER in traits_of_module(view.module(value))
    return Trait.NEW in traits or (Trait.LIKE in traits and is_layers)


def asks_sizes(reader: fx.Node) -> bool:
    """Whether a node gives nothing but an attribute or a number of a tensor's metadata."""
    if reader.target is getattr:
        return len(reader.args) > 1 and reader.args[1] in METADATA
    return reader.target is len or Trait.ASKS in traits_of_name(called_name(reader))


def keeps(node: fx.Node, module: nn.Module | None, takes: object) -> bool:
    """Whether a step always gives the shape, dtype and device of the value that it takes.

    `module` is the one that it calls, if it calls one, and `takes` the argument of that value.
    """
    if module is not None:
        return Trait.KEEPS in traits_of_module(module)
    return takes == "input" and Trait.KEEPS in traits_of_name(called_name(node))


def same_layer(one: nn.Module | None, other: nn.Module) -> bool:
    """Whether two layers give the same shape, dtype and device, whatever they read."""
    is_layer = one is not None and Trait.LAYER in traits_of_module(one)
    return is_layer and one is not None and differs_in_numbers(one, other)


def may_change(write: fx.Node, view: Overlay) -> bool:
    """Whether a write in place may change more of what it writes to than numbers."""
    module = view.module(write)
    if module is not None:
        writing = (each for each in module.modules() if each.__dict__.get("inplace") is True)
        return not all(Trait.KEEPS in traits_of_module(each) for each in writing)
    if write.target in IN_PLACE_OPERATORS:
        return False
    return "out" in write.kwargs or Trait.IN_PLACE_KEEPS not in traits_in_place(called_name(write))
