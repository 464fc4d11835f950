"""Fold into a layer what follows it: a norm, or a sum or product with a constant."""

from __future__ import annotations

import attrs
import torch
from torch import nn

import fxrewrite as fxr

from . import constants, norms
from .affine import Layer, out_channels, scaled_and_shifted, spatial_rank
from .norms import Norm
from .own_forward import OwnForward
from .spellings import FLATTEN, LAY_OUT, PERMUTE, RESHAPE, Idle

_HALF = (torch.float16, torch.bfloat16)


@fxr.pattern(anchor="norm")
class LayerNormed:
    """A layer whose only reader is a norm.

    What does nothing may stand between, and what makes one dimension of all but the features.
    """

    layer: (
        nn.Conv1d | nn.Conv2d | nn.Conv3d
        | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d | nn.Linear | OwnForward
    )  # fmt: skip
    idle: tuple[Idle, ...]
    laid: tuple[fxr.Call, ...] = fxr.call(*LAY_OUT, chain="input", side_inputs=False)
    made: fxr.Value
    rows: tuple[fxr.Call, ...] = fxr.call(*FLATTEN, *RESHAPE, chain="input")
    between: fxr.Value
    norm: Norm


@fxr.pattern(anchor="by")
class LayerScaled:
    """A layer whose output meets a constant, its dimensions permuted first or not."""

    layer: (
        nn.Conv1d | nn.Conv2d | nn.Conv3d
        | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d | nn.Linear | OwnForward
    )  # fmt: skip
    idle: tuple[Idle, ...]
    permute: fxr.Call | None = fxr.call(*PERMUTE, chain="input", side_inputs=False)
    between: fxr.Value
    by: fxr.Call = fxr.call(*constants.ARITHMETIC, side_inputs=False)


def same_channels(m: LayerNormed) -> str | None:
    """What the norm takes for channels must be what the layer makes."""
    channels, between = out_channels(m.layer), m.between
    if m.rows and not isinstance(m.layer, nn.Linear):
        return f"between them, what the {type(m.layer).__name__} makes gets another shape"
    made = m.made
    for call in m.rows:
        rank = _rank_of_rows(call, made, channels)
        if isinstance(rank, str):
            return rank
        made = between = attrs.evolve(made, rank=rank)
    return along_channels(m.layer, m.norm, between, channels)


def _rank_of_rows(call: fxr.Call, made: fxr.Value, features: int) -> int | str:
    """The rank that a value gets which has its features last and keeps them so, or why it may not.

    Args:
        call: a flatten or reshape.
        made: the value.
        features: how many there are.
    """
    given, rank = call.kwargs, made.rank
    size = given.get("size", given.get("shape"))
    if size is not None:
        # Where the last size is that of the features, the others are all the others'.
        if isinstance(size, tuple | list) and size and size[-1] == features:
            return len(size)
        return f"what is between is reshaped to other than rows of {features}"
    start, end = given.get("start_dim", 0), given.get("end_dim", -1)
    if given.keys() - {"start_dim", "end_dim"} or not all(type(e) is int for e in (start, end)):
        return "what is between is flattened in a way that is not known"
    if (start, end) == (0, -2):
        return 2
    if rank is None:
        return f"whether what is flattened between them are features is not known; {made.unknown}"
    start, end = start % rank, end % rank
    if start < end == rank - 1:
        return "the features are flattened with other dimensions between them"
    joined: int = max(end - start, 0)
    return rank - joined


