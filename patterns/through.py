"""Fold a norm into the layer behind it where its values are moved or averaged in between."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import fxrewrite as fxr

from . import norms
from .affine import Layer, in_channels, reading_scaled, spatial_rank
from .backward import or_none, uneven
from .forward import alike
from .norms import Norm
from .spellings import FLATTEN, LAY_OUT, PERMUTE, Idle, aten

_POOLS = {
    1: (nn.AdaptiveAvgPool1d, F.adaptive_avg_pool1d, aten.adaptive_avg_pool1d.default),
    2: (nn.AdaptiveAvgPool2d, F.adaptive_avg_pool2d, aten.adaptive_avg_pool2d.default),
    3: (nn.AdaptiveAvgPool3d, F.adaptive_avg_pool3d, aten.adaptive_avg_pool3d.default),
}
_MAX_POOLS = {1: F.adaptive_max_pool1d, 2: F.adaptive_max_pool2d, 3: F.adaptive_max_pool3d}
_MEAN = (torch.mean, "mean", aten.mean.dim)
_PAD = (F.pad, aten.pad.default)
_PADS = (
    nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d, nn.ReplicationPad1d,
    nn.ReplicationPad2d, nn.ReplicationPad3d, nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d,
)  # fmt: skip
_MOVES = (
    nn.Flatten, *FLATTEN, *PERMUTE, torch.transpose, "transpose", aten.transpose.int,
    *LAY_OUT,
)  # fmt: skip
# Sizes that no layer is taken to ask for, so that what depends on them shows.
_SIZES = (17, 19, 23)


@fxr.pattern(anchor="norm")
class NormMoved:
    """A norm whose values get other places, or are averaged, before a layer reads them."""

    x: fxr.Value
    norm: Norm
    moved: tuple[fxr.Call, ...] = fxr.call(
        Idle, *_MOVES, *_MEAN, *_PAD, *_PADS, *_POOLS[1], *_POOLS[2], *_POOLS[3],
        chain="input", side_inputs=False,
    )  # fmt: skip
    layer: (
        nn.Conv1d | nn.Conv2d | nn.Conv3d
        | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d | nn.Linear
    )  # fmt: skip


def same_types(m: NormMoved) -> str | fxr.Declined | None:
    """The layer must be able to read what the norm reads."""
    if not m.moved:
        return fxr.Declined("nothing stands between", "missed")
    if norms.rest_of(m.norm) is not None:
        return f"the {type(m.norm).__name__} ends with an activation, which the layer can't do"
    if m.x.dtype not in (None, m.layer.weight.dtype):
        return f"the norm reads {m.x.dtype}, and the layer reads {m.layer.weight.dtype}"
    return norms.may_lack_batch(m.norm, m.x) or alike(m.layer, m.norm)


def keeps_channels(m: NormMoved) -> str | None:
    """All of one input of the layer must be of one channel of the norm, whatever the sizes are."""
    found = _vectors(m)
    return found if isinstance(found, str) else uneven(m.layer, found[1])


@fxr.rule(where=[same_types, keeps_channels], quiet=True)
def fold_norm_moved(m: NormMoved) -> fxr.Revise:
    """Scale and shift in the layer, for each of its inputs, what the norm would of its channel."""
    found = _vectors(m)
    assert not isinstance(found, str)
    scale, shift = found
    return fxr.Revise(norm=None, layer=reading_scaled(m.layer, scale, or_none(shift)))


def _vectors(m: NormMoved) -> norms.Vectors | str:
    found = norms.vectors(m.norm)
    if isinstance(found, str):
        return found
    channels = _channels(m, len(found[0]))
    if isinstance(channels, str):
        return channels
    scale, shift = found
    return scale[channels.to(scale.device)], shift[channels.to(shift.device)]


def _channels(m: NormMoved, count: int) -> torch.Tensor | str:
    """The channel of the norm that each input of the layer is of, or why that is not known."""
    dims = [each for each in range(4) if norms.reads_dims(m.norm, each)]
    if m.x.rank is not None:
        dims = [m.x.rank - 2]
    if len(dims) != 1 or dims[0] < 0:
        return f"the rank of what the norm reads is not known; {m.x.unknown}"
    # By the places of channels alone; each of these sizes, if it leads to the layer's own, tells.
    fitting = [in_channels(m.layer) // count] + [1] * (dims[0] - 1)
    sizes = [fitting, fitting[::-1], [*_SIZES[: dims[0]]], [*_SIZES[: dims[0]]][::-1]]
    found, why = list[torch.Tensor](), "the inputs of the layer are no channels of the norm"
    for size in sizes if dims[0] else [[]]:
        places = torch.arange(count, dtype=torch.float64).view(1, -1, *([1] * dims[0]))
        read = _moved(m, places.expand(2, -1, *size[: dims[0]]))
        if isinstance(read, str):
            why = read
        elif (axis := _axis(m.layer, read)) is not None:
            by_input = read.movedim(axis, 0).flatten(1)
            if not bool((by_input == by_input[:, :1]).all()):
                return "an input of the layer is of several channels of the norm"
            found.append(by_input[:, 0].long())
    if not found:
        return why
    if any(not torch.equal(each, found[0]) for each in found):
        return "of which channel an input of the layer is depends on sizes"
    return found[0]


def _axis(layer: Layer, read: torch.Tensor) -> int | None:
    """The dimension of a layer's inputs in what it reads, None where it would not take that."""
    spatial = spatial_rank(layer)
    axis = 1 if spatial else read.dim() - 1
    fits = not spatial or read.dim() == spatial + 2
    return axis if fits and read.shape[axis] == in_channels(layer) else None


def _moved(m: NormMoved, places: torch.Tensor) -> torch.Tensor | str:
    """What becomes of the places of channels by the steps in between, or why that is not known."""
    for call in m.moved:
        try:
            made = _step(call, places)
        except (RuntimeError, IndexError, TypeError, ValueError) as error:
            return f"what is between does not take such a value: {str(error).splitlines()[0]}"
        if isinstance(made, str):
            return made
        places = made
    return places


def _step(call: fxr.Call, places: torch.Tensor) -> torch.Tensor | str:
    function: Any = call.function
    given = dict(call.kwargs)
    kind = type(function) if isinstance(function, nn.Module) else function
    if isinstance(function, Idle):
        return places
    dims = next((k for k, pool in _POOLS.items() if kind in pool), None)
    if dims is not None:
        size: Any = given.get("output_size", getattr(function, "output_size", None))
        over = tuple(range(-dims, 0))
        pooled = _MAX_POOLS[dims](places, size)
        return pooled if _is_even(places, over) else "it averages over channels of the norm"
    if kind in _MEAN:
        dim, keepdim = given.pop("dim", None), given.pop("keepdim", False)
        if dim is None or given:
            return "it averages over all, or in another type"
        return places.amax(dim, keepdim) if _is_even(places, dim) else "it averages over channels"
    if kind in _PAD and given.get("mode", "constant") not in ("reflect", "replicate", "circular"):
        return "it pads with a number, which the norm does not scale or shift"
    if isinstance(function, str):
        made: torch.Tensor = getattr(places, function)(**given)
        return made
    made = function(places, **given)
    return made


def _is_even(places: torch.Tensor, dims: Any) -> bool:
    """Whether all that is averaged is of one channel."""
    return bool((places.amax(dims) == places.amin(dims)).all())
