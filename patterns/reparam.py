"""Make one layer of parallel branches: sums of layers, norms and the value that they read."""

from __future__ import annotations

import torch
from torch import nn

import fxrewrite as fxr

from . import norms
from .affine import in_channels, out_channels
from .forward import alike, along_channels, fold_constant, fold_norm
from .geometry import Geometry, Reading, misfit, with_kernel
from .norms import Norm
from .spellings import ADD, SUB, Idle


@fxr.pattern
class Layered:
    """A branch with a layer; what does nothing may stand around it."""

    before: tuple[Idle, ...]
    layer: nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear
    idle: tuple[Idle, ...]


@fxr.pattern
class Normed:
    """A branch with a norm alone."""

    before: tuple[Idle, ...]
    norm: Norm
    idle: tuple[Idle, ...]


@fxr.pattern
class Passed:
    """A branch that passes on what it reads, by a module that does nothing."""

    first: Idle
    idle: tuple[Idle, ...]


@fxr.pattern
class TwoLayers:
    """The sum or difference of two layers that read one value."""

    left: Layered
    right: Layered
    join: fxr.Call = fxr.call(*ADD, *SUB)


@fxr.pattern
class ThreeLayers:
    """A layer that is added to the sum of two others."""

    pair: TwoLayers
    third: Layered
    join: fxr.Call = fxr.call(*ADD)


@fxr.pattern
class LayerAndNorm:
    """The sum of a layer and a norm that read one value, or the layer less the norm."""

    x: fxr.Value
    left: Layered
    right: Normed
    join: fxr.Call = fxr.call(*ADD, *SUB)


@fxr.pattern
class LayerAndInput:
    """A layer and what it reads, by way of what does nothing or not; their sum or difference."""

    left: Layered
    right: Passed | None
    join: fxr.Call = fxr.call(*ADD, *SUB)


@fxr.pattern(anchor="plus")
class PlusConstant:
    """A sum with a constant, as that with which Python's `sum` starts."""

    made: nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear | Norm | None
    idle: tuple[Idle, ...]
    value: fxr.Value
    plus: fxr.Call = fxr.call(*ADD, side_inputs=False)


def plain_sum(m: TwoLayers | ThreeLayers | LayerAndNorm | LayerAndInput) -> str | None:
    """Both sides must be added as they are, into a new tensor."""
    further = {k: v for k, v in m.join.kwargs.items() if not (k == "alpha" and v == 1)}
    if not further:
        return None
    return f"the sum is called with {', '.join(f'{k}={v}' for k, v in further.items())}"


def layers_fit(m: TwoLayers) -> str | None:
    """Both must read the same places for the same outputs, one kernel inside the other."""
    return _misfit(m.left.layer, m.right.layer)


def three_fit(m: ThreeLayers) -> str | fxr.Declined | None:
    """One of the three must read all that the others read."""
    if plain_sum(m.pair) is not None or _is_difference(m.pair.join):
        return fxr.Declined("it is no sum of three", "missed")
    large, small = _sorted(m)
    return next((why for each in small if (why := _misfit(large, each)) is not None), None)


def norm_fits(m: LayerAndNorm) -> str | None:
    """The norm must be a fixed scale and shift of the channels that the layer reads."""
    layer, norm = m.left.layer, m.right.norm
    rest = norms.rest_of(norm)
    if rest is not None:
        return f"the norm also applies a {type(rest).__name__}"
    return (
        norms.may_lack_batch(norm, m.x)
        or along_channels(layer, norm, m.x, in_channels(layer))
        or alike(layer, norm)
        or _no_place_for_input(layer)
    )


def input_fits(m: LayerAndInput) -> str | None:
    """The layer must make what has the shape of its input, each output in its place."""
    return _no_place_for_input(m.left.layer)


def adds_zero(m: PlusConstant) -> str | fxr.Declined | None:
    """The constant must be the number zero, which leaves a floating-point value as it is."""
    constants = list(m.plus.kwargs.items())
    numbers = [v for k, v in constants if k in ("input", "other")]
    if any(k not in ("input", "other", "alpha") for k, _ in constants) or len(numbers) != 1:
        return fxr.Declined("the sum is called with further arguments", "missed")
    if type(numbers[0]) not in (int, float) or numbers[0] != 0:
        return fxr.Declined("it adds something other than the number 0", "missed")
    if m.made is not None:
        return None
    if m.value.dtype is None:
        return f"whether adding 0 changes the type of the value is not known; {m.value.unknown}"
    if not (m.value.dtype.is_floating_point or m.value.dtype.is_complex):
        return f"adding 0 may change the type of a value in {m.value.dtype}"
    return None


@fxr.rule(where=[adds_zero], quiet=True)
def drop_zero(m: PlusConstant) -> fxr.Revise:
    """Leave out the number 0 that a sum starts with, or that stands for an absent branch."""
    return fxr.Revise(plus=None)