def along_channels(layer: Layer, norm: nn.Module, between: fxr.Value, channels: int) -> str | None:
    """Why the dimension along which a norm scales is not that of a layer's channels, or None."""
    kinds, rank = (type(norm).__name__, type(layer).__name__), between.rank
    wanted = spatial_rank(layer)
    if not norms.reads_dims(norm, wanted):
        what = "channels" if wanted else "features"
        return f"a {kinds[0]} does not normalise the {what} of a {kinds[1]}"
    if rank is None and wanted == 0:
        return (
            f"whether a {kinds[0]} normalises the features of a {kinds[1]} depends on the rank of "
            f"what is between, which is not known; {between.unknown}"
        )
    if rank is not None and rank != wanted + 2:
        return (
            f"a {kinds[0]} normalises dimension 1 of the {rank}-d tensor between, which is not "
            f"that of the {kinds[1]}'s channels"
        )
    found = norms.vectors(norm)
    if isinstance(found, str):
        return found
    if len(found[0]) != channels:
        return f"{channels} channels can't be normalised by {len(found[0])} features"
    return None


def same_types(m: LayerNormed) -> str | None:
    """The types must be such that the folded layer's result has the norm's type."""
    return alike(m.layer, m.norm)


def alike(layer: Layer, norm: nn.Module) -> str | None:
    """Why a layer and a norm are not of one type and on one device, or None."""
    own, held = layer.weight, norms.tensors_of(norm)
    devices = {each.device for each in (own, *held)}
    if len(devices) > 1:
        return f"their tensors are on {' and '.join(sorted(map(str, devices)))}"
    found = {each.dtype for each in held}
    if not found and isinstance(reason := norms.vectors(norm), str):
        return reason
    # Torch lets a batch norm in float32 follow a layer in half precision, and gives half.
    mixed = norms.takes_half(norm) and found == {torch.float32} and own.dtype in _HALF
    if found == {own.dtype} or mixed:
        return None
    types = " and ".join(sorted(str(each).removeprefix("torch.") for each in found))
    return (
        f"the layer is in {str(own.dtype).removeprefix('torch.')} and the norm in "
        f"{types or 'no type, since it holds no tensors'}"
    )


@fxr.rule(where=[same_types, same_channels])
def fold_norm(m: LayerNormed) -> fxr.Replace | fxr.Revise:
    """Scale and shift in the layer what the norm would; an activation of the norm's own stays."""
    found = norms.vectors(m.norm)
    assert not isinstance(found, str)
    folded = scaled_and_shifted(m.layer, *found)
    rest = norms.rest_of(m.norm)
    if rest is None and not m.rows and not m.laid:
        return fxr.Replace(folded, slot="layer")
    return fxr.Revise(layer=folded, idle=None, norm=rest)


def per_channel(m: LayerScaled) -> str | None:
    """The constant must do the same to all of a channel, and change nothing but numbers."""
    found = _vectors(m)
    return found if isinstance(found, str) else None


@fxr.rule(where=[per_channel], quiet=True)
def fold_constant(m: LayerScaled) -> fxr.Revise:
    """Scale and shift in the layer what the constant would; a permutation between them stays."""
    found = _vectors(m)
    assert not isinstance(found, str)
    return fxr.Revise(layer=scaled_and_shifted(m.layer, *found), idle=None, by=None)


def _vectors(m: LayerScaled) -> constants.Vectors | str:
    from_end, rank = spatial_rank(m.layer) + 1, m.between.rank
    if m.permute is not None:
        dims = m.permute.kwargs.get("dims")
        if not isinstance(dims, tuple | list) or not all(isinstance(each, int) for each in dims):
            return "the dimensions are permuted in a way that is not known"
        rank = len(dims)
        if rank < from_end:
            return (
                f"the dimensions of a {rank}-d tensor are permuted, which the layer does not make"
            )
        from_end = rank - [each % rank for each in dims].index(rank - from_end)
    return constants.vectors(
        m.by, where(m.layer, out_channels(m.layer), from_end, attrs.evolve(m.between, rank=rank))
    )


def where(layer: Layer, channels: int, from_end: int, value: fxr.Value) -> constants.Where:
    """What a constant meets beside a layer."""
    weight = layer.weight
    return constants.Where(
        channels, from_end, value.rank, value.unknown, weight.dtype, weight.device
    )
