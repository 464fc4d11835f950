"""What PyTorch proves of `torch.nn.utils.fusion`, whose functions fold one given pair.

After the classes TestFusionEval and TestFusionUtils in `test/test_nn.py` of PyTorch (BSD-3-Clause)
at commit 74f2fa66. The names are theirs, the models and the words are not. docs/peers.md lists what
differs.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from checks import norms, rewritten
from hypothesis import given
from hypothesis import strategies as st
from nets import random_input, randomise
from torch import nn
from torch.nn.utils import fusion

import fxrewrite as fxr

FLAGS = list(itertools.product([True, False], repeat=2))


def statistics(lowest: float) -> st.SearchStrategy[list[float]]:
    """A number for each of six channels, of any size up to a million."""
    return st.lists(st.floats(lowest, 1e6), min_size=6, max_size=6)


def with_statistics(mean: list[float], var: list[float], affine: bool) -> nn.Sequential:
    """A convolution and a norm with these statistics, in float64."""
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, affine=affine)).double()
    randomise(model)
    model[1].running_mean = torch.tensor(mean, dtype=torch.float64)
    model[1].running_var = torch.tensor(var, dtype=torch.float64)
    return model


@given(statistics(-1e6), statistics(0.0), st.booleans(), st.integers(0, 2**32))
def test_fuse_module_eval_numerics(
    mean: list[float], var: list[float], affine: bool, seed: int
) -> None:
    """Whatever the statistics, each channel is as before, and as torch's function makes it."""
    model = with_statistics(mean, var, affine)
    made, _ = fxr.rewrite(model, "conv_bn", expect={"conv_bn": 1})
    x = random_input((2, 3, 5, 5), seed)
    for expected in (model(x), fusion.fuse_conv_bn_eval(*model)(x)):
        error = (made(x) - expected).abs().amax((0, 2, 3))
        assert (error <= 1e-9 * expected.abs().amax((0, 2, 3))).all()


def test_fuse_module_eval_numerics_of_a_negative_variance() -> None:
    """A variance below zero makes NaN of a channel: torch folds that, and here it is refused.

    Theirs draws such variances, and compares NaN with NaN.
    """
    model = with_statistics([0.0] * 6, [1.0] * 5 + [-1.0], affine=True)
    x = random_input((2, 3, 5, 5))
    assert model(x).isnan().any()
    assert fusion.fuse_conv_bn_eval(*model).weight.isnan().any()
    made, report = fxr.rewrite(model, "conv_bn")
    assert norms(made) == ["1"]
    assert "would not be finite" in report.why("1")
    torch.testing.assert_close(made(x), model(x), rtol=0, atol=0, equal_nan=True)


def check_gradients(layer: Any, bn: Any, x: torch.Tensor, weights_of: Any) -> None:
    """The new weight and bias are torch's, and ask for gradients as the old ones did."""
    made, _ = rewritten(randomise(nn.Sequential(layer, bn)), "affine", x, example_inputs=x)
    assert norms(made) == []
    statistics = (bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias)
    theirs = weights_of(layer.weight, layer.bias, *statistics)
    ours = (made.get_submodule("0").weight, made.get_submodule("0").bias)
    for mine, other, before in zip(ours, theirs, (layer.weight, layer.bias), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)
        assert mine.requires_grad == other.requires_grad == before.requires_grad


@pytest.mark.parametrize(("weight", "bias"), FLAGS)
def test_fuse_conv_bn_requires_grad(weight: bool, bias: bool) -> None:
    conv = nn.Conv2d(3, 3, 3)
    conv.weight.requires_grad_(weight)
    conv.bias.requires_grad_(bias)
    x = random_input((1, 3, 4, 4))
    check_gradients(conv, nn.BatchNorm2d(3), x, fusion.fuse_conv_bn_weights)


@pytest.mark.parametrize(("weight", "bias"), FLAGS)
def test_fuse_linear_bn_requires_grad(weight: bool, bias: bool) -> None:
    linear = nn.Linear(3, 3)
    linear.weight.requires_grad_(weight)
    linear.bias.requires_grad_(bias)
    x = random_input((4, 3))
    check_gradients(linear, nn.BatchNorm1d(3), x, fusion.fuse_linear_bn_weights)


@pytest.mark.parametrize("weight", [True, False])
def test_fuse_conv_bn_requires_grad_of_a_new_bias(weight: bool) -> None:
    """Where there was no bias, the new one asks for a gradient as the weight does.

    Torch's never does, and its tests leave that out.
    """
    conv = nn.Conv2d(3, 3, 3, bias=False)
    conv.weight.requires_grad_(weight)
    model = randomise(nn.Sequential(conv, nn.BatchNorm2d(3)))
    made = fxr.rewrite(model, "conv_bn", expect={"conv_bn": 1})[0].get_submodule("0")
    assert made.weight.requires_grad == made.bias.requires_grad == weight
    assert not fusion.fuse_conv_bn_eval(*model).bias.requires_grad
