"""The rule set affine: what folds, in which direction, and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import nets
import pytest
import timm
import torch
import torchvision
from checks import Record, largest_error, outputs
from fxrewrite.patterns.norms import Norm, foldable
from hypothesis import given
from hypothesis import strategies as st
from nets import Forward, X, bn, conv
from torch import nn

import fxrewrite as fxr
from fxrewrite.testing import check_rule, register_strategy

AFFINE = fxr.get_rule_set("affine")
for kind in (timm.layers.StdConv2d, timm.layers.ScaledStdConv2d):
    register_strategy(
        kind,
        lambda s, k=kind: st.builds(k, st.just(s[1]), st.integers(1, 4), st.integers(1, 2)),
        ranks=[4],
    )


def rewritten(
    model: nn.Module, x: torch.Tensor = X, applied: int | None = None, rules: Any = "affine"
) -> tuple[Any, fxr.Report]:
    """The model rewritten, held to equal outputs in float64 and to leaving the model alone."""
    model, x = nets.randomise(model).double(), x.double()
    with torch.no_grad():
        for parameter in model.parameters():
            if torch.equal(parameter, torch.ones_like(parameter)):
                parameter.copy_(torch.randn_like(parameter))
    expected, before = outputs(copy.deepcopy(model), x), Record(model)
    made, report = fxr.rewrite(model, rules, x)
    before.assert_unchanged(versions=False)
    assert applied in (None, len(report.applied)), report
    assert largest_error(expected, outputs(made, x)) <= 1e-9, report
    assert not fxr.plan(made, rules, x).applied
    return made, report


@pytest.mark.slow
@pytest.mark.parametrize("rule", AFFINE.rules, ids=lambda rule: rule.name)
def test_each_rule_is_sound(rule: Any) -> None:
    """On models drawn around its pattern each rule keeps the outputs, and all that is promised."""
    check_rule(rule, max_examples=40, must_apply=False)


CONVS = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


@pytest.mark.slow
@given(
    st.sampled_from([1, 2, 3]), st.integers(1, 3), st.integers(1, 3), st.integers(1, 2), st.data()
)
def test_a_transposed_convolution_before_a_norm(
    rank: int, groups: int, wide: int, narrow: int, data: Any
) -> None:
    """Scaled along its output channels group by group, whatever stride, padding and remainder."""
    stride = data.draw(st.integers(1, 3))
    options: dict[str, Any] = {
        "kernel_size": data.draw(st.integers(1, 3)),
        "stride": stride,
        "padding": data.draw(st.integers(0, 1)),
        "output_padding": data.draw(st.integers(0, stride - 1)),
        "groups": groups,
        "bias": data.draw(st.booleans()),
    }
    layer = CONVS[rank](groups * wide, groups * narrow, **options)
    model = nn.Sequential(layer, nets.BATCH_NORMS[rank](groups * narrow))
    x = nets.random_input((2, groups * wide, *[4] * rank))
    rewritten(model, x, applied=1)


def test_a_linear_layer_before_a_batch_norm_needs_to_know_the_rank() -> None:
    """On N x C the features are normalised, on N x L x C others; without a shape it is refused."""
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    rewritten(model, torch.randn(3, 4), applied=1)
    _, report = rewritten(model, torch.randn(3, 4, 4), applied=0)
    assert "normalises dimension 1 of the 3-d tensor" in report.why("1")
    assert "example_inputs would decide it" in fxr.plan(model, "affine").why("1")


def linear_and_norm(between: Any, after: Any = lambda z, y: z.reshape_as(y)) -> nn.Module:
    """As LeViT's layers: rows are made of what a linear layer gives, normalised, and put back."""

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = m.linear(x)
        return after(m.norm(between(y)), y)

    return Forward(forward, linear=nn.Linear(5, 6), norm=nn.BatchNorm1d(6))


@pytest.mark.parametrize(
    ("between", "shape", "example"),
    [
        (lambda y: y.flatten(0, 1), (2, 3, 5), True),
        (lambda y: torch.flatten(y, end_dim=1), (2, 3, 5), True),
        (lambda y: y.flatten(0, -2), (2, 3, 4, 5), False),
        (lambda y: y.flatten(-3, -2), (2, 3, 5), True),
        (lambda y: y.reshape(-1, 6), (2, 3, 5), False),
        (lambda y: y.view(24, 6), (2, 3, 4, 5), False),
        (lambda y: torch.reshape(y, (y.shape[0] * y.shape[1], 6)), (2, 3, 5), False),
        (lambda y: y.flatten(0, 0), (2, 5), True),
    ],
)
def test_a_linear_layer_before_a_norm_of_rows(between: Any, shape: Any, example: bool) -> None:
    """All but the features may be made one dimension before the norm; the layer takes it."""
    x = nets.random_input(shape)
    model = nets.randomise(linear_and_norm(between)).double()
    before = Record(model)
    made, report = fxr.rewrite(model, "affine", x if example else None, into="graph")
    before.assert_unchanged()
    assert [each.rule for each in report.applied] == ["fold_norm"], report
    expected, found = outputs(model, x), outputs(made, x)
    assert expected[0].shape == found[0].shape
    assert largest_error(expected, found) <= 1e-9


