"""Give a convolution that standardises its weight in each call the weight that comes of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import fxrewrite as fxr

from .affine import wide


class Standardised(fxr.Family):
    """A 2-d convolution by its weight less its mean, divided by its deviation, per output channel.

    `eps` is added to the variance; where there is a `gain` per channel, it and `scale` multiply.
    """


for _name in ("StdConv2d", "StdConv2dSame", "ScaledStdConv2d", "ScaledStdConv2dSame"):
    Standardised.add(f"timm.layers.std_conv.{_name}")


@fxr.pattern
class StandardisedConv:
    """A convolution that standardises its weight."""

    conv: Standardised


def pads_evenly(m: StandardisedConv) -> str | None:
    """A padding that depends on the input's size is none that a plain convolution has."""
    if getattr(m.conv, "same_pad", False):
        return "it pads by the size of its input, which a Conv2d does not"
    return None


@fxr.rule(where=[pads_evenly])
def bake_weight(m: StandardisedConv) -> fxr.Replace:
    """A plain convolution by the standardised weight."""
    conv: Any = m.conv
    plain = nn.Conv2d(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        stride=conv.stride,
        padding=conv.padding,
        dilation=conv.dilation,
        groups=conv.groups,
        bias=conv.bias is not None,
        device="meta",
    ).requires_grad_(conv.weight.requires_grad)
    return fxr.Replace(fxr.evolve(plain, weight=standardised(conv), bias=conv.bias))


def standardised(conv: Any) -> torch.Tensor:
    """The weight by which such a convolution convolves, formed in float64 and rounded once.

    With `(weight - mean) / sqrt(var + eps) * gain * scale`, mean and variance over what each output
    channel reads (Qiao et al. 2019, "Weight Standardization"; the gain: Brock et al. 2021,
    "Characterizing signal propagation to close the performance gap in unnormalized ResNets").

    Args:
        conv: has a weight of shape (C, ...), `eps`, and maybe a gain of shape (C, 1, 1, 1).
    """
    weight = conv.weight.to(wide(conv.weight.dtype))
    over = tuple(range(1, weight.dim()))
    var, mean = torch.var_mean(weight, over, correction=0, keepdim=True)
    scale = torch.rsqrt(var + conv.eps)
    if getattr(conv, "gain", None) is not None:
        scale = scale * conv.gain * conv.scale
    made: torch.Tensor = (weight - mean) * scale
    return made.to(conv.weight.dtype)
