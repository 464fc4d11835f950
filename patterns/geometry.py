"""Where layers read: whether two of one value are one, and their kernels' sum."""

from __future__ import annotations

from typing import Any, TypeVar

import attrs
import torch
from torch import nn

import fxrewrite as fxr

from .affine import ConvNd, in_channels, out_channels, wide

Reading = ConvNd | nn.Linear
R = TypeVar("R", bound=Reading)

_MUST_AGREE = {
    "inputs": "input channels",
    "outputs": "output channels",
    "stride": "stride",
}


@attrs.frozen
class Geometry:
    """Where a layer reads, and what it makes; `before` and `after` are its padding.

    A linear layer is a convolution of no dimensions.
    """

    dims: int
    inputs: int
    outputs: int
    groups: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]
    mode: str

    @classmethod
    def of(cls, conv: Reading) -> Geometry:
        """That of a layer."""
        if isinstance(conv, nn.Linear):
            return cls.pointwise(conv)
        reach = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        if conv.padding == "same":  # of an odd number, torch pads one more behind
            before = tuple(each // 2 for each in reach)
            after = tuple(each - each // 2 for each in reach)
        else:
            amount: Any = (0,) * len(reach) if conv.padding == "valid" else conv.padding
            before = after = tuple(amount)
        return cls(
            len(reach), conv.in_channels, conv.out_channels, conv.groups, conv.kernel_size,
            conv.stride, conv.dilation, before, after, conv.padding_mode,
        )  # fmt: skip

    @classmethod
    def pointwise(cls, like: Reading) -> Geometry:
        """That of one with a kernel of 1, with the channels and groups of another."""
        dims, groups = like.weight.dim() - 2, getattr(like, "groups", 1)
        ones, zeros = (1,) * dims, (0,) * dims
        return cls(
            dims, in_channels(like), out_channels(like), groups, ones, ones, ones, zeros, zeros,
            "zeros",
        )  # fmt: skip

    @property
    def growth(self) -> tuple[int, ...]:
        """By how much the padded input is longer than what the kernel covers, less one."""
        sides = zip(self.before, self.after, self.dilation, self.kernel, strict=True)
        return tuple(before + after - d * (k - 1) for before, after, d, k in sides)

    def inside(self, other: Geometry) -> tuple[int, ...] | None:
        """The index in another kernel at which this one starts; None where it is not inside.

        Inside is what takes no more work to compute there: a grouped convolution in one of fewer
        groups, which reads more channels for each output.
        """
        if self.groups % other.groups:
            return None
        if self.mode != other.mode and any((*self.before, *self.after)):
            return None
        found = []
        for dim in range(self.dims):
            ahead, step = other.before[dim] - self.before[dim], other.dilation[dim]
            size, room = self.kernel[dim], other.kernel[dim]
            if ahead % step or not 0 <= ahead // step <= room - size:
                return None
            if size > 1 and self.dilation[dim] != step:
                return None
            found.append(ahead // step)
        return tuple(found)


def with_kernel(
    conv: R, weight: torch.Tensor, bias: torch.Tensor | None, place: tuple[int, ...]
) -> R:
    """A layer with another kernel added to its own.

    The sum is formed in float64 or complex128 and cast to the layer's type.

    >>> from torch import nn
    >>> conv = nn.Conv2d(1, 1, 3, padding=1, bias=False)
    >>> more = with_kernel(conv, torch.ones(1, 1, 1, 1), torch.ones(1), place=(1, 1))
    >>> x = torch.randn(1, 1, 5, 5)
    >>> torch.allclose(more(x), conv(x) + x + 1, atol=1e-6)
    True

    Args:
        conv: a convolution with a kernel of size K and C output channels, or a linear layer.
        weight: of the shape of the layer's own, with a kernel that is no larger, in as many groups
            or more.
        bias: of shape (C,), or None.
        place: in each dimension, the index in K at which the other kernel starts.
    """
    dtype = conv.weight.dtype
    total = conv.weight.to(wide(dtype), copy=True)
    part: list[Any] = [slice(i, i + k) for i, k in zip(place, weight.shape[2:], strict=True)]
    total[(..., *part)] += _in_groups(weight, in_channels(conv), getattr(conv, "groups", 1))
    if conv.bias is not None:
        bias = conv.bias.to(wide(dtype)) + (0 if bias is None else bias)
    return fxr.evolve(conv, weight=total.to(dtype), bias=None if bias is None else bias.to(dtype))


def _in_groups(weight: torch.Tensor, channels: int, groups: int) -> torch.Tensor:
    """A weight that computes the same in fewer groups: zero where its own did not read."""
    inputs = weight.shape[1]
    ratio = channels // inputs // groups
    if ratio == 1:
        return weight
    of_group = weight.view(groups, ratio, -1, inputs, *weight.shape[2:])
    spread = of_group.new_zeros(groups, ratio, of_group.shape[2], ratio, *of_group.shape[3:])
    own = torch.arange(ratio)
    spread[:, own, :, own] = of_group.transpose(0, 1)
    return spread.view(len(weight), ratio * inputs, *weight.shape[2:])


def misfit(one: Geometry, other: Geometry) -> str | None:
    """Why two layers of one value are not one layer, or None."""
    if one.dims != other.dims:
        return f"one layer reads {one.dims} dimensions and the other {other.dims}"
    for name, what in _MUST_AGREE.items():
        first, second = getattr(one, name), getattr(other, name)
        if first != second:
            return f"the branches differ in {what}: {first} and {second}"
    if one.growth != other.growth:
        return (
            f"kernels of {_size(one)} and {_size(other)} with this padding make outputs of "
            "different sizes"
        )
    if one.inside(other) is None and other.inside(one) is None:
        if one.mode != other.mode:
            return f"one branch pads by {one.mode} and the other by {other.mode}"
        if one.groups != other.groups:
            return (
                f"the branches differ in groups, {one.groups} and {other.groups}, and none of the "
                "two reads all that the other reads"
            )
        return f"neither kernel, {_size(one)} or {_size(other)}, reads all that the other reads"
    return None


def _size(geometry: Geometry) -> str:
    return "x".join(map(str, geometry.kernel))
