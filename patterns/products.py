"""Two linear layers or convolutions with nothing between are one, if that one is smaller."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import fxrewrite as fxr

from .affine import in_channels, out_channels, wide
from .spellings import Idle


@fxr.pattern(anchor="second")
class LinearTwice:
    """A linear layer whose only reader is another."""

    first: nn.Linear
    idle: tuple[Idle, ...]
    second: nn.Linear


@fxr.pattern(anchor="second")
class ConvTwice:
    """A convolution whose only reader is another of the same rank."""

    first: nn.Conv1d | nn.Conv2d | nn.Conv3d
    idle: tuple[Idle, ...]
    second: nn.Conv1d | nn.Conv2d | nn.Conv3d


def fits(m: LinearTwice | ConvTwice) -> str | None:
    """The two must be of one type, on one device, and of the same channels between."""
    first, second = m.first.weight, m.second.weight
    if first.dtype != second.dtype or first.device != second.device:
        kinds = [f"{each.dtype} on {each.device}" for each in (first, second)]
        return f"the first is in {kinds[0]}, and the second in {kinds[1]}"
    if first.dim() != second.dim() or out_channels(m.first) != in_channels(m.second):
        return "the second does not read what the first makes"
    return None


def is_smaller(m: LinearTwice | ConvTwice) -> str | None:
    """The product must have fewer weights than the two, and so take fewer multiplications."""
    sizes = [each.weight.numel() for each in (m.first, m.second)]
    product = out_channels(m.second) * m.first.weight[0].numel()
    if product >= sum(sizes):
        return f"the product would have {product} weights, and the two have {sum(sizes)}"
    return None


@fxr.rule(where=[fits, is_smaller], quiet=True)
def multiply_linear(m: LinearTwice) -> fxr.Replace:
    """One linear layer of the product of both weights."""
    return fxr.Replace(composed(m.first, m.second), slot="first")


def pointwise(m: ConvTwice) -> str | None:
    """The second must see one position of what the first makes, and no padding of its own."""
    second, first = m.second, m.first
    if set(second.kernel_size) != {1}:
        return "the second convolution's kernel is larger than 1"
    if second.padding not in ("valid", "same") and any(second.padding):
        return "the second convolution pads what the first makes"
    if first.groups != second.groups:
        return f"they have {first.groups} and {second.groups} groups"
    if first.padding == "same" and set(second.stride) != {1}:
        return "padding='same' needs a stride of 1, which the product would not have"
    return None


@fxr.rule(where=[pointwise, fits, is_smaller], quiet=True)
def multiply_conv(m: ConvTwice) -> fxr.Replace:
    """One convolution of the product of both weights and strides."""
    stride = tuple(a * b for a, b in zip(m.first.stride, m.second.stride, strict=True))
    conv = fxr.evolve(
        composed(m.first, m.second), stride=stride, out_channels=m.second.out_channels
    )
    return fxr.Replace(conv, slot="first")


def composed(first: Any, second: Any) -> Any:
    """A layer that computes `second(first(x))`, where the second has a kernel of 1 and no padding.

    With weights V of the second and W of the first, and biases c and b, it has the weight V W and
    the bias V b + c, group by group.

    >>> first, second = nn.Linear(8, 4), nn.Linear(4, 2)
    >>> x = torch.randn(3, 8)
    >>> torch.allclose(composed(first, second)(x), second(first(x)), atol=1e-6)
    True

    Args:
        first: a linear layer, or a convolution of any kernel and padding.
        second: a layer of the same kind and number of groups.
    """
    dtype, groups = first.weight.dtype, getattr(first, "groups", 1)
    outer = second.weight.to(wide(dtype)).view(groups, out_channels(second) // groups, -1)
    inner = first.weight.to(wide(dtype)).reshape(groups, outer.shape[2], -1)
    weight = (outer @ inner).view(out_channels(second), *first.weight.shape[1:])
    bias = second.bias
    if first.bias is not None:
        through = (outer @ first.bias.to(wide(dtype)).view(groups, -1, 1)).flatten()
        bias = through if bias is None else through + bias
    width = {"out_features": second.out_features} if isinstance(first, nn.Linear) else {}
    weight = _laid_out_as(first.weight, weight.to(dtype))
    return fxr.evolve(first, weight=weight, bias=None if bias is None else bias.to(dtype), **width)


def _laid_out_as(like: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor whose dimensions lie in memory in another's order, as channels_last has them."""
    order = sorted(range(like.dim()), key=like.stride, reverse=True)
    moved = tensor.permute(order).clone(memory_format=torch.contiguous_format)
    return moved.permute(*map(order.index, range(like.dim())))
