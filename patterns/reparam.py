"""Make one convolution of parallel branches: sums of convolutions, norms and the value itself."""

from __future__ import annotations

import operator
from typing import Any

import attrs
import torch
from torch import nn

import fxrewrite as fxr

from .affine import ConvNd, scale_and_shift
from .conv_bn import fold_conv_bn

ADD: tuple[Any, ...] = (
    operator.add, operator.iadd, torch.add, "add", "add_",
    torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor,
)  # fmt: skip
Idle = (
    nn.Identity | nn.Dropout | nn.Dropout1d | nn.Dropout2d | nn.Dropout3d
    | nn.AlphaDropout | nn.FeatureAlphaDropout
)  # fmt: skip
_CONVS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_DIMS = {nn.BatchNorm1d: 1, nn.BatchNorm2d: 2, nn.BatchNorm3d: 3}
_HALF = (torch.float16, torch.bfloat16)
_MUST_AGREE = {
    "inputs": "input channels",
    "outputs": "output channels",
    "groups": "groups",
    "stride": "stride",
}


@fxr.pattern
class Convolved:
    """A branch with a convolution; what does nothing may follow."""

    conv: nn.Conv1d | nn.Conv2d | nn.Conv3d
    idle: tuple[Idle, ...]


@fxr.pattern
class Normed:
    """A branch with a batch norm alone."""

    norm: nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d
    idle: tuple[Idle, ...]


@fxr.pattern
class Passed:
    """A branch that passes on what it reads, by a module that does nothing."""

    first: Idle
    idle: tuple[Idle, ...]


@fxr.pattern
class TwoConvs:
    """The sum of two convolutions that read one value."""

    left: Convolved
    right: Convolved
    join: fxr.Call = fxr.call(*ADD)


@fxr.pattern
class ConvAndNorm:
    """The sum of a convolution and a batch norm that read one value."""

    x: fxr.Value
    left: Convolved
    right: Normed
    join: fxr.Call = fxr.call(*ADD)


@fxr.pattern
class ConvAndInput:
    """A convolution that is added to what it reads, by way of what does nothing or not."""

    left: Convolved
    right: Passed | None
    join: fxr.Call = fxr.call(*ADD)


@fxr.pattern(anchor="plus")
class PlusConstant:
    """A sum with a constant, as that with which Python's `sum` starts."""

    conv: nn.Conv1d | nn.Conv2d | nn.Conv3d | None
    idle: tuple[Idle, ...]
    value: fxr.Value
    plus: fxr.Call = fxr.call(*ADD, side_inputs=False)


@attrs.frozen
class Geometry:
    """Where a convolution reads, and what it makes; `before` and `after` are its padding."""

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
    def of(cls, conv: ConvNd) -> Geometry:
        """That of a convolution."""
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
    def pointwise(cls, like: ConvNd) -> Geometry:
        """That of a convolution that scales each channel that another one reads."""
        dims, channels = len(like.kernel_size), like.in_channels
        ones, zeros = (1,) * dims, (0,) * dims
        return cls(
            dims, channels, channels, like.groups, ones, ones, ones, zeros, zeros, "zeros"
        )  # fmt: skip

    @property
    def growth(self) -> tuple[int, ...]:
        """By how much the padded input is longer than what the kernel covers, less one."""
        sides = zip(self.before, self.after, self.dilation, self.kernel, strict=True)
        return tuple(before + after - d * (k - 1) for before, after, d, k in sides)

    def inside(self, other: Geometry) -> tuple[int, ...] | None:
        """The index in another kernel at which this one starts; None where it is not inside."""
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


def plain_sum(m: TwoConvs | ConvAndNorm | ConvAndInput) -> str | None:
    """Both sides must be added as they are, into a new tensor."""
    further = {k: v for k, v in m.join.kwargs.items() if not (k == "alpha" and v == 1)}
    if not further:
        return None
    return f"the sum is called with {', '.join(f'{k}={v}' for k, v in further.items())}"


def convs_fit(m: TwoConvs) -> str | None:
    """Both must read the same places for the same outputs, one kernel inside the other."""
    one, other = m.left.conv, m.right.conv
    return _types_differ(one.weight, other.weight) or _misfit(Geometry.of(one), Geometry.of(other))


def input_fits(m: ConvAndInput) -> str | None:
    """The convolution must make what has the shape of its input, each output in its place."""
    return _no_place_for_input(m.left.conv)


def norm_fits(m: ConvAndNorm) -> str | None:
    """The norm must be a fixed scale and shift of the channels that the convolution reads."""
    conv, norm = m.left.conv, m.right.norm
    dims = next(dims for kind, dims in _DIMS.items() if isinstance(norm, kind))
    rank = m.x.rank
    if dims != len(conv.kernel_size) or rank not in (None, dims + 2):
        return (
            f"a {type(norm).__name__} does not normalise the channels that the "
            f"{type(conv).__name__} beside it reads"
        )
    if norm.running_mean is None or norm.running_var is None:
        return "the batch norm keeps no running statistics and normalises by those of each batch"
    if norm.num_features != conv.in_channels:
        return f"the norm is of {norm.num_features} features, and there are {conv.in_channels}"
    held = [t for t in (*norm._parameters.values(), norm.running_mean) if t is not None]
    for each in held:
        # Torch lets a batch norm in float32 read half precision, and gives half.
        if not (each.dtype == torch.float32 and conv.weight.dtype in _HALF):
            differ = _types_differ(conv.weight, each)
            if differ is not None:
                return differ
    return _no_place_for_input(conv)