@pytest.mark.parametrize(
    ("between", "shape", "example", "reason"),
    [
        (lambda y: y.flatten(0, 1), (2, 3, 5), False, "example_inputs would decide it"),
        (lambda y: y.flatten(0, 1), (2, 2, 6, 5), True, "normalises dimension 1 of the 3-d tensor"),
        (lambda y: y.flatten(1), (2, 1, 5), True, "the features are flattened with other"),
        (lambda y: y.reshape(6, 6).mT, (2, 3, 5), False, "not a Conv1d"),
        (lambda y: y.reshape(2, -1, 3).flatten(1), (1, 2, 5), False, "not a Conv1d"),
        (lambda y: y.reshape(-1, 6, 1), (2, 3, 5), False, "reshaped to other than rows of 6"),
        (lambda y: y.view(3, -1), (1, 3, 5), False, "reshaped to other than rows of 6"),
        (lambda y: y.view(y.shape[0], y.shape[1]), (3, 5), False, "other than rows of 6"),
    ],
)
def test_other_rows_are_not_of_features(
    between: Any, shape: Any, example: bool, reason: str
) -> None:
    """Where the second dimension may be other than the layer's features, the norm stays."""
    x = nets.random_input(shape)
    model = nets.randomise(linear_and_norm(between)).double()
    expected = outputs(model, x)
    made, report = fxr.rewrite(model, "affine", x if example else None, into="graph")
    assert not report.applied
    assert reason in report.why("norm")
    assert largest_error(expected, outputs(made, x)) == 0


def test_what_a_convolution_makes_is_normalised_before_it_is_flattened() -> None:
    """Behind a convolution, a norm of another shape stays, though it could sometimes be folded."""
    model = Forward(lambda m, x: m.norm(m.conv(x).flatten(2)), conv=conv(), norm=nn.BatchNorm1d(4))
    _, report = rewritten(model, applied=0)
    assert "what the Conv2d makes gets another shape" in report.why("norm")


def test_a_lazy_layer_that_has_run() -> None:
    """Once its parameters are there, a lazy convolution is a convolution."""
    model = nn.Sequential(nn.LazyConv2d(5, 3), nn.LazyBatchNorm2d())
    model(X.float())
    rewritten(model, applied=1)


class Affine(nn.Module):
    """A norm of one's own."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gain, self.offset = (nn.Parameter(torch.randn(channels)) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gain[:, None, None] + self.offset[:, None, None]


@pytest.fixture
def _own_norm() -> Any:
    foldable(Affine, dims=2)(lambda norm: (norm.gain, norm.offset))
    yield
    del Norm._members[Affine]


@pytest.mark.usefixtures("_own_norm")
@pytest.mark.parametrize("before", [False, True])
def test_a_norm_of_ones_own(before: bool) -> None:
    """Three lines make a norm foldable, behind a convolution and before one."""
    layers = [Affine(4), nn.Conv2d(4, 4, 3)] if before else [nn.Conv2d(4, 4, 3), Affine(4)]
    made, _ = rewritten(nn.Sequential(*layers), applied=1)
    assert [type(each) for each in made.children()] == [nn.Conv2d]


def frozen() -> nn.Module:
    norm = torchvision.ops.FrozenBatchNorm2d(4)
    for name, buffer in norm.named_buffers():
        buffer.copy_(torch.rand(4) + 0.5 if name == "running_var" else torch.randn(4))
    return norm


@pytest.mark.parametrize(
    "norm", [frozen, lambda: nn.SyncBatchNorm(4), bn], ids=["frozen", "sync", "batch norm"]
)
def test_other_norms(norm: Any) -> None:
    """Torchvision's frozen batch norm and a synchronised one in eval mode fold as well."""
    rewritten(nn.Sequential(conv(), norm()), applied=1)


def test_a_norm_of_another_rank_is_named_with_its_layer() -> None:
    """The reason says which of the two does not normalise what of the other."""
    for layer, what in ((nn.Conv2d(4, 4, 1), "channels"), (nn.Linear(4, 4), "features")):
        report = fxr.plan(nn.Sequential(layer, nn.BatchNorm3d(4)).eval(), "affine")
        kind = type(layer).__name__
        assert f"a BatchNorm3d does not normalise the {what} of a {kind}" in report.why("1")


