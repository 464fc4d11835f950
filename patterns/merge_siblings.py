"""Make one wider layer of layers that read one value, such as the projections of attention."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

import fxrewrite as fxr

Layer = nn.Linear | nn.Conv2d

# Measured on a CPU, see docs/merge_siblings.md: with more it makes no difference, or is slower.
FEW_WEIGHTS = 2**17
FEW_OUTPUTS = 2**16


def in_common(layer: Layer) -> Mapping[str, Any]:
    """What layers must have in common to be parts of one."""
    weight = layer.weight
    found = {"dtype": weight.dtype, "device": weight.device, "requires_grad": weight.requires_grad}
    if not isinstance(layer, nn.Linear):
        names = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
        found.update({name: getattr(layer, name) for name in names})
    return found


@fxr.pattern
class Linears:
    """Linear layers that read one value."""

    x: fxr.Value
    layers: fxr.Siblings[nn.Linear] = fxr.siblings(dim=-1, keeps_sizes=True, alike=in_common)


@fxr.pattern
class Convs:
    """Two-dimensional convolutions that read one value."""

    x: fxr.Value
    layers: fxr.Siblings[nn.Conv2d] = fxr.siblings(dim=-3, alike=in_common)


def one_group(m: Convs) -> str | None:
    """With groups the channels of siblings would have to be interleaved."""
    groups = m.layers[0].groups
    return None if groups == 1 else f"the convolutions have {groups} groups"


def few_weights(m: Linears | Convs) -> str | None:
    """What one call saves is the cost of calling several, which shows in small layers only."""
    count = sum(layer.weight.numel() for layer in m.layers)
    if count < FEW_WEIGHTS:
        return None
    return (
        f"it would not be faster: the layers have {count} weights together, and only fewer than "
        f"{FEW_WEIGHTS} were measured to gain"
    )


def few_outputs(m: Linears | Convs) -> str | None:
    """Likewise for what they compute: a large tensor costs more to have than two smaller ones."""
    if m.x.shape is None:
        return f"how many numbers the layers compute is not known; {m.x.unknown}"
    count = math.prod(m.x.shape[: -1 if isinstance(m, Linears) else -3])
    if isinstance(m, Linears):
        count *= sum(layer.out_features for layer in m.layers)
    else:
        places = math.prod(m.x.shape[-2:]) // math.prod(m.layers[0].stride)
        count *= places * sum(layer.out_channels for layer in m.layers)
    if count < FEW_OUTPUTS:
        return None
    return (
        f"it would not be faster: the layers compute some {count} numbers, and only fewer than "
        f"{FEW_OUTPUTS} were measured to gain"
    )


def merged_linears(m: Linears) -> fxr.Split:
    """Stack the weights of linear layers."""
    sizes = tuple(layer.out_features for layer in m.layers)
    return fxr.Split(stacked(m.layers, out_features=sum(sizes)), sizes)


def merged_convs(m: Convs) -> fxr.Split:
    """Stack the weights of convolutions."""
    sizes = tuple(layer.out_channels for layer in m.layers)
    return fxr.Split(stacked(m.layers, out_channels=sum(sizes)), sizes)


def _rules(*limits: Any) -> list[fxr.Rule[Any]]:
    linears = fxr.rule(name="merge_linears", where=limits, last=True)
    convs = fxr.rule(name="merge_convs", where=[one_group, *limits], last=True)
    return [linears(merged_linears), convs(merged_convs)]


merge_siblings = fxr.RuleSet(
    "merge_siblings",
    _rules(few_weights, few_outputs),
    doc="Make one layer of small layers that read one value, such as query, key and value.",
)

# For devices on which it was not measured; not registered by name.
of_any_size = fxr.RuleSet(
    "merge_siblings_of_any_size", _rules(), doc="As merge_siblings, however large the layers are."
)


def stacked(layers: Sequence[Any], **attributes: Any) -> Any:
    """The first layer, with the outputs of all, one after the other.

    What has no bias gets one of 0.0, from which a sum of products starts anyway.
    """
    weight = torch.cat([layer.weight for layer in layers])
    if all(layer.bias is None for layer in layers):
        return fxr.evolve(layers[0], weight=weight, **attributes)
    biases = [
        layer.weight.new_zeros(len(layer.weight)) if layer.bias is None else layer.bias
        for layer in layers
    ]
    return fxr.evolve(layers[0], weight=weight, bias=torch.cat(biases), **attributes)