def adds_zero(m: PlusConstant) -> str | None:
    """The constant must be the number zero, which leaves a floating-point value as it is."""
    constants = list(m.plus.kwargs.items())
    numbers = [v for k, v in constants if k in ("input", "other")]
    if any(k not in ("input", "other", "alpha") for k, _ in constants) or len(numbers) != 1:
        return "the sum is called with further arguments"
    if type(numbers[0]) not in (int, float) or numbers[0] != 0:
        return "it adds something other than the number 0"
    if m.conv is not None:
        return None
    if m.value.dtype is None:
        return (
            "whether adding 0 changes the type of the value is not known; "
            "example_inputs would decide it"
        )
    if not (m.value.dtype.is_floating_point or m.value.dtype.is_complex):
        return f"adding 0 may change the type of a value in {m.value.dtype}"
    return None


@fxr.rule(where=[adds_zero], pure=True)
def drop_zero(m: PlusConstant) -> fxr.Revise:
    """Leave out the number 0 that a sum starts with, or that stands for an absent branch."""
    return fxr.Revise(plus=None)


@fxr.rule(where=[plain_sum, convs_fit], pure=True)
def sum_convs(m: TwoConvs) -> fxr.Replace:
    """Add the smaller kernel to the part of the larger one that reads the same places."""
    left, right = m.left.conv, m.right.conv
    is_right_larger = Geometry.of(right).inside(Geometry.of(left)) is None
    large, small = (right, left) if is_right_larger else (left, right)
    place = Geometry.of(small).inside(Geometry.of(large))
    assert place is not None
    slot = "right.conv" if is_right_larger else "left.conv"
    return fxr.Replace(with_kernel(large, small.weight, small.bias, place), slot=slot)


@fxr.rule(where=[plain_sum, norm_fits], pure=True)
def sum_conv_norm(m: ConvAndNorm) -> fxr.Replace:
    """Add the norm to the kernel's centre, as a convolution that scales each channel."""
    return _with_channels(m.left.conv, *scale_and_shift(m.right.norm))


@fxr.rule(where=[plain_sum, input_fits], pure=True)
def sum_conv_input(m: ConvAndInput) -> fxr.Replace:
    """Add one to the kernel's centre, from each channel to itself."""
    return _with_channels(m.left.conv, torch.ones(m.left.conv.in_channels), None)


def with_kernel(
    conv: ConvNd, weight: torch.Tensor, bias: torch.Tensor | None, place: tuple[int, ...]
) -> ConvNd:
    """A convolution with another kernel added to its own.

    The sum is formed in float64 or complex128 and cast to the convolution's type.

    >>> conv = nn.Conv2d(1, 1, 3, padding=1, bias=False)
    >>> more = with_kernel(conv, torch.ones(1, 1, 1, 1), torch.ones(1), place=(1, 1))
    >>> x = torch.randn(1, 1, 5, 5)
    >>> torch.allclose(more(x), conv(x) + x + 1, atol=1e-6)
    True

    Args:
        conv: a convolution with a kernel of size K and C output channels.
        weight: of the shape of the convolution's own, with a kernel that is no larger.
        bias: of shape (C,), or None.
        place: in each dimension, the index in K at which the other kernel starts.
    """
    dtype = conv.weight.dtype
    wide = torch.complex128 if dtype.is_complex else torch.float64
    total = conv.weight.to(wide, copy=True)
    part: list[Any] = [slice(i, i + k) for i, k in zip(place, weight.shape[2:], strict=True)]
    total[(..., *part)] += weight
    if conv.bias is not None:
        bias = conv.bias.to(wide) + (0 if bias is None else bias)
    return fxr.evolve(conv, weight=total.to(dtype), bias=None if bias is None else bias.to(dtype))


reparam = fxr.RuleSet(
    "reparam",
    [fold_conv_bn, drop_zero, sum_convs, sum_conv_norm, sum_conv_input],
    doc="Make one convolution of parallel branches, as those of RepVGG and MobileOne.",
)


def _with_channels(conv: ConvNd, scale: torch.Tensor, shift: torch.Tensor | None) -> fxr.Replace:
    """The convolution, plus what it reads with each channel scaled and shifted."""
    place = Geometry.pointwise(conv).inside(Geometry.of(conv))
    assert place is not None
    channels = torch.arange(conv.in_channels, device=conv.weight.device)
    of_group = conv.in_channels // conv.groups
    kernel = scale.new_zeros((conv.in_channels, of_group), device=conv.weight.device)
    kernel[channels, channels % of_group] = scale.to(kernel.device)
    shape = (*kernel.shape, *(1 for _ in place))
    return fxr.Replace(with_kernel(conv, kernel.view(shape), shift, place), slot="left.conv")


def _no_place_for_input(conv: ConvNd) -> str | None:
    if conv.in_channels != conv.out_channels:
        return (
            f"the convolution makes {conv.out_channels} channels of {conv.in_channels}, so what "
            "it reads is no part of what it makes"
        )
    return _misfit(Geometry.of(conv), Geometry.pointwise(conv))


def _misfit(one: Geometry, other: Geometry) -> str | None:
    """Why two convolutions of one value are not one convolution, or None."""
    if one.dims != other.dims:
        return f"one convolution has {one.dims} dimensions and the other {other.dims}"
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
        return f"neither kernel, {_size(one)} or {_size(other)}, reads all that the other reads"
    return None


def _size(geometry: Geometry) -> str:
    return "x".join(map(str, geometry.kernel))


def _types_differ(one: torch.Tensor, other: torch.Tensor) -> str | None:
    if one.device != other.device:
        return f"the branches are on {one.device} and {other.device}"
    if one.dtype != other.dtype:
        names = [str(each.dtype).removeprefix("torch.") for each in (one, other)]
        return f"the branches are in {names[0]} and {names[1]}"
    return None
