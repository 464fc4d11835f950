"""The conv_bn rule set: the arithmetic of the fold, and what it declines."""

from __future__ import annotations

import copy
from typing import Any

import checks
import nets
import pytest
import strategies
import torch
from fxrewrite.patterns.conv_bn import ConvBn, fold_conv_bn
from hypothesis import assume, given
from torch import nn

import fxrewrite as fxr
from fxrewrite.testing import check_rule

HALVES = (torch.bfloat16, torch.float16)


class Flips(nn.Conv2d):
    """Computes otherwise in training mode."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(-x if self.training else x)


def by_channel(output: torch.Tensor) -> torch.Tensor:
    """The largest magnitude in each channel."""
    return output.abs().flatten(2).amax((0, 2))


def bound(model: nn.Sequential, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """How far a fold in this type may be from the exact result, per channel.

    A sum of K products with weights rounded once, plus a bias rounded once, is off by at most
    K + 3 half-ulps of the sum of magnitudes (Higham, Accuracy and Stability of Numerical
    Algorithms, section 3.1), and by a half of the smallest number for each product that underflows.
    """
    conv, bn = copy.deepcopy(model[0]).double(), copy.deepcopy(model[-1]).double()
    scale = (bn.running_var + bn.eps).rsqrt() * (1.0 if bn.weight is None else bn.weight.abs())
    shift = 0.0 if bn.bias is None else bn.bias.abs()
    with torch.no_grad():
        for tensor in conv.parameters():
            tensor.abs_()
        largest = by_channel(conv(x.double().abs()))
    terms = conv.weight[0].numel()
    magnitude = (largest + bn.running_mean.abs()) * scale + shift
    kind = torch.finfo(dtype)
    underflow = kind.smallest_normal * kind.eps * (1 + x.abs().max().double())
    return (terms + 3) * (kind.eps / 2 * magnitude + underflow / 2)


@pytest.mark.slow
def test_conv_bn_is_sound() -> None:
    """On models drawn around its pattern: same outputs, nothing changed, all accounted for."""
    check_rule("conv_bn")


@given(strategies.pairs(between=True))
def test_a_fold_in_float64_is_exact(pair: strategies.Pair) -> None:
    """Each channel is the same to 1e-9 of its largest value, for all that a convolution can be."""
    fused, _ = fxr.rewrite(pair.model, "conv_bn", expect={"conv_bn": 1})
    expected, found = pair.model(pair.x), fused(pair.x)
    assert (by_channel(expected - found) <= 1e-9 * by_channel(expected)).all()
    assert [type(module) for module in fused.children()] == [type(pair.conv)]


@pytest.mark.slow
@given(strategies.pairs(torch.float32))
def test_a_fold_in_float32_is_as_good_as_float32_can_be(pair: strategies.Pair) -> None:
    """The error against float64 is within the bound for one dot product in float32."""
    fused, _ = fxr.rewrite(pair.model, "conv_bn", expect={"conv_bn": 1})
    exact = copy.deepcopy(pair.model).double()(pair.x.double())
    error = by_channel(fused(pair.x) - exact)
    assert (error <= bound(pair.model, pair.x, torch.float32)).all()


@pytest.mark.slow
@given(strategies.models())
def test_a_model_in_float32_loses_no_more_than_without_a_fold(
    case: tuple[nn.Module, torch.Tensor],
) -> None:
    """In float32 a rewritten model is about as close to the float64 outputs as it was before.

    A fold rounds each weight and bias once more, and saves the roundings of the batch norm; so the
    error may be a small multiple of the model's own, which shows how ill-conditioned the model is,
    plus one dot product's worth: 3 ** 3 * 4 products and a bias, half an ulp each.
    """
    model, x = case
    expected = checks.outputs(copy.deepcopy(model), x)
    model, x = model.float(), x.float()
    fused = fxr.fuse(model)
    by_model = checks.largest_error(expected, checks.outputs(copy.deepcopy(model), x))
    by_result = checks.largest_error(expected, checks.outputs(fused, x))
    assert by_result <= 4 * by_model + 109 * 2**-24


@pytest.mark.slow
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("mixed", [False, True], ids=["all half", "batch norm in float32"])
def test_a_fold_in_half_precision(dtype: torch.dtype, mixed: bool) -> None:
    """In half precision the fold stays in that type, and within the bound of one dot product.

    Torch lets a batch norm in float32 follow a half-precision convolution, and gives half.
    """

    @given(strategies.pairs(dtype, decades=1.0))
    def check(pair: strategies.Pair) -> None:
        if mixed:
            pair.bn.float()
        fused, _ = fxr.rewrite(pair.model, "conv_bn", expect={"conv_bn": 1})
        found = fused(pair.x)
        assert found.dtype == pair.model(pair.x).dtype == dtype
        assert {p.dtype for p in fused.parameters()} == {dtype}
        limit = bound(pair.model, pair.x, dtype)
        exact = copy.deepcopy(pair.model).double()(pair.x.double())
        assert (by_channel(found - exact) <= limit).all()

    check()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@given(pair=strategies.pairs(decades=1.0))
def test_a_complex_fold(pair: strategies.Pair, dtype: torch.dtype) -> None:
    """A complex pair folds to what the formula says; torch itself has no complex batch norm."""
    assume(pair.conv.padding_mode == "zeros")
    model = pair.model.to(dtype)
    x = pair.x.to(dtype) * (1 + 2j)
    conv, bn = model[0], model[1]
    with torch.no_grad():
        conv.weight.mul_(1 - 1j)
        bn.running_mean.mul_(0.5 + 1j)
    fused, _ = fxr.rewrite(model, "conv_bn", expect={"conv_bn": 1})
    per_channel = (1, -1, *[1] * (x.dim() - 2))
    centred = conv(x) - bn.running_mean.view(per_channel)
    expected = centred / (bn.running_var + bn.eps).sqrt().view(per_channel)
    if bn.weight is not None:
        expected = expected * bn.weight.view(per_channel)
    if bn.bias is not None:
        expected = expected + bn.bias.view(per_channel)
    assert fused(x).dtype == dtype
    tolerance = 1e-9 if dtype == torch.complex128 else 1e-4
    assert (by_channel(fused(x) - expected) <= tolerance * by_channel(expected)).all()


@pytest.mark.slow
@given(strategies.pairs())
def test_two_batch_norms_fold_into_one_convolution(pair: strategies.Pair) -> None:
    """conv -> bn -> bn becomes one convolution."""
    second = nets.randomise(copy.deepcopy(pair.bn), pair.seed + 2)
    model = nn.Sequential(*pair.model, nn.Identity(), second).double().eval()
    fused, _ = fxr.rewrite(model, "conv_bn", expect={"conv_bn": 2})
    expected, found = model(pair.x), fused(pair.x)
    assert (by_channel(expected - found) <= 1e-9 * by_channel(expected)).all()


@pytest.mark.parametrize("options", [{"affine": False}, {"bias": False}, {}])
def test_the_rule_needs_no_graph(options: dict[str, Any]) -> None:
    """The rule is a function of a match: it makes a convolution and changes nothing."""
    conv, norm = nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4, **options)
    model = nets.randomise(nn.Sequential(conv, norm)).double()
    before = checks.Record(model)
    made = fold_conv_bn(ConvBn(conv=conv, bn=norm))
    before.assert_unchanged()
    assert made.module is not conv
    torch.testing.assert_close(made.module(nets.X), model(nets.X), rtol=1e-9, atol=1e-9)


# What the rule set declines, and why.


def reason(conv: nn.Module, *behind: nn.Module) -> str:
    """Why the batch norm, the last of these, is not folded."""
    model = nn.Sequential(conv, *behind)
    report = fxr.plan(model, "conv_bn")
    assert [each.anchor for each in report.refused] == [str(len(behind))]
    return report.refused[0].reason


def test_training_mode_is_refused() -> None:
    """In training mode a batch norm depends on the batch; the reason says what to call."""
    norm = nets.bn().train()
    assert reason(nets.conv().eval(), norm) == (
        "1 is in training mode, where its output is not a fixed function; call model.eval()"
    )


def test_a_dropout_in_training_mode_is_refused() -> None:
    """A dropout that drops does something, so it may not disappear."""
    said = reason(nets.conv().eval(), nn.Dropout().train(), nets.bn().eval())
    assert said.startswith("1 is in training mode")


@pytest.mark.parametrize("into", ["graph", "modules"])
def test_of_a_model_in_training_the_norms_that_are_frozen_fold(into: Any) -> None:
    """A convolution computes the same in both modes; the new one stays in training mode."""
    model = nets.randomise(nn.Sequential(nets.conv(), nets.bn(), nn.ReLU(), nets.conv(), nets.bn()))
    model = model.double().train()
    model[1].eval()
    x = nets.random_input((2, 4, 5, 5))
    made, report = fxr.rewrite(model, "conv_bn", x, into=into)
    assert [(each.anchor, each.outcome) for each in report.findings] == [
        ("1", "applied"),
        ("4", "refused"),
    ]
    assert made.get_submodule("0").training
    model[4].eval()
    made.get_submodule("4").eval()
    torch.testing.assert_close(made(x), model(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", [nn.RReLU, nn.Dropout, Flips])
def test_what_has_a_mode_is_refused_in_training_mode(kind: Any) -> None:
    """Between a convolution in training mode and a norm in eval mode, or in place of the former."""

    @fxr.rule(pattern=fxr.chain(conv=nn.Conv2d, act=nn.RReLU | nn.Dropout, bn=nn.BatchNorm2d))
    def kept(m: Any) -> fxr.Replace:
        return fxr.Replace(m.conv, slot="conv")

    conv = kind(4, 4, 1) if kind is Flips else nets.conv()
    model = nn.Sequential(conv, nn.Dropout().eval() if kind is Flips else kind(), nets.bn().eval())
    report = fxr.plan(model, "conv_bn" if kind is Flips else kept)
    assert "in training mode" in report.why("2")


def test_no_running_statistics_is_refused() -> None:
    """A batch norm without running statistics uses those of the batch in eval mode, too."""
    norm = nn.BatchNorm2d(4, track_running_stats=False).eval()
    assert "keeps no running statistics" in reason(nets.conv().eval(), norm)


@pytest.mark.parametrize(
    ("of_conv", "of_bn", "words"),
    [
        (
            torch.float64,
            torch.float32,
            "the convolution is in float64 and the batch norm in float32",
        ),
        (
            torch.float32,
            torch.float64,
            "the convolution is in float32 and the batch norm in float64",
        ),
        (
            torch.float32,
            torch.float16,
            "the convolution is in float32 and the batch norm in float16",
        ),
        (torch.bfloat16, torch.float16, "in bfloat16 and the batch norm in float16"),
        (torch.complex64, torch.float32, "in complex64 and the batch norm in float32"),
    ],
)
def test_mixed_types_are_refused(of_conv: torch.dtype, of_bn: torch.dtype, words: str) -> None:
    """A fold that would change the type of the result, or cannot run before it, is refused."""
    assert words in reason(nets.conv().eval().to(of_conv), nets.bn().eval().to(of_bn))


def test_a_batch_norm_of_two_types_is_refused() -> None:
    """Weights in half precision and statistics in float32 are named both."""
    norm = nets.bn().eval()
    norm.weight = nn.Parameter(norm.weight.bfloat16())
    said = reason(nets.conv().eval(), norm)
    assert said.endswith("the batch norm in bfloat16 and float32")


def test_another_rank_or_width_is_refused() -> None:
    """A batch norm of another rank, or over another number of channels, is no partner."""
    conv = nets.conv().eval()
    assert "BatchNorm1d does not normalise" in reason(conv, nn.BatchNorm1d(4).eval())
    assert reason(conv, nn.BatchNorm2d(3).eval()) == (
        "4 channels can't be normalised by 3 features"
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_broken_statistics_are_refused(value: float) -> None:
    """A variance that is not a number or is negative gives no finite weight."""
    norm = nets.randomise(nets.bn())
    norm.running_var[2] = value
    if value == float("inf"):
        norm.running_mean[2] = value
    assert "would not be finite in float32" in reason(nets.conv().eval(), norm)


@pytest.mark.parametrize("tensor", ["weight", "bias"])
def test_an_overflow_in_half_precision_is_refused(tensor: str) -> None:
    """What is finite in float64 and overflows float16 is refused, whichever tensor it is."""
    conv, norm = nets.randomise(nets.conv()), nets.randomise(nets.bn())
    norm.running_var.fill_(1.0)
    norm.weight.data.fill_(1.0)
    if tensor == "weight":
        conv.weight.data[0].fill_(30_000.0)
        norm.weight.data.fill_(4.0)
    else:
        norm.running_mean.fill_(-60_000.0)
        norm.bias.data.fill_(60_000.0)
    assert reason(conv.half(), norm.half()) == (f"the new {tensor} would not be finite in float16")


def test_a_sum_that_overflows_is_not_an_overflow() -> None:
    """Large weights whose sum is beyond float16 are still finite, and fold."""
    conv, norm = nets.randomise(nn.Conv2d(64, 4, 1)), nets.randomise(nets.bn())
    conv.weight.data.fill_(30_000.0)
    norm.running_var.fill_(1.0)
    norm.weight.data.fill_(1.0)
    model = nn.Sequential(conv, norm).half()
    fxr.rewrite(model, "conv_bn", expect={"conv_bn": 1})


@pytest.mark.parametrize(
    ("front", "words"),
    [
        ([], "reads the model's input 'input', not a Conv1d, Conv2d or Conv3d"),
        ([nn.ReLU()], "reads 0 (ReLU), not a Conv1d"),
        ([nn.Dropout()], "0 (Dropout) reads the model's input 'input', not a"),
        ([nn.ConvTranspose2d(4, 4, 1)], "reads 0 (ConvTranspose2d), not a"),
        ([nn.Conv2d(4, 4, 1), nn.ReLU()], "reads 1 (ReLU), not a"),
    ],
)
def test_a_chain_that_is_not_there(front: list[nn.Module], words: str) -> None:
    """A batch norm behind anything but a convolution is missed, with what stands there."""
    report = fxr.plan(nn.Sequential(*front, nets.bn()).eval(), "conv_bn")
    assert not report.refused
    assert words in report.missed[0].reason


def test_behind_a_function() -> None:
    """A batch norm behind a function is missed, and the function named."""
    model = nets.Forward(lambda m, x: m.bn(torch.relu(m.conv(x))), conv=nets.conv(), bn=nets.bn())
    _, report = checks.folded(model, nets.X, applied=0)
    assert "reads relu (relu()), not a Conv1d, Conv2d or Conv3d" in report.why("bn")


class ConvWithAnAddition(nn.Conv2d):
    """A convolution with a constructor and a method of its own, as torchvision's Conv3DSimple."""

    def __init__(self, width: int) -> None:
        super().__init__(width, width, 3, padding=1, bias=False)

    @staticmethod
    def downsampling() -> int:
        return 1


def test_a_subclass_gives_new_storage_as_its_base_does() -> None:
    """An activation that writes in place after the batch norm is no reason to refuse it."""
    layers = nn.Sequential(ConvWithAnAddition(4), nets.bn(), nn.ReLU(inplace=True))
    checks.folded(nets.randomise(layers), nets.X, applied=1)
