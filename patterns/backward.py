"""Fold into a layer what comes before it: a norm, or a sum or product with a constant."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import fxrewrite as fxr

from . import constants, norms
from .affine import ConvNd, Layer, in_channels, reading_scaled, spatial_rank
from .forward import alike, along_channels, where
from .norms import Norm
from .spellings import Idle

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@fxr.pattern(anchor="norm")
class NormedLayer:
    """A norm whose only reader is a layer; what does nothing may stand between."""

    x: fxr.Value
    norm: Norm
    idle: tuple[Idle, ...]
    between: fxr.Value
    layer: (
        nn.Conv1d | nn.Conv2d | nn.Conv3d
        | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d | nn.Linear
    )  # fmt: skip


@fxr.pattern(anchor="by")
class ScaledLayer:
    """A value that meets a constant before a layer reads it."""

    x: fxr.Value
    by: fxr.Call = fxr.call(*constants.ARITHMETIC, side_inputs=False)
    idle: tuple[Idle, ...]
    between: fxr.Value
    layer: (
        nn.Conv1d | nn.Conv2d | nn.Conv3d
        | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d | nn.Linear
    )  # fmt: skip


def same_channels(m: NormedLayer) -> str | None:
    """What the norm takes for channels must be what the layer reads as such."""
    if norms.rest_of(m.norm) is not None:
        return f"the {type(m.norm).__name__} ends with an activation, which the layer can't do"
    return along_channels(m.layer, m.norm, m.between, in_channels(m.layer))


def same_input(m: NormedLayer) -> str | None:
    """The norm must make a value of the shape and type that it reads, for the layer reads that."""
    x, own = m.x, m.layer.weight.dtype
    if (reason := norms.may_lack_batch(m.norm, x)) is not None:
        return reason
    if x.shape != m.between.shape:
        return f"the norm makes a value of shape {m.between.shape} of one of shape {x.shape}"
    if x.dtype not in (None, own):
        kinds = [str(each).removeprefix("torch.") for each in (x.dtype, own)]
        return f"the norm reads {kinds[0]}, and the layer reads {kinds[1]}"
    return None


def same_types(m: NormedLayer) -> str | None:
    """The types must be such that the layer reads what the norm reads."""
    return alike(m.layer, m.norm)


def norm_reaches_all(m: NormedLayer) -> str | None:
    """Where the layer pads with zeros, it pads what the norm makes, and not what the norm reads."""
    found = norms.vectors(m.norm)
    return None if isinstance(found, str) else uneven(m.layer, found[1])


@fxr.rule(where=[same_types, same_channels, same_input, norm_reaches_all])
def fold_norm_before(m: NormedLayer) -> fxr.Replace:
    """Scale and shift in the layer what the norm before it would."""
    found = norms.vectors(m.norm)
    assert not isinstance(found, str)
    scale, shift = found
    return fxr.Replace(reading_scaled(m.layer, scale, or_none(shift)), slot="layer")


def same_value(m: ScaledLayer) -> str | None:
    """The operation must not change shape or type, since the layer now reads what it read."""
    if m.x.shape is None or m.x.dtype is None or m.between.shape is None:
        return (
            "whether the constant changes the shape or the type of what it meets is not known; "
            f"{m.x.unknown}"
        )
    if m.x.shape != m.between.shape:
        return f"the constant changes the shape {m.x.shape} to {m.between.shape}"
    if m.x.dtype != m.layer.weight.dtype:
        kinds = [str(each).removeprefix("torch.") for each in (m.x.dtype, m.layer.weight.dtype)]
        return f"the value is in {kinds[0]} and the layer in {kinds[1]}"
    return None


def per_channel(m: ScaledLayer) -> str | None:
    """The constant must do the same to all of a channel that the layer reads."""
    found = _vectors(m)
    return found if isinstance(found, str) else uneven(m.layer, found[1])


@fxr.rule(where=[same_value, per_channel], quiet=True)
def fold_constant_before(m: ScaledLayer) -> fxr.Replace:
    """Scale and shift in the layer what the constant before it would."""
    found = _vectors(m)
    assert not isinstance(found, str)
    return fxr.Replace(reading_scaled(m.layer, *found), slot="layer")


def _vectors(m: ScaledLayer) -> constants.Vectors | str:
    from_end = spatial_rank(m.layer) + 1
    return constants.vectors(m.by, where(m.layer, in_channels(m.layer), from_end, m.x))


def or_none(shift: torch.Tensor) -> torch.Tensor | None:
    """None for a shift of nothing, so that no bias is made for it."""
    return None if not shift.is_meta and not shift.any() else shift


def uneven(layer: Layer, shift: torch.Tensor | None) -> str | None:
    """Why a shift of what a layer reads is not one number per channel of what it makes, or None."""
    if shift is None or or_none(shift) is None or isinstance(layer, nn.Linear):
        return None
    if isinstance(layer, _TRANSPOSED):
        # With stride 1 it is a convolution of its input padded with d * (k - 1) - p zeros.
        spans = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        padding: Any = layer.padding
        crops = all(p >= span for p, span in zip(padding, spans, strict=True))
        if crops and set(layer.stride) == {1} and not any(layer.output_padding):
            return None
        return (
            "it shifts what a transposed convolution reads, of which the outputs at the border or "
            "between strides see only a part"
        )
    if layer.padding_mode == "zeros" and _pads(layer):
        return (
            "it shifts what the convolution pads with zeros, and a shifted value is not padded "
            "with the shift; without padding, or with another padding_mode, it would fold"
        )
    return None


def _pads(conv: ConvNd) -> bool:
    if conv.padding == "same":
        spans = zip(conv.dilation, conv.kernel_size, strict=True)
        return any(d * (k - 1) > 0 for d, k in spans)
    return conv.padding != "valid" and any(conv.padding)
