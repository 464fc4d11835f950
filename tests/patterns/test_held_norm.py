"""Layers that hold a norm, and call it in a forward of their own."""

from __future__ import annotations

import warnings

import nets
import pytest
import timm
import torch
from nets import Forward, bn
from torch import nn
from torch.nn import functional as F

import fxrewrite as fxr

X = nets.random_input((2, 4, 7, 6))


class HoldsNorm(nn.Conv2d):
    def __init__(self, *args, norm, **options):
        super().__init__(*args, **options)
        self.norm = norm

    def forward(self, x):
        return self.norm(F.conv2d(x, self.weight, self.bias, self.stride, self.padding))


class Detectron(HoldsNorm):
    """As detectron2's, which warns of what is empty, and ends with an activation."""

    def forward(self, x):
        if not torch.jit.is_scripting():
            with warnings.catch_warnings(record=True):
                if x.numel() == 0 and self.training and isinstance(self.norm, nn.SyncBatchNorm):
                    raise ValueError
        x = F.conv2d(x, self.weight, self.bias, self.stride, self.padding)
        if self.norm is not None:
            x = self.norm(x)
        return F.relu_(x) + 1


class Flat(nn.Linear):
    def __init__(self, *args, norm):
        super().__init__(*args)
        self.norm = norm

    def forward(self, x):
        return self.norm(super().forward(x))


@pytest.mark.parametrize("into", ["graph", "modules"])
@pytest.mark.parametrize("rules", ["conv_bn", "inference"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", [HoldsNorm, Detectron])
def test_the_norm_inside_folds(kind, bias, rules, into):
    """An identity stands in its place, class and forward stay, and nothing is said to be left."""
    layer = kind(4, 4, 3, stride=2, bias=bias, norm=nn.Sequential(bn()))
    model = nets.randomise(nn.Sequential(layer, nn.ReLU(), nn.Conv2d(4, 4, 1))).double()
    made, report = fxr.rewrite(model, rules, X, into=into, expect={"fold_held_norm": 1})
    assert type(made.get_submodule("0.norm.0")) is nn.Identity
    assert type(made.get_submodule("0")) is kind
    assert not report.missed
    assert "it is part of what 0 does now" in report.why("0.norm.0")
    torch.testing.assert_close(made(X), model(X), rtol=1e-9, atol=1e-9)
    assert isinstance(model[0].norm[0], nn.BatchNorm2d)


class NormTwice(HoldsNorm):
    def forward(self, x):
        return self.norm(self.norm(super(HoldsNorm, self).forward(x)))


class NormOfSum(HoldsNorm):
    def forward(self, x):
        return self.norm(super(HoldsNorm, self).forward(x) + x)


class NormIfMany(HoldsNorm):
    def forward(self, x):
        y = super(HoldsNorm, self).forward(x)
        return self.norm(y) if x.shape[0] > 1 else y


class ReadsNorm(HoldsNorm):
    def forward(self, x):
        return super().forward(x) * self.norm.weight.sum()


class AsksForNorm(HoldsNorm):
    def forward(self, x):
        y = super().forward(x)
        return y * 2 if isinstance(self.norm, nn.BatchNorm2d) else y


class AddsItself(HoldsNorm):
    def forward(self, x):
        y = super(HoldsNorm, self).forward(x)
        return self.norm(y) + y


REFUSED: dict[type[nn.Module], str] = {
    NormTwice: "it calls norm more than once",
    NormOfSum: "what the layer makes is read by add",
    NormIfMany: "what it calls on what the layer makes depends on its input",
    ReadsNorm: "* self.norm.weight.sum()",
    AsksForNorm: "its forward does something else without a norm, with a bias, or the next time",
    AddsItself: "what the layer makes is not read once",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_norm_that_is_used_otherwise_stays(kind):
    """The reason says how, where the layer is asked for."""
    model = nets.randomise(nn.Sequential(kind(4, 4, 1, norm=bn())))
    for into in ("graph", "modules"):
        report = fxr.plan(model, "conv_bn", into=into)
        assert not report.applied
        assert "whether it calls norm on what it makes is not shown" in report.why("0")
        assert REFUSED[kind] in report.why("0")


def test_what_the_norm_itself_must_be():
    """Of the layer's channels and type, with statistics, and with nothing that follows."""
    acts = timm.layers.BatchNormAct2d(4, inplace=False)
    for norm, words in (
        (nn.BatchNorm2d(3), "4 channels can't be normalised by 3 features"),
        (nn.BatchNorm2d(4, track_running_stats=False), "keeps no running statistics"),
        (bn().double(), "the layer is in float32 and the norm in float64"),
        (acts, "its norm ends with an activation"),
    ):
        model = nn.Sequential(HoldsNorm(4, 4, 1, norm=norm)).eval()
        assert words in fxr.plan(model, "conv_bn").why("0")
    model = nn.Sequential(Flat(4, 4, norm=nn.BatchNorm1d(4))).eval()
    assert "depends on the rank" in fxr.plan(model, "affine").why("0")


def test_a_norm_that_several_layers_hold():
    """Each takes it into itself."""
    norm = bn()
    model = nn.Sequential(HoldsNorm(4, 4, 1, norm=norm), HoldsNorm(4, 4, 3, norm=norm))
    model = nets.randomise(model).double()
    for into in ("graph", "modules"):
        made, _ = fxr.rewrite(model, "conv_bn", X, into=into, expect={"fold_held_norm": 2})
        torch.testing.assert_close(made(X), model(X), rtol=1e-9, atol=1e-9)


def test_a_norm_that_is_also_called_by_itself_stays():
    """Somebody else could have seen an identity there."""
    model = Forward(lambda m, x: m.conv.norm(m.conv(x)), conv=HoldsNorm(4, 4, 1, norm=bn()))
    model = model.double()
    for into in ("graph", "modules"):
        report = fxr.plan(model, "conv_bn", X, into=into)
        assert not report.applied
        assert "for it holds it too" in report.why("conv")


def test_a_layer_without_a_norm_is_nothing_to_tell():
    """Neither one that pads by itself, nor one whose norm is called on something else."""

    class Before(HoldsNorm):
        def forward(self, x):
            return super(HoldsNorm, self).forward(self.norm(x))

    class Pads(nn.Conv2d):
        def forward(self, x):
            return super().forward(F.pad(x, (0, 1)))

    for layer in (Before(4, 4, 1, norm=bn()), Pads(4, 4, 1)):
        report = fxr.plan(nn.Sequential(layer).eval(), "conv_bn")
        assert not [f for f in report.findings if f.rule == "fold_held_norm"]
