"""Batch norms of further types in conv_bn: frozen ones, and those that something follows."""

from __future__ import annotations

from typing import Any

import nets
import pytest
import timm
import torch
import torchvision
from nets import Forward
from torch import nn

import fxrewrite as fxr

X = nets.random_input((2, 4, 5, 5))


class Copied(nn.Module):
    """A frozen batch norm as Hugging Face's models have copies of: without an `eps`."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.weight = nn.Buffer(torch.ones(n))
        self.bias = nn.Buffer(torch.zeros(n))
        self.running_mean = nn.Buffer(torch.zeros(n))
        self.running_var = nn.Buffer(torch.ones(n))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight.reshape(1, -1, 1, 1)
        scale = weight * (self.running_var.reshape(1, -1, 1, 1) + 1e-5).rsqrt()
        shift = self.bias.reshape(1, -1, 1, 1) - self.running_mean.reshape(1, -1, 1, 1) * scale
        return x * scale + shift


Detr: Any = type("DetrFrozenBatchNorm2d", (Copied,), {})
Detr.__module__ = "transformers.models.detr.modeling_detr"

NORMS: dict[str, tuple[Any, type[nn.Module]]] = {
    "sync": (nn.SyncBatchNorm, nn.Identity),
    "torchvision's": (torchvision.ops.FrozenBatchNorm2d, nn.Identity),
    "hugging face's": (Detr, nn.Identity),
    "timm's with an activation": (timm.layers.BatchNormAct2d, nn.ReLU),
    "timm's frozen one": (timm.layers.FrozenBatchNormAct2d, nn.ReLU),
}


def random(norm: nn.Module) -> nn.Module:
    """The norm with values by which no fold is trivial, some weights near zero or negative."""
    make = torch.Generator().manual_seed(0)
    for name, tensor in {**norm._parameters, **norm._buffers}.items():
        if tensor is not None and tensor.is_floating_point():
            values = torch.randn(tensor.shape, generator=make)
            tensor.data.copy_(values.abs() + 0.5 if name == "running_var" else values)
    if norm._parameters or norm._buffers:
        norm.weight.data[0] = 1e-8  # type: ignore[union-attr, index, operator]
    return norm.eval()


@pytest.mark.parametrize("into", ["graph", "modules"])
@pytest.mark.parametrize("rules", ["conv_bn", "affine"])
@pytest.mark.parametrize("name", NORMS)
def test_it_folds_and_what_follows_stays(name: str, rules: str, into: Any) -> None:
    """The activation takes the norm's place."""
    kind, left = NORMS[name]
    model = Forward(lambda m, x: m.bn(m.conv(x)), conv=nets.conv(), bn=random(kind(4))).double()
    for inputs in (None, X):
        made, report = fxr.rewrite(model, rules, inputs, into=into, expect={rules: 1})
        assert report.into == into
        torch.testing.assert_close(made(X), model(X), rtol=1e-9, atol=1e-9)
        if into == "modules" or left is not nn.Identity:
            assert type(made.get_submodule("bn")) is left


def test_fuse_folds_them_too() -> None:
    """It is conv_bn."""
    model = nn.Sequential(nets.conv(), random(timm.layers.BatchNormAct2d(4, inplace=False)))
    made = fxr.fuse(nets.randomise(model))
    assert [type(each) for each in made.children()] == [nn.Conv2d, nn.ReLU]


def test_of_the_wrong_rank_or_channels_it_stays() -> None:
    """The reason is that of any batch norm."""
    for conv, norm, words in (
        (nn.Conv1d(4, 4, 1), Detr(4), "does not normalise the output of a Conv1d"),
        (nn.Conv2d(4, 3, 1), Detr(4), "3 channels can't be normalised by 4 features"),
        (nn.Conv2d(4, 4, 1), Detr(4).double(), "the batch norm in float64"),
        (nn.Conv2d(4, 4, 1).half(), Detr(4), "the convolution is in float16"),
    ):
        report = fxr.plan(nn.Sequential(conv, norm).eval(), "conv_bn")
        assert words in report.why("1")
