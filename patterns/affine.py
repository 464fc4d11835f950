"""The arithmetic of folding: a scale and a shift per channel, behind a layer or before it."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import nn

import fxrewrite as fxr

ConvNd = nn.Conv1d | nn.Conv2d | nn.Conv3d
ConvTransposeNd = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
Layer = ConvNd | ConvTransposeNd | nn.Linear
L = TypeVar("L", bound=Layer)

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def scale_and_shift(bn: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The two vectors with which an eval-mode batch norm is `y = x * scale + shift` per channel.

    With `scale = weight / sqrt(running_var + eps)`, `shift = bias - running_mean * scale` (Ioffe
    and Szegedy 2015, algorithm 2, step 11).

    >>> bn = nn.BatchNorm2d(2, eps=0.0)
    >>> scale_and_shift(bn)[0]
    tensor([1., 1.], dtype=torch.float64, grad_fn=<MulBackward0>)

    Args:
        bn: a batch norm over C channels, or what has the same five attributes, that keeps running
            statistics.

    Returns:
        scale and shift, of shape (C,), in float64 or complex128.
    """
    mean, var = bn.running_mean, bn.running_var
    if mean is None or var is None:
        raise ValueError("this batch norm keeps no running statistics")
    # What meets a wide operand is computed in its type, so one conversion is enough.
    scale = (var.to(wide(mean.dtype)) + bn.eps).rsqrt_()
    weight, bias = bn.weight, bn.bias
    if weight is not None:
        scale = scale * weight
    return scale, -mean * scale if bias is None else torch.addcmul(bias, mean, scale, value=-1)


def scaled_and_shifted(
    layer: L, scale: torch.Tensor | None, shift: torch.Tensor | None = None
) -> L:
    """A layer that computes `layer(x) * scale + shift`, the vectors being per output channel.

    The product is formed in float64 or complex128 and cast to the layer's own type; memory format
    and `requires_grad` are kept. A layer without bias gets one where there is a shift.

    >>> conv = nn.ConvTranspose2d(4, 6, 1, groups=2, bias=False)
    >>> double = scaled_and_shifted(conv, torch.full((6,), 2.0))
    >>> torch.equal(double.weight, conv.weight * 2), double.bias
    (True, None)

    Args:
        layer: a layer with C output channels or features.
        scale: of shape (C,), or None to share the weight as it is.
        shift: likewise.
    """
    weight, bias = layer.weight, layer.bias
    dtype = weight.dtype
    changes: dict[str, Any] = {}
    if scale is not None:
        scale = scale.to(wide(dtype))
        changes["weight"] = (weight * _per_output(layer, weight, scale)).to(dtype)
        if bias is not None and shift is not None:
            shift = torch.addcmul(shift, bias, scale)
        elif bias is not None:
            shift = bias * scale
    elif bias is not None and shift is not None:
        shift = shift + bias
    if shift is not None:
        changes["bias"] = shift.to(dtype)
    return fxr.evolve(layer, **changes)


def reading_scaled(layer: L, scale: torch.Tensor | None, shift: torch.Tensor | None = None) -> L:
    """A layer that computes `layer(x * scale + shift)`, the vectors being per input channel.

    What the shift contributes is one number per output channel, which goes into the bias. So each
    output must read all of the kernel's inputs: no padding with zeros, for one.

    >>> linear = nn.Linear(2, 3)
    >>> shifted = reading_scaled(linear, None, torch.ones(2))
    >>> torch.allclose(shifted(torch.zeros(2)), linear(torch.ones(2)))
    True

    Args:
        layer: a layer with C input channels or features.
        scale: of shape (C,), or None to share the weight as it is.
        shift: likewise.
    """
    weight, bias = layer.weight, layer.bias
    dtype = weight.dtype
    changes: dict[str, Any] = {}
    if scale is not None:
        changes["weight"] = (weight * _per_input(layer, scale.to(wide(dtype)))).to(dtype)
    if shift is not None:
        contributed = _per_output_sum(layer, weight * _per_input(layer, shift.to(wide(dtype))))
        if bias is not None:
            contributed = contributed + bias
        changes["bias"] = contributed.to(dtype)
    return fxr.evolve(layer, **changes)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type that products with a tensor of this type are formed in."""
    return torch.complex128 if dtype.is_complex else torch.float64


def in_channels(layer: Layer) -> int:
    """How many channels or features a layer reads."""
    return layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels


def out_channels(layer: Layer) -> int:
    """How many channels or features a layer makes."""
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels


def spatial_rank(layer: Layer) -> int:
    """How many dimensions follow the channels in what a layer reads and makes."""
    return layer.weight.dim() - 2


def _per_output(layer: Layer, weight: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    """One number per output channel, so that it multiplies the weight."""
    ones = [1] * (weight.dim() - 2)
    if not isinstance(layer, _TRANSPOSED):
        return vector.view(-1, 1, *ones)
    # The weight is (in, out / groups, *kernel); the first inputs belong to the first group.
    of_group = vector.view(layer.groups, -1)
    return of_group.repeat_interleave(layer.in_channels // layer.groups, 0).view(
        layer.in_channels, -1, *ones
    )


def _per_input(layer: Layer, vector: torch.Tensor) -> torch.Tensor:
    """One number per input channel, so that it multiplies the weight."""
    ones = [1] * (layer.weight.dim() - 2)
    if isinstance(layer, _TRANSPOSED):
        return vector.view(-1, 1, *ones)
    groups = 1 if isinstance(layer, nn.Linear) else layer.groups
    # The weight is (out, in / groups, *kernel); the first outputs belong to the first group.
    of_group = vector.view(groups, -1)
    return of_group.repeat_interleave(out_channels(layer) // groups, 0).view(
        out_channels(layer), -1, *ones
    )


def _per_output_sum(layer: Layer, weight: torch.Tensor) -> torch.Tensor:
    """The sum of what a weight of the layer's shape holds for each output channel."""
    if not isinstance(layer, _TRANSPOSED):
        return weight.flatten(1).sum(1)
    by_group = weight.view(layer.groups, -1, *weight.shape[1:])
    return by_group.flatten(3).sum((1, 3)).flatten()
