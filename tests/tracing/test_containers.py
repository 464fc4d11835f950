"""What a model returns keeps its type in a rewrite, also where FX knows plain dictionaries only."""

from __future__ import annotations

import dataclasses
from collections import Counter, OrderedDict
from typing import Any

import nets
import pytest
import torch
from torch import nn

import fxrewrite as fxr


@dataclasses.dataclass
class Output(OrderedDict):  # type: ignore[type-arg]
    """An output as Hugging Face's models give it: a dictionary with attributes."""

    features: Any = None
    states: Any = None

    def __post_init__(self) -> None:
        self.update({k: v for k, v in vars(self).items() if v is not None})


def output_in(make: Any) -> nn.Module:
    return nets.Forward(
        lambda net, x: make(net.bn(net.conv(x))), conv=nets.conv(), bn=nets.bn()
    ).double()


CASES = [
    lambda y: OrderedDict(out=y, nested=OrderedDict(aux=y)),
    lambda y: Output(features=y),
    lambda y: Output(features=y, states=(y, {"last": y})),
    lambda y: {"out": [y, OrderedDict(aux=y)]},
]


def flat(value: Any) -> list[Any]:
    """Types, keys and attributes of all containers, and the tensors in them."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        inner = [each for key, held in value.items() for each in (key, *flat(held))]
        names = [name for name in ("features", "states") if hasattr(value, name)]
        return [type(value), *inner, *[each for n in names for each in flat(getattr(value, n))]]
    if isinstance(value, tuple | list):
        return [type(value), *[each for held in value for each in flat(held)]]
    return [value]


@pytest.mark.parametrize("make", CASES)
def test_an_output_keeps_its_type(make: Any) -> None:
    """An ordered dictionary and a dataclass that is a dictionary come back as such, nested too."""
    model = output_in(make)
    fused, report = fxr.rewrite(model, "conv_bn", into="graph")
    assert len(report.applied) == 1
    for before, after in zip(flat(model(nets.X)), flat(fused(nets.X)), strict=True):
        if isinstance(before, torch.Tensor):
            torch.testing.assert_close(after, before, rtol=1e-9, atol=1e-9)
        else:
            assert after == before


def test_a_dictionary_of_another_type_is_not_made_a_plain_one() -> None:
    """No graph is made of a model that returns one, and the reason is told."""
    with pytest.raises(fxr.errors.TraceError, match="can't make a dictionary of the type Counter"):
        fxr.rewrite(output_in(lambda y: Counter(out=y)), "conv_bn", into="graph")