def test_a_norm_without_statistics_says_so() -> None:
    """One that holds no tensor at all is refused for what it does, not for its type."""
    model = nn.Sequential(conv(), nn.InstanceNorm2d(4)).eval()
    (finding,) = fxr.plan(model, "affine").refused
    assert finding.reason == (
        "the InstanceNorm2d keeps no running statistics and uses those of its input"
    )


def test_a_norm_with_an_activation_leaves_the_activation() -> None:
    """Of timm's BatchNormAct2d the norm goes, and drop and activation stay under its name."""
    for drop, kept in ((None, [nn.SiLU]), (nn.Dropout, [nn.Sequential, nn.Dropout, nn.SiLU])):
        norm = timm.layers.BatchNormAct2d(4, act_layer=nn.SiLU, drop_layer=drop)
        made, _ = rewritten(Forward(lambda m, x: m.bn(m.conv(x)), conv=conv(), bn=norm), applied=1)
        assert [type(each) for each in made.get_submodule("bn").modules()] == kept


@pytest.mark.slow
@given(st.integers(4, 9), st.integers(1, 4), st.integers(1, 3), st.integers(1, 2), st.booleans())
def test_a_convolution_that_pads_by_the_size_of_its_input(
    side: int, kernel: int, stride: int, dilation: int, bias: bool
) -> None:
    """TensorFlow's, of timm: what comes behind it folds, what comes before meets the padding."""
    options: dict[str, Any] = {"stride": stride, "dilation": dilation, "bias": bias}
    same = timm.layers.Conv2dSame(4, 4, kernel, **options)
    x = nets.random_input((2, 4, side, side))
    made, _ = rewritten(nn.Sequential(same, bn()), x, applied=1)
    assert isinstance(made.get_submodule("0"), timm.layers.Conv2dSame)
    scaled = Forward(lambda m, x: m.same(x) * m.gamma, same=same, gamma=nn.Parameter(torch.ones(1)))
    rewritten(scaled, x, applied=1)
    rewritten(nn.Sequential(bn(), same), x, applied=0)


@pytest.mark.parametrize("kind", ["StdConv2d", "StdConv2dSame", "ScaledStdConv2d"])
@pytest.mark.parametrize("bias", [False, True])
def test_a_standardised_weight_is_baked_in(kind: str, bias: bool) -> None:
    """Timm's weight-standardised convolutions become plain ones, and norms behind them fold."""
    layer = getattr(timm.layers, kind)(4, 6, 3, groups=2, bias=bias, padding=1)
    made, report = rewritten(nn.Sequential(layer, nn.BatchNorm2d(6), nn.ReLU()), applied=2)
    assert [type(each) for each in made.children()] == [nn.Conv2d, nn.ReLU]
    assert report.applied[0].rule == "bake_weight"


def test_a_standardised_weight_under_a_padding_of_its_own_is_refused() -> None:
    """No plain convolution pads by the size of its input."""
    layer = timm.layers.StdConv2dSame(4, 6, 3, stride=2, padding="same")
    _, report = rewritten(nn.Sequential(layer, nn.ReLU()), applied=0)
    assert "pads by the size of its input" in report.why("0")


SCALES: dict[str, Any] = {
    "x * gamma": lambda m, x: m.conv(x) * m.gamma,
    "gamma * x": lambda m, x: m.gamma * m.conv(x),
    "x + gamma": lambda m, x: m.conv(x) + m.gamma,
    "x - gamma": lambda m, x: m.conv(x) - m.gamma,
    "gamma - x": lambda m, x: m.gamma - m.conv(x),
    "x / gamma": lambda m, x: m.conv(x) / m.gamma,
    "x * 3": lambda m, x: m.conv(x) * 3,
    "2 - x": lambda m, x: 2 - m.conv(x),
    "-x": lambda m, x: -m.conv(x),
    "add alpha": lambda m, x: torch.add(m.conv(x), m.gamma, alpha=3),
    "sub alpha": lambda m, x: torch.sub(m.gamma, m.conv(x), alpha=2),
    "in place": lambda m, x: m.conv(x).mul_(m.gamma),
}


@pytest.mark.parametrize("forward", SCALES.values(), ids=SCALES)
@pytest.mark.parametrize("shape", [(4, 1, 1), (1, 4, 1, 1), (1, 1, 1), ()], ids=str)
def test_a_constant_behind_a_convolution(forward: Any, shape: tuple[int, ...]) -> None:
    """Sums and products with one number per channel fold, on either side and by any spelling."""
    gamma = nn.Parameter(torch.randn(shape) + 3)
    rewritten(Forward(forward, conv=conv(), gamma=gamma), applied=1)


