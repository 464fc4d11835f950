"""What reads, keeps or changes a tensor's metadata: its shape, dtype and device."""

from __future__ import annotations

import functools
from typing import Any

from torch import fx, nn

from ..engine.match import Link
from ..module_utils.evolve import differs_in_numbers
from ..module_utils.subclassing import overridden
from .aliases import IN_PLACE_OPERATORS, base_name, is_torch
from .graph_view import GraphView

_ATTRIBUTES = frozenset({"shape", "dtype", "device", "ndim"})
_QUESTIONS = frozenset("size dim ndimension numel nelement sym_size sym_numel __len__".split())
# New tensors. Those of the first kind have the strides, too, of what they are to be like.
_LIKE = frozenset({"zeros_like", "ones_like", "full_like", "empty_like"})
_NEW = frozenset({"new_zeros", "new_ones", "new_full", "new_empty"})
# What takes from its second argument what the first is to become.
_AS = frozenset({"expand_as", "view_as", "reshape_as", "type_as", "to"})

# What gives the shape, dtype and device that it reads, or raises; under autocast, too.
KEEPING_MODULES: tuple[type[nn.Module], ...] = (
    nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm,
    nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout,
    nn.FeatureAlphaDropout, nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.LeakyReLU, nn.ELU, nn.GELU,
    nn.SiLU, nn.Mish, nn.Hardswish,
)  # fmt: skip
KEEPING_CALLS = frozenset(
    "alpha_dropout batch_norm clone contiguous detach dropout dropout1d dropout2d dropout3d elu "
    "feature_alpha_dropout gelu hardswish hardtanh leaky_relu mish relu relu6 silu".split()
)
_WRITING_NUMBERS = KEEPING_CALLS | frozenset(
    "add addcmul clamp copy div exp fill hardsigmoid masked_fill mul neg sigmoid sqrt sub tanh "
    "zero".split()
)

_LAYERS = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d,
    nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear,
)  # fmt: skip


def asks(reader: fx.Node, value: fx.Node, view: GraphView) -> bool:
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
    name = _called(reader)
    if name in _AS:
        return value in (*reader.args[1:2], reader.kwargs.get("other"))
    is_subject = value in (*reader.args[:1], reader.kwargs.get("input"))
    return is_subject and (name in _NEW or (name in _LIKE and _is(view.module(value), _LAYERS)))


def asks_sizes(reader: fx.Node) -> bool:
    """Whether a node gives nothing but an attribute or a number of a tensor's metadata."""
    if reader.target is getattr:
        return len(reader.args) > 1 and reader.args[1] in _ATTRIBUTES
    return reader.target is len or _called(reader) in _QUESTIONS


def keeps(link: Link) -> bool:
    """Whether a step always gives the shape, dtype and device of the value that it takes."""
    if link.module is not None:
        return _is(link.module, KEEPING_MODULES)
    return link.takes == "input" and _called(link.node) in KEEPING_CALLS


def same_layer(one: nn.Module | None, other: nn.Module) -> bool:
    """Whether two layers give the same shape, dtype and device, whatever they read."""
    return one is not None and _is(one, _LAYERS) and differs_in_numbers(one, other)


def may_change(write: fx.Node, view: GraphView) -> bool:
    """Whether a write in place may change more of what it writes to than numbers."""
    module = view.module(write)
    if module is not None:
        writing = (each for each in module.modules() if each.__dict__.get("inplace") is True)
        return not all(_is(each, KEEPING_MODULES) for each in writing)
    if write.target in IN_PLACE_OPERATORS:
        return False
    return "out" in write.kwargs or _called(write).removesuffix("_") not in _WRITING_NUMBERS


def _called(node: fx.Node) -> str:
    """The name of a method, or of a function of torch."""
    if node.op == "call_method":
        return str(node.target)
    is_known = node.op == "call_function" and is_torch(node.target)
    return base_name(node.target) if is_known else ""


def _is(module: nn.Module | None, kinds: tuple[type[nn.Module], ...]) -> bool:
    kind: Any = type(module)  # mypy takes the hash of a class for that of its instances
    return _behaves_as(kind, kinds)


@functools.lru_cache(maxsize=4096)
def _behaves_as(kind: type[Any], kinds: tuple[type[nn.Module], ...]) -> bool:
    base = next((each for each in kind.__mro__ if each in kinds), None)
    return base is not None and overridden(kind, base) is None
