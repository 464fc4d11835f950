"""Layers with a forward of their own: what of them folds, and why others do not."""

from __future__ import annotations

import math
from typing import Any

import checks
import nets
import pytest
import torch
from fxrewrite.patterns.own_forward import own_forward
from nets import Forward, bn
from torch import nn
from torch.nn import functional as F

import fxrewrite as fxr

X = nets.random_input((2, 4, 7, 6))


class Pads(nn.Conv2d):
    """Pads on two sides, which the padding of a convolution can't."""

    def forward(self, x):
        return F.conv2d(F.pad(x, (0, 1, 0, 1)), self.weight, self.bias, self.stride)


class PadsBySize(nn.Conv2d):
    """As TensorFlow does."""

    def forward(self, x):
        ih, iw = x.size()[-2:]
        kh, kw = self.weight.size()[-2:]
        sh, sw = self.stride
        pad_h = max((math.ceil(ih / sh) - 1) * sh + kh - ih, 0)
        pad_w = max((math.ceil(iw / sw) - 1) * sw + kw - iw, 0)
        if pad_h > 0 or pad_w > 0:
            x = F.pad(x, [pad_w // 2, pad_w - pad_w // 2, pad_h // 2, pad_h - pad_h // 2])
        return F.conv2d(x, self.weight, self.bias, self.stride)


class PadsByModule(nn.Conv2d):
    """Holds what pads, and calls what a convolution calls."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.pad = nn.ReflectionPad2d(1)

    def forward(self, x):
        return self._conv_forward(self.pad(x), self.weight, self.bias)


class Casts(nn.Conv2d):
    """Reads of its weight the type and the device."""

    def forward(self, x):
        return super().forward(x.to(self.weight.dtype).to(self.weight.device))


class ComputedStride(nn.Conv2d):
    """Its forward is a convolution's, and the stride that it reads is not."""

    @property
    def stride(self) -> Any:
        return (2, 2)

    @stride.setter
    def stride(self, value: Any) -> None:
        pass


class Transposes(nn.ConvTranspose2d):
    def forward(self, x):
        return super().forward(x.relu())


class Flattens(nn.Linear):
    def forward(self, x):
        return F.linear(x.flatten(1), weight=self.weight, bias=self.bias)


CONVS = [Pads, PadsBySize, PadsByModule, Casts, ComputedStride]


@pytest.mark.parametrize("into", ["graph", "modules"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", CONVS)
def test_a_norm_folds_into_a_convolution_that_does_something_before(kind, bias, into):
    """It gets another weight and bias, and keeps its class and forward."""
    model = Forward(lambda m, x: m.bn(m.conv(x)), conv=kind(4, 4, 3, stride=2, bias=bias), bn=bn())
    model = model.double()
    for inputs in (None, X):
        made, report = fxr.rewrite(model, "conv_bn", inputs, into=into, expect={"fold_conv_bn": 1})
        assert report.into == into
        assert type(made.get_submodule("conv")) is kind
        for x in (X, X[..., :5, :5]):
            torch.testing.assert_close(made(x), model(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("layer", [Transposes(4, 4, 3, groups=2), Pads(4, 4, 2), Flattens(168, 4)])
def test_affine_folds_what_follows_such_a_layer(layer):
    """A norm of any kind, or a constant; nothing that comes before it, for it reads another."""
    norm = nn.BatchNorm1d(4) if isinstance(layer, nn.Linear) else bn()
    model = Forward(lambda m, x: m.bn(m.layer(x)) * 2, layer=layer, bn=norm).double()
    made, _ = fxr.rewrite(model, "affine", X, expect={"fold_norm": 1, "fold_constant": 1})
    torch.testing.assert_close(made(X), model(X), rtol=1e-9, atol=1e-9)
    before = Forward(lambda m, x: m.layer(m.bn(x)), layer=layer, bn=bn()).double()
    assert not fxr.plan(before, "affine", X).applied


class Doubles(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) * 2


class AddsItsBias(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight) + self.bias[:, None, None]


class BiasTwice(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x + self.bias.sum(), self.weight, self.bias)


class Standardises(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight - self.weight.mean(), self.bias)


class ReadsItsWeight(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x * self.weight.abs().max(), self.weight, self.bias)


class ReadsItsWeightAsANumber(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x * self._parameters["weight"].sum().item(), self.weight, self.bias)


class AsksForItsBias(nn.Conv2d):
    def forward(self, x):
        return super().forward(x if self.bias is None else x * 2)


class AsksForItsDevice(nn.Conv2d):
    def forward(self, x):
        return super().forward(x * 2 if next(self.parameters()).is_cpu else x)


class OnOneWay(nn.Conv2d):
    def forward(self, x):
        y = super().forward(x)
        return y if x.shape[0] > 1 else y * 2


class Twice(nn.Conv2d):
    def forward(self, x):
        return super().forward(super().forward(x))


class ReadsTwice(nn.Conv2d):
    def forward(self, x):
        y = super().forward(x)
        return y - y.mean()


class Listed(nn.Conv2d):
    def forward(self, x):
        if isinstance(x, list):
            return super().forward(x[0]) * 2
        return super().forward(x)


class ByGradMode(nn.Conv2d):
    def forward(self, x):
        return super().forward(x * 2 if torch.is_grad_enabled() else x)


class Draws(nn.Conv2d):
    def forward(self, x):
        return super().forward(x * torch.rand(1).item())


class MakesATensor(nn.Conv2d):
    def forward(self, x):
        return super().forward(x * torch.tensor([2.0, 1.0])[0])


class CalledOtherwise(nn.Conv2d):
    def __call__(self, x):
        return super().__call__(x) * 2

    def forward(self, x):
        return super().forward(x)


class LooksUpOtherwise(nn.Conv2d):
    def __getattr__(self, name):
        return super().__getattr__(name)

    def forward(self, x):
        return super().forward(x)


class Loops(nn.Conv2d):
    def forward(self, x):
        while x.sum() > 1:
            x = x / 2
        return super().forward(x)


class Regroups(nn.ConvTranspose2d):
    def forward(self, x):
        return F.conv_transpose2d(x, self.weight, self.bias, groups=1)


REFUSED: dict[type[nn.Module], str] = {
    Doubles: "what the layer makes is read by mul",
    AddsItsBias: "it does not call conv2d() once, with its weight and bias",
    BiasTwice: "its bias is also read by sum",
    Standardises: "it does not call conv2d() once, with its weight and bias",
    ReadsItsWeight: "its weight is also read by abs",
    ReadsItsWeightAsANumber: "the forward raised there",
    AsksForItsBias: "its forward does something else without a norm, with a bias, or the next time",
    AsksForItsDevice: "the forward raised there",
    OnOneWay: "what the layer makes is read by mul",
    Twice: "it does not call conv2d() once, with its weight and bias",
    ReadsTwice: "what the layer makes is not read once",
    Listed: "x is not of type list",
    ByGradMode: "gradients are ",
    MakesATensor: "it makes a tensor of its own",
    Draws: "it draws random numbers by",
    LooksUpOtherwise: "it has a __getattr__ of its own",
    Loops: "it branches on a value that only a real run has",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_any_other_forward_is_refused(kind):
    """The reason says what of it is not that of a layer."""
    model = nets.randomise(nn.Sequential(kind(4, 4, 1, bias=kind is not AsksForItsBias), bn()))
    for into in ("graph", "modules"):
        report = fxr.plan(model, "conv_bn", into=into)
        assert not report.applied
        assert REFUSED[kind] in report.why("1")


def test_a_call_of_its_own_is_refused():
    """Its forward is not all that it does."""
    assert own_forward(CalledOtherwise(4, 4, 1)) == "it has a __call__ of its own"


def test_groups_of_its_own_are_refused():
    """Which outputs a transposed weight is for depends on how many groups there are."""
    assert own_forward(Regroups(4, 4, 1, groups=2)) == (
        "it calls conv_transpose2d() with groups of its own"
    )


def test_a_weight_that_is_none_of_its_own_is_refused():
    """Another weight would not be read: a parametrized one, for one."""
    layer = nn.utils.parametrizations.weight_norm(Pads(4, 4, 2))
    assert own_forward(layer) == "its weight and bias are no parameters of its own"
    checks.folded(nets.randomise(nn.Sequential(layer, bn())), X, applied=0)


def test_what_is_inside_is_looked_at_as_well():
    """A hook on what pads would run on something else, and in training mode nothing is known."""
    model = nets.randomise(nn.Sequential(PadsByModule(4, 4, 3), bn()))
    hook = model[0].pad.register_forward_hook(lambda *_: None)
    assert "carries a forward hook" in fxr.plan(model, "conv_bn").why("1")
    hook.remove()
    assert fxr.plan(model, "conv_bn").applied
    assert "training mode" in fxr.plan(model.train(), "conv_bn").why("1")