@fxr.rule(where=[plain_sum, layers_fit], quiet=True)
def sum_layers(m: TwoLayers) -> fxr.Replace:
    """Add the smaller kernel to the part of the larger one that reads the same places."""
    left, right = m.left.layer, m.right.layer
    signed = _negated(right) if _is_difference(m.join) else right
    if Geometry.of(right).inside(Geometry.of(left)) is not None:
        return fxr.Replace(_sum(left, signed), slot="left.layer")
    return fxr.Replace(_sum(signed, left), slot="right.layer")


@fxr.rule(where=[plain_sum, three_fit], quiet=True)
def sum_three_layers(m: ThreeLayers) -> fxr.Replace:
    """Add two kernels to a third that reads all that they read, as a 1x3 and a 3x1 to a 3x3."""
    large, (one, other) = _sorted(m)
    layers = {"pair.left": m.pair.left, "pair.right": m.pair.right, "third": m.third}
    slot = next(name for name, each in layers.items() if each.layer is large)
    return fxr.Replace(_sum(_sum(large, one), other), slot=f"{slot}.layer")


@fxr.rule(where=[plain_sum, norm_fits], quiet=True)
def sum_layer_norm(m: LayerAndNorm) -> fxr.Replace:
    """Add the norm to the kernel's centre, as a convolution that scales each channel."""
    found = norms.vectors(m.right.norm)
    assert not isinstance(found, str)
    scale, shift = (-found[0], -found[1]) if _is_difference(m.join) else found
    return _with_channels(m.left.layer, scale, shift)


@fxr.rule(where=[plain_sum, input_fits], quiet=True)
def sum_layer_input(m: LayerAndInput) -> fxr.Replace:
    """Add one to the kernel's centre, from each channel to itself."""
    layer, one = m.left.layer, -1.0 if _is_difference(m.join) else 1.0
    return _with_channels(layer, torch.full((in_channels(layer),), one), None)


reparam = fxr.RuleSet(
    "reparam",
    [
        fold_norm,
        drop_zero,
        fold_constant,
        sum_layers,
        sum_three_layers,
        sum_layer_norm,
        sum_layer_input,
    ],
    doc="Make one layer of parallel branches, as those of RepVGG and MobileOne.",
)


def _sorted(m: ThreeLayers) -> tuple[Reading, list[Reading]]:
    """The layer that reads most, as far as that can be said, and the others."""
    layers = [m.pair.left.layer, m.pair.right.layer, m.third.layer]
    large = max(layers, key=lambda each: each.weight[0].numel())
    at = layers.index(large)
    return large, layers[:at] + layers[at + 1 :]


def _sum(large: Reading, small: Reading) -> Reading:
    """A layer that computes the sum of two, of which one reads all that the other reads."""
    place = Geometry.of(small).inside(Geometry.of(large))
    assert place is not None
    return with_kernel(large, small.weight, small.bias, place)


def _negated(layer: Reading) -> Reading:
    bias = None if layer.bias is None else -layer.bias
    return fxr.evolve(layer, weight=-layer.weight, bias=bias)


def _is_difference(join: fxr.Call) -> bool:
    return join.function in SUB


def _with_channels(layer: Reading, scale: torch.Tensor, shift: torch.Tensor | None) -> fxr.Replace:
    """The layer, plus what it reads with each channel scaled and shifted."""
    place = Geometry.pointwise(layer).inside(Geometry.of(layer))
    assert place is not None
    channels = torch.arange(in_channels(layer), device=layer.weight.device)
    of_group = layer.weight.shape[1]
    kernel = scale.new_zeros((len(channels), of_group), device=layer.weight.device)
    kernel[channels, channels % of_group] = scale.to(kernel.device)
    shape = (*kernel.shape, *(1 for _ in place))
    return fxr.Replace(with_kernel(layer, kernel.view(shape), shift, place), slot="left.layer")


def _misfit(one: Reading, other: Reading) -> str | None:
    return _types_differ(one.weight, other.weight) or misfit(Geometry.of(one), Geometry.of(other))


def _no_place_for_input(layer: Reading) -> str | None:
    if in_channels(layer) != out_channels(layer):
        return (
            f"the layer makes {out_channels(layer)} channels of {in_channels(layer)}, so what "
            "it reads is no part of what it makes"
        )
    return misfit(Geometry.of(layer), Geometry.pointwise(layer))


def _types_differ(one: torch.Tensor, other: torch.Tensor) -> str | None:
    if one.device != other.device:
        return f"the branches are on {one.device} and {other.device}"
    if one.dtype != other.dtype:
        names = [str(each.dtype).removeprefix("torch.") for each in (one, other)]
        return f"the branches are in {names[0]} and {names[1]}"
    return None
