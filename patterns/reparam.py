"""Make one convolution of parallel branches: sums of convolutions, norms and the value itself."""

from __future__ import annotations

import operator
from typing import Any, cast

import torch
from torch import nn

import fxrewrite as fxr

from .affine import ConvNd, scale_and_shift, scaled_and_shifted
from .conv_bn import (
    ConvBn,
    fold_conv_bn,
    has_running_stats,
    same_device,
    same_dtype,
    same_rank,
)
from .geometry import Geometry, misfit, with_kernel

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


class NormAct(fxr.Family):
    """A batch norm that may drop values and apply an activation after it has normalised."""


NormAct.add("timm.layers.norm_act.BatchNormAct2d")


@fxr.pattern
class ConvNormAct(ConvBn):
    """A convolution and a batch norm of that kind."""

    bn: NormAct  # type: ignore[assignment]


@fxr.pattern
class Convolved:
    """A branch with a convolution; what does nothing may follow."""

    conv: nn.Conv1d | nn.Conv2d | nn.Conv3d
    idle: tuple[Idle, ...]


@fxr.pattern
class Normed:
    """A branch with a batch norm alone."""

    norm: nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | NormAct
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


def only_normalises(m: ConvNormAct) -> str | None:
    """An activation of the norm's own would be lost."""
    return _does_more(m.bn)


def plain_sum(m: TwoConvs | ConvAndNorm | ConvAndInput) -> str | None:
    """Both sides must be added as they are, into a new tensor."""
    further = {k: v for k, v in m.join.kwargs.items() if not (k == "alpha" and v == 1)}
    if not further:
        return None
    return f"the sum is called with {', '.join(f'{k}={v}' for k, v in further.items())}"


def convs_fit(m: TwoConvs) -> str | None:
    """Both must read the same places for the same outputs, one kernel inside the other."""
    one, other = m.left.conv, m.right.conv
    return _types_differ(one.weight, other.weight) or misfit(Geometry.of(one), Geometry.of(other))


def input_fits(m: ConvAndInput) -> str | None:
    """The convolution must make what has the shape of its input, each output in its place."""
    return _no_place_for_input(m.left.conv)


def norm_fits(m: ConvAndNorm) -> str | None:
    """The norm must be a fixed scale and shift of the channels that the convolution reads."""
    conv, norm = m.left.conv, cast(Any, m.right.norm)
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
    return _does_more(norm) or _no_place_for_input(conv)


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


@fxr.rule(where=[only_normalises, same_rank, has_running_stats, same_dtype, same_device], pure=True)
def fold_conv_norm_act(m: ConvNormAct) -> fxr.Replace:
    """As `fold_conv_bn`, for a norm whose activation is an identity."""
    return fxr.Replace(scaled_and_shifted(m.conv, *scale_and_shift(cast(Any, m.bn))), slot="conv")


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
    return _with_channels(m.left.conv, *scale_and_shift(cast(Any, m.right.norm)))


@fxr.rule(where=[plain_sum, input_fits], pure=True)
def sum_conv_input(m: ConvAndInput) -> fxr.Replace:
    """Add one to the kernel's centre, from each channel to itself."""
    return _with_channels(m.left.conv, torch.ones(m.left.conv.in_channels), None)


reparam = fxr.RuleSet(
    "reparam",
    [fold_conv_norm_act, fold_conv_bn, drop_zero, sum_convs, sum_conv_norm, sum_conv_input],
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


def _does_more(norm: nn.Module) -> str | None:
    after = (getattr(norm, name, None) for name in ("drop", "act"))
    found = [each for each in after if each is not None and not isinstance(each, nn.Identity)]
    return f"the norm also applies a {type(found[0]).__name__}" if found else None


def _no_place_for_input(conv: ConvNd) -> str | None:
    if conv.in_channels != conv.out_channels:
        return (
            f"the convolution makes {conv.out_channels} channels of {conv.in_channels}, so what "
            "it reads is no part of what it makes"
        )
    return misfit(Geometry.of(conv), Geometry.pointwise(conv))


def _types_differ(one: torch.Tensor, other: torch.Tensor) -> str | None:
    if one.device != other.device:
        return f"the branches are on {one.device} and {other.device}"
    if one.dtype != other.dtype:
        names = [str(each.dtype).removeprefix("torch.") for each in (one, other)]
        return f"the branches are in {names[0]} and {names[1]}"
    return None