PERMUTED: dict[str, Any] = {
    "dims": lambda m, x: m.conv(x).permute(0, 2, 3, 1) * m.gamma,
    "a tuple": lambda m, x: torch.permute(m.conv(x), (0, 2, 3, 1)) * m.gamma,
    "from the end": lambda m, x: m.conv(x).permute(0, -2, -1, -3) * m.gamma,
}


@pytest.mark.parametrize("forward", PERMUTED.values(), ids=PERMUTED)
def test_a_constant_behind_a_permutation(forward: Any) -> None:
    """It folds if it holds one number for each channel, wherever the channels are then."""
    rewritten(Forward(forward, conv=conv(), gamma=nn.Parameter(torch.randn(4) + 3)), applied=1)
    along_width = nn.Parameter(torch.randn(5, 1) + 3)
    _, report = rewritten(Forward(forward, conv=conv(), gamma=along_width), applied=0)
    assert "does not hold one number for each of the 4 channels" in str(report)


@pytest.mark.parametrize(
    ("forward", "shape", "reason"),
    [
        (lambda m, x: m.gamma / m.conv(x), (4, 1, 1), "is not affine"),
        (lambda m, x: m.conv(x) * m.gamma, (5,), "does not hold one number for each of the 4"),
        (lambda m, x: m.conv(x) * m.gamma, (2, 4, 1, 1), "does not hold one number for each"),
        (lambda m, x: m.conv(x) * m.gamma, (1, 1, 4, 1, 1), "adds a dimension"),
    ],
    ids=["divided by", "along the width", "per sample", "a dimension more"],
)
def test_a_constant_that_does_not_fit(forward: Any, shape: Any, reason: str) -> None:
    """What is not one number per channel, or changes the shape, is refused with that reason."""
    model = Forward(forward, conv=conv(), gamma=nn.Parameter(torch.randn(shape)))
    _, report = rewritten(model, applied=0)
    assert reason in str(report)


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [0, 1])
def test_a_norm_before_a_convolution(mode: str, padding: int) -> None:
    """It folds unless the convolution pads with zeros, which are not shifted."""
    layer = nn.Conv2d(4, 3, 3, padding=padding, padding_mode=mode)
    exact = padding == 0 or mode != "zeros"
    _, report = rewritten(nn.Sequential(nn.BatchNorm2d(4), layer), applied=int(exact))
    assert exact or "pads with zeros" in report.why("0")


def test_a_norm_without_a_shift_folds_over_a_padding_of_zeros() -> None:
    """What is only scaled is zero where zeros are padded."""
    model = nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 3, 3, padding=1))
    nets.randomise(model)
    with torch.no_grad():
        model[0].running_mean.zero_()
        model[0].bias.zero_()
    expected = outputs(model.double(), X)
    made, _ = fxr.rewrite(model, "affine", expect={"affine": 1})
    assert largest_error(expected, outputs(made, X)) <= 1e-9


def test_a_norm_between_two_layers_goes_into_the_one_before() -> None:
    """Where it could go both ways, forward wins."""
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 64, 3))
    _, report = rewritten(model, applied=1)
    assert report.applied[0].rule == "fold_norm"


@pytest.mark.parametrize("sizes", [(8, 2, 8), (2, 8, 2), (4, 4, 4), (3, 1, 3)])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_two_layers_become_one_only_if_it_is_smaller(kind: str, sizes: Any) -> None:
    """The product has out x in weights, the two have more or fewer."""
    a, b, c = sizes
    pairs = {
        "linear": [nn.Linear(a, b), nn.Linear(b, c)],
        "conv": [nn.Conv2d(a, b, 1, bias=False), nn.Conv2d(b, c, 1)],
    }
    x = torch.randn(2, a) if kind == "linear" else torch.randn(2, a, 3, 3)
    made, _ = rewritten(nn.Sequential(*pairs[kind]), x, applied=int(a * c < a * b + b * c))
    weights = [each.weight.numel() for each in made.children()]
    assert sum(weights) <= a * b + b * c


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_product_keeps_the_memory_format(kernel: int, layout: Any) -> None:
    """The product's weight lies in memory as that of the first layer does."""
    model = nn.Sequential(nn.Conv2d(4, 6, kernel), nn.Conv2d(6, 2, 1))
    model[0].to(memory_format=layout)
    made, _ = rewritten(model, applied=1)
    wanted = torch.empty(2, 4, kernel, kernel).to(memory_format=layout)
    assert made.get_submodule("0").weight.stride() == wanted.stride()
