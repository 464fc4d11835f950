"""A dropout between two modules does nothing only while nobody sets its mode."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from nets import X, bn, conv, randomise
from torch import nn

import fxrewrite as fxr


def on_one_way(m: Any, x: torch.Tensor, mc: bool = False) -> Any:
    if mc:
        m.drop.train()
    y = m.bn(m.drop(m.conv(x)))
    m.drop.eval()
    return y


def by_attribute(m: Any, x: torch.Tensor, mc: bool = False) -> Any:
    m.drop.training = mc
    return m.bn(m.drop(m.conv(x)))


def by_a_method_of_all(m: Any, x: torch.Tensor, mc: bool = False) -> Any:
    m.train(mc)
    m.bn.eval()
    return m.bn(m.drop(m.conv(x)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.drop, self.bn = conv(), nn.Dropout(), bn()


@pytest.mark.parametrize("rules", ["conv_bn", "cleanup"])
@pytest.mark.parametrize("forward", [on_one_way, by_attribute, by_a_method_of_all])
def test_the_dropout_drops_as_it_did(forward: Callable[..., Any], rules: str) -> None:
    """In a module tree, with example inputs and without; a graph refuses the other way."""
    torch.manual_seed(0)
    model = randomise(type("Net", (Net,), {"forward": forward})()).double().eval()
    for example in (None, X):
        original = copy.deepcopy(model)
        made, _ = fxr.rewrite(model, rules, example, into="modules")
        for mc in (False, True, False):
            torch.manual_seed(1)
            expected = original(X, mc=mc)
            torch.manual_seed(1)
            torch.testing.assert_close(made(X, mc=mc), expected, rtol=1e-9, atol=1e-9)


def test_a_dropout_that_is_switched_on_from_outside_is_noticed() -> None:
    """By the guard, where the model's code might do it."""

    def forward(m: Any, x: torch.Tensor) -> Any:
        return m.bn(m.drop(m.conv(x))) if x.sum() > -1e9 else x

    model = randomise(type("Net", (Net,), {"forward": forward})()).double().eval()
    made, _ = fxr.rewrite(model, "conv_bn", X, expect={"conv_bn": 1})
    made(X)
    assert isinstance(made.drop, nn.Identity | nn.Dropout)
