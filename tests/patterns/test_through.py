"""A norm, what moves or averages its values, and the layer behind that takes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import nets
import pytest
import timm
import torch
from nets import Forward
from torch import nn
from torch.nn import functional as F

import fxrewrite as fxr

X = nets.random_input((2, 4, 6, 5))


def linear(features: int) -> nn.Linear:
    return nn.Linear(features, 3)


AS_IT_IS = nn.Identity()
FOLDED: dict[str, tuple[Callable[[Any, torch.Tensor], Any], nn.Module, nn.Module]] = {
    "flatten": (lambda m, y: torch.flatten(y, 1), AS_IT_IS, linear(120)),
    "dropout, Flatten": (lambda m, y: m.between(y), nn.Flatten(), linear(120)),
    "functional dropout": (
        lambda m, y: F.dropout(y, training=False).flatten(1), AS_IT_IS, linear(120),
    ),
    "behind a permutation": (
        lambda m, y: y.permute(0, 2, 3, 1).flatten(1), AS_IT_IS, linear(120),
    ),
    "over all places": (
        lambda m, y: m.between(y).flatten(1), nn.AdaptiveAvgPool2d(1), linear(4),
    ),
    "over some places": (
        lambda m, y: F.adaptive_avg_pool2d(y, (3, 1)).flatten(1), AS_IT_IS, linear(12),
    ),
    "mean": (lambda m, y: y.mean((2, 3)), AS_IT_IS, linear(4)),
    "mean, kept": (
        lambda m, y: torch.mean(y, dim=[-2, -1], keepdim=True), AS_IT_IS, nn.Conv2d(4, 3, 1),
    ),
    "tokens": (lambda m, y: y.flatten(2).transpose(1, 2), AS_IT_IS, linear(4)),
    "channels last": (lambda m, y: y.permute(0, 2, 3, 1).contiguous(), AS_IT_IS, linear(4)),
    "reflection": (lambda m, y: m.between(y), nn.ReflectionPad2d((1, 2, 3, 1)), nn.Conv2d(4, 3, 3)),
    "replication": (
        lambda m, y: m.between(y), nn.ReplicationPad2d(1), nn.Conv2d(4, 6, 3, groups=2),
    ),
    "circular": (
        lambda m, y: F.pad(y, (1, 1, 1, 1), mode="circular"), AS_IT_IS, nn.Conv2d(4, 3, 3),
    ),
    "rotated": (lambda m, y: y.transpose(2, 3).clone(), AS_IT_IS, nn.ConvTranspose2d(4, 3, 1)),
}  # fmt: skip


def model(name: str, norm: Any = nn.BatchNorm2d) -> nn.Module:
    moved, between, layer = FOLDED[name]
    made = Forward(
        lambda m, x: m.layer(moved(m, m.drop(m.bn(x)))),
        bn=norm(4),
        between=between,
        drop=nn.Dropout(),
        layer=layer,
    )
    return made.double()


@pytest.mark.parametrize("inputs", [None, X])
@pytest.mark.parametrize("name", FOLDED)
def test_the_norm_goes_into_the_layer(name: str, inputs: Any) -> None:
    """What is between stays as it is, and other sizes give the same, too."""
    of = model(name)
    made, _ = fxr.rewrite(of, "affine", inputs, into="graph", expect={"fold_norm_moved": 1})
    for x in (X, nets.random_input((3, 4, 5, 6))):
        torch.testing.assert_close(made(x), of(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", FOLDED)
def test_of_an_exported_program_too(name: str) -> None:
    """As it is exported; of what is decomposed not all that was between can be recognised."""
    of = model(name)
    made, _ = fxr.rewrite(torch.export.export(of, (X,)), "affine", expect={"fold_norm_moved": 1})
    torch.testing.assert_close(made.module()(X), of(X), rtol=1e-9, atol=1e-9)


def test_in_a_module_tree() -> None:
    """Class and forward stay; so does what is between."""
    parts = (nn.BatchNorm2d(4), nn.Dropout(), nn.ReflectionPad2d(1), nn.Conv2d(4, 3, 3))
    of = nets.randomise(nn.Sequential(*parts)).double()
    made, _ = fxr.rewrite(of, "affine", X, into="modules", expect={"fold_norm_moved": 1})
    kept = [nn.Identity, nn.Dropout, nn.ReflectionPad2d, nn.Conv2d]
    assert [type(each) for each in made.children()] == kept
    torch.testing.assert_close(made(X), of(X), rtol=1e-9, atol=1e-9)


def test_norms_of_other_ranks() -> None:
    """One that takes several ranks has to be told which."""
    of = Forward(lambda m, x: m.l(m.bn(x).transpose(1, 2)), bn=nn.BatchNorm1d(4), l=linear(4))
    of, x = of.double(), nets.random_input((2, 4, 7))
    made, _ = fxr.rewrite(of, "affine", x, into="graph", expect={"fold_norm_moved": 1})
    torch.testing.assert_close(made(x), of(x), rtol=1e-9, atol=1e-9)
    assert "example_inputs would decide it" in fxr.plan(of, "affine").why("bn")
    of = Forward(lambda m, x: m.l(m.bn(x).clone()), bn=nn.BatchNorm1d(4), l=linear(4)).double()
    x = nets.random_input((2, 4))
    made, _ = fxr.rewrite(of, "affine", x, into="graph", expect={"fold_norm_moved": 1})
    torch.testing.assert_close(made(x), of(x), rtol=1e-9, atol=1e-9)


REFUSED: dict[str, tuple[Callable[[Any, torch.Tensor], Any], nn.Module, str]] = {
    "average over channels": (
        lambda m, y: y.mean((1, 2)), linear(5), "it averages over channels",
    ),
    "average over channels, moved": (
        lambda m, y: F.adaptive_avg_pool2d(y.transpose(1, 3), 1).flatten(1), linear(5),
        "it averages over channels of the norm",
    ),
    "average over all": (lambda m, y: y.mean(None, True), linear(1), "it averages over all"),
    "a constant": (
        lambda m, y: F.pad(y, (1, 1, 1, 1)), nn.Conv2d(4, 3, 3), "it pads with a number",
    ),
    "zeros of the layer": (
        lambda m, y: y.contiguous(), nn.Conv2d(4, 3, 3, padding=1), "pads with zeros",
    ),
    "several channels": (
        lambda m, y: F.adaptive_avg_pool2d(y, 4).transpose(1, 2), nn.Conv2d(4, 3, 1),
        "of several channels of the norm",
    ),
    "no channels": (
        lambda m, y: y.flatten(2), linear(30), "the inputs of the layer are no channels",
    ),
    "between the places": (
        lambda m, y: y.transpose(1, 2).flatten(1), linear(120), "depends on sizes",
    ),
    "dropping": (
        lambda m, y: F.dropout(y, 0.5, True).flatten(1), linear(120), "dropout is in training mode",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_change_is_refused(name: str) -> None:
    """The reason says why."""
    moved, layer, words = REFUSED[name]
    of = Forward(lambda m, x: m.l(moved(m, m.bn(x))), bn=nn.BatchNorm2d(4), l=layer).double()
    report = fxr.plan(of, "affine", X, into="graph")
    assert not report.applied
    assert words in report.why("bn")


def test_what_the_norm_must_be() -> None:
    """A fixed scale and shift of the layer's type, with nothing behind it."""
    for norm, words in (
        (nn.BatchNorm2d(4, track_running_stats=False), "keeps no running statistics"),
        (timm.layers.BatchNormAct2d(4, inplace=False), "ends with an activation"),
        (nn.BatchNorm2d(4).double(), "the layer is in float32 and the norm in float64"),
    ):
        of = Forward(lambda m, x: m.l(m.bn(x).mean((2, 3))), bn=norm, l=linear(4))
        assert words in fxr.plan(of, "affine").why("bn")


@pytest.mark.parametrize("rules", ["conv_bn", "affine"])
@pytest.mark.parametrize(
    "lay", [lambda y: y.contiguous(), lambda y: y.clone(memory_format=torch.channels_last)]
)
def test_a_norm_behind_what_is_laid_out_anew(lay: Any, rules: str) -> None:
    """It folds into the convolution, and the values are laid out as they were."""
    of = Forward(lambda m, x: m.bn(lay(m.conv(x))), conv=nets.conv(), bn=nets.bn()).double()
    made, _ = fxr.rewrite(of, rules, X, into="graph", expect={rules: 1})
    torch.testing.assert_close(made(X), of(X), rtol=1e-9, atol=1e-9)
    assert made(X).stride() == of(X).stride()
