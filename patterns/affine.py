"""The arithmetic of folding: what follows a convolution as a scale and a shift per channel."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

import fxrewrite as fxr

ConvNd = nn.Conv1d | nn.Conv2d | nn.Conv3d
BatchNormNd = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d
Conv = TypeVar("Conv", bound=ConvNd)


def scale_and_shift(bn: BatchNormNd) -> tuple[torch.Tensor, torch.Tensor]:
    """The two vectors with which an eval-mode batch norm is `y = x * scale + shift` per channel.

    With `scale = weight / sqrt(running_var + eps)`, `shift = bias - running_mean * scale` (Ioffe
    and Szegedy 2015, algorithm 2, step 11).

    >>> bn = nn.BatchNorm2d(2, eps=0.0)
    >>> scale_and_shift(bn)[0]
    tensor([1., 1.], dtype=torch.float64, grad_fn=<MulBackward0>)

    Args:
        bn: a batch norm over C channels that keeps running statistics.

    Returns:
        scale and shift, of shape (C,), in float64 or complex128.
    """
    mean, var = bn.running_mean, bn.running_var
    if mean is None or var is None:
        raise ValueError("this batch norm keeps no running statistics")
    # What meets a wide operand is computed in its type, so one conversion is enough.
    wide = torch.complex128 if mean.is_complex() else torch.float64
    scale = (var.to(wide) + bn.eps).rsqrt_()
    weight, bias = bn.weight, bn.bias
    if weight is not None:
        scale = scale * weight
    return scale, -mean * scale if bias is None else torch.addcmul(bias, mean, scale, value=-1)


def scaled_and_shifted(conv: Conv, scale: torch.Tensor, shift: torch.Tensor) -> Conv:
    """A convolution that computes `conv(x) * scale + shift`, the vectors being per output channel.

    The product is formed in the type of `scale` and cast to the convolution's own; memory format
    and `requires_grad` are kept, and a convolution without bias gets one.

    >>> conv = nn.Conv2d(3, 2, 1, bias=False)
    >>> double = scaled_and_shifted(conv, torch.full((2,), 2.0), torch.zeros(2))
    >>> torch.equal(double.weight, conv.weight * 2)
    True

    Args:
        conv: a convolution with C output channels.
        scale: of shape (C,), of a type at least as wide as the weight's.
        shift: likewise.
    """
    weight, bias = conv.weight, conv.bias
    dtype = weight.dtype
    per_channel = scale.view(-1, *[1] * (weight.dim() - 1))
    if bias is not None:
        shift = torch.addcmul(shift, bias, scale)
    return fxr.evolve(conv, weight=(weight * per_channel).to(dtype), bias=shift.to(dtype))
