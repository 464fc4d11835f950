"""The rule set reparam: parallel branches become one convolution, or are left with a reason."""

from __future__ import annotations

import copy
import operator
from collections import Counter
from typing import Any

import nets
import pytest
import strategies
import timm
import torch
from checks import Record, largest_error, outputs
from hypothesis import given, settings
from timm.utils.model import reparameterize_model
from torch import fx, nn

import fxrewrite as fxr
from fxrewrite.testing import Case, check_rule

X = nets.X
ADDS = ("add", "iadd", "sub")


def merged(model: nn.Module, x: torch.Tensor = X, applied: int | None = None) -> Any:
    """The model rewritten, held to equal outputs in float64; and the report."""
    model = model.double()
    expected = outputs(copy.deepcopy(model), x)
    before = Record(model)
    made, report = fxr.rewrite(model, "reparam")
    before.assert_unchanged()
    assert applied in (None, len(report.applied)), report
    assert largest_error(expected, outputs(made, x)) <= 1e-9, report
    return made, report


def kinds(model: nn.Module) -> list[str]:
    """The types of what a rewritten model calls, or the names of functions."""
    found = []
    for node in model.graph.nodes:
        if node.op == "call_module":
            found.append(type(model.get_submodule(node.target)).__name__)
        elif node.op in ("call_function", "call_method"):
            found.append(getattr(node.target, "__name__", node.target))
    return found


def refused(forward: Any, **members: Any) -> str:
    """Why the last sum of a model is left as it is."""
    return fxr.plan(nets.Forward(forward, **members), "reparam").refused[-1].reason


class RepVGG(nn.Module):
    """A block of a 3x3, a 1x1 and an identity branch, each with a batch norm, as published."""

    def __init__(self, channels: int, groups: int = 1) -> None:
        super().__init__()
        self.dense = nn.Conv2d(channels, channels, 3, padding=1, groups=groups, bias=False)
        self.dense_bn = nn.BatchNorm2d(channels)
        self.point = nn.Conv2d(channels, channels, 1, groups=groups, bias=False)
        self.point_bn = nn.BatchNorm2d(channels)
        self.same = nn.BatchNorm2d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        sides = self.dense_bn(self.dense(x)) + self.point_bn(self.point(x))
        return torch.relu(sides + self.same(x))


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_block_of_repvgg_becomes_one_convolution(groups: int) -> None:
    """Three branches, three batch norms: one 3x3 convolution with a bias."""
    made, _ = merged(nets.randomise(RepVGG(4, groups)), applied=4)
    assert kinds(made) == ["Conv2d", "relu"]
    assert made.dense.kernel_size == (3, 3)
    assert list(made.state_dict()) == ["dense.weight", "dense.bias"]


class MobileOne(nn.Module):
    """A block of a 1x1, an identity and several 3x3 branches, summed as a loop sums them."""

    def __init__(self, start: Any) -> None:
        super().__init__()
        self.start = start
        self.norm, self.scale = nets.bn(), nn.Sequential(nn.Conv2d(4, 4, 1), nets.bn())
        self.sides = nn.ModuleList(nn.Sequential(nets.conv(), nets.bn()) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        total = self.scale(x) if self.start is None else self.start
        for side in self.sides:
            total = total + side(x)
        total += self.norm(x)
        return total


@pytest.mark.parametrize("start", [None, 0, 0.0])
def test_a_block_of_mobileone_becomes_one_convolution(start: Any) -> None:
    """Any number of branches, added one after the other, and to the number 0 at first."""
    made, _ = merged(nets.randomise(MobileOne(start)))
    assert kinds(made) == ["Conv2d"]


SUMS = {
    "operator": lambda m, x: m.a(x) + m.b(x),
    "torch.add": lambda m, x: torch.add(m.a(x), m.b(x)),
    "alpha": lambda m, x: torch.add(m.a(x), m.b(x), alpha=1),
    "alpha, the input first": lambda m, x: torch.add(x, m.a(x), alpha=1),
    "method": lambda m, x: m.a(x).add(m.b(x)),
    "in place": lambda m, x: operator.iadd(m.a(x), m.b(x)),
    "add_": lambda m, x: m.a(x).add_(m.b(x)),
    "sum": lambda m, x: sum([m.a(x), m.b(x)]),
    "sum of three": lambda m, x: sum([m.a(x), m.b(x), x]),
    "input": lambda m, x: x + m.a(x),
    "identity": lambda m, x: m.same(x) + m.a(x),
    "dropouts": lambda m, x: m.drop(m.a(x)) + m.drop(m.same(x)),
    "norm": lambda m, x: m.bn(x) + m.a(x),
    "idle before": lambda m, x: m.a(m.same(x)) + m.bn(m.drop(x)),
    "zero before": lambda m, x: m.a(x) + (0 + m.bn(x)),
    "less": lambda m, x: m.a(x) - m.b(x),
    "less the larger": lambda m, x: m.b(x) - m.a(x),
    "less the norm": lambda m, x: m.a(x) - m.bn(x),
    "less the input": lambda m, x: m.a(x).sub_(x),
    "mixer": lambda m, x: x + m.gamma * (m.a(x) - m.bn(x)),
    "grouped": lambda m, x: m.a(x) + m.grouped(x),
    "grouped first": lambda m, x: m.deep(x) + m.grouped(x),
    "three": lambda m, x: m.wide(x) + m.tall(x) + m.a(x),
    "three, the sum last": lambda m, x: m.a(x) + (m.wide(x) + m.tall(x)),
    "three, the first largest": lambda m, x: (m.a(x) + m.wide(x)) + m.tall(x),
    "one twice": lambda m, x: m.a(x) + m.a(x),
}


def members() -> dict[str, Any]:
    return {
        **{"a": nets.conv(), "b": nn.Conv2d(4, 4, 1, bias=False), "bn": nets.bn()},
        **{"same": nn.Identity(), "drop": nn.Dropout()},
        "gamma": nn.Parameter(torch.randn(4, 1, 1)),
        "wide": nn.Conv2d(4, 4, (1, 3), padding=(0, 1)),
        "tall": nn.Conv2d(4, 4, (3, 1), padding=(1, 0)),
        "grouped": nn.Conv2d(4, 4, 1, groups=2),
        "deep": nn.Conv2d(4, 4, 1, groups=4),
    }


@pytest.mark.parametrize("spelling", SUMS)
def test_a_sum_is_one_convolution_however_it_is_spelt(spelling: str) -> None:
    """By operator, function or method, in place or not, by Python's own sum."""
    made, _ = merged(nets.Forward(SUMS[spelling], **members()))
    assert kinds(made) == ["Conv2d"]


LINEAR_SUMS = {
    "two": lambda m, x: m.a(x) + m.b(x),
    "less": lambda m, x: m.a(x) - m.b(x),
    "input": lambda m, x: x + m.a(x),
    "three": lambda m, x: m.a(x) + m.b(x) + m.a(x),
    "norm": lambda m, x: m.a(x) + m.bn(x),
}


@pytest.mark.parametrize("spelling", LINEAR_SUMS)
def test_a_sum_of_linear_layers_is_one_linear_layer(spelling: str) -> None:
    """A linear layer is a convolution of no dimensions; on N x C a batch norm is of features."""
    linears = {"a": nn.Linear(4, 4), "b": nn.Linear(4, 4, bias=False), "bn": nn.BatchNorm1d(4)}
    model = nets.Forward(LINEAR_SUMS[spelling], **linears).double()
    x = nets.random_input((3, 4))
    expected = outputs(model, x)
    made, _ = fxr.rewrite(model, "reparam", x)
    assert kinds(made) == ["Linear"]
    assert largest_error(expected, outputs(made, x)) <= 1e-9


def test_a_merged_convolution_takes_no_more_work_than_the_larger_one() -> None:
    """A dense 1x1 beside a depthwise 3x3 would make a dense 3x3, and a 1x3 beside a 3x1 a 3x3."""
    assert "differ in groups" in refused(
        lambda m, x: m.a(x) + m.b(x),
        a=nn.Conv2d(8, 8, 3, padding=1, groups=8),
        b=nn.Conv2d(8, 8, 1),
    )
    assert "neither kernel" in refused(
        lambda m, x: m.wide(x) + m.tall(x), wide=members()["wide"], tall=members()["tall"]
    )


def test_a_sum_that_is_not_meant_is_no_finding() -> None:
    """Of sums of other things, and of constants other than 0, the report says nothing."""
    model = nets.Forward(lambda m, x: torch.relu(x) + torch.sigmoid(x) + 1)
    assert not fxr.plan(model, "reparam").findings


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(strategies.branches())
def test_merging_changes_no_result(case: Case) -> None:
    """Whatever the branches are: one convolution where they fit, the same result at any rate."""
    before = Record(case.model)
    expected = outputs(case.model, *case.args)
    made, report = fxr.rewrite(case.model, "reparam")
    before.assert_unchanged()
    assert largest_error(expected, outputs(made, *case.args)) <= 1e-9, report
    assert not fxr.plan(made, "reparam").applied


@pytest.mark.slow
def test_the_rules_are_sound_in_the_toolkits_eyes() -> None:
    """Nothing left to do in a second rewrite, the same result twice, each anchor accounted for."""
    blocks = [RepVGG(4), RepVGG(4, groups=2), MobileOne(None), MobileOne(0)]
    names = ("sum of three", "dropouts", "in place", "mixer", "three")
    sums = [nets.Forward(SUMS[each], **members()) for each in names]
    plain = timm.layers.BatchNormAct2d(4, apply_act=False)
    timms = nets.Forward(lambda m, x: m.bn(m.a(x)) + m.bn(x), a=nets.conv(), bn=plain)
    check_rule("reparam", [*map(nets.randomise, blocks), *sums, timms], X)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_kernels_are_summed_in_float64_and_rounded_once(dtype: torch.dtype) -> None:
    """The new weight is the exact sum, cast to the type of the branches."""
    model = nets.Forward(lambda m, x: m.a(x) + m.b(x) + x, a=nets.conv(), b=nn.Conv2d(4, 4, 1))
    model.to(dtype)
    made, _ = fxr.rewrite(model, "reparam", expect={"sum_layers": 1, "sum_layer_input": 1})
    exact = model.a.weight.double()
    exact[:, :, 1, 1] += model.b.weight.double()[:, :, 0, 0]
    summed = exact.to(dtype).double()
    summed[:, :, 1, 1] += torch.eye(4)
    assert torch.equal(made.a.weight, summed.to(dtype))
    assert made.a.weight.dtype == dtype


REFUSED = {
    "differ in stride: (1, 1) and (2, 2)": (
        lambda m, x: m.a(x) + m.b(x),
        {"a": nn.Conv2d(4, 4, 1), "b": nn.Conv2d(4, 4, 1, stride=2)},
    ),
    "differ in output channels: 4 and 1": (
        lambda m, x: m.a(x) + m.b(x),
        {"a": nn.Conv2d(4, 4, 1), "b": nn.Conv2d(4, 1, 1)},
    ),
    "differ in groups, 4 and 1, and none of the two reads all that the other reads": (
        lambda m, x: m.a(x) + m.b(x),
        {"a": nn.Conv2d(4, 4, 3, padding=1, groups=4), "b": nn.Conv2d(4, 4, 1)},
    ),
    "kernels of 3x3 and 1x1 with this padding make outputs of different sizes": (
        lambda m, x: m.a(x) + m.b(x),
        {"a": nn.Conv2d(4, 4, 3), "b": nn.Conv2d(4, 4, 1)},
    ),
    "kernels of 3x3 and 1x1 with this padding": (
        lambda m, x: m.a(x) + x,
        {"a": nn.Conv2d(4, 4, 3)},
    ),
    "neither kernel, 1x3 or 3x1, reads all that the other reads": (
        lambda m, x: m.a(x) + m.b(x),
        {
            "a": nn.Conv2d(4, 4, (1, 3), padding="same"),
            "b": nn.Conv2d(4, 4, (3, 1), padding="same"),
        },
    ),
    "one branch pads by zeros and the other by reflect": (
        lambda m, x: m.a(x) + m.b(x),
        {"a": nets.conv(), "b": nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")},
    ),
    "makes 8 channels of 4, so what it reads is no part of what it makes": (
        lambda m, x: m.a(x) + x,
        {"a": nn.Conv2d(4, 8, 1)},
    ),
    "the sum is called with alpha=2": (
        lambda m, x: torch.add(m.a(x), m.b(x), alpha=2),
        {"a": nets.conv(), "b": nets.conv()},
    ),
    "the BatchNorm2d keeps no running statistics": (
        lambda m, x: m.a(x) + m.b(x),
        {"a": nets.conv(), "b": nn.BatchNorm2d(4, track_running_stats=False)},
    ),
    "the branches are in float32 and float64": (
        lambda m, x: m.a(x) + m.b(x),
        {"a": nets.conv(), "b": nets.conv().double()},
    ),
    "one layer reads 1 dimensions and the other 2": (
        lambda m, x: m.a(x) + m.b(x),
        {"a": nn.Conv1d(4, 4, 1), "b": nn.Conv2d(2, 4, 1)},
    ),
    "the output of b (Conv2d) is also read by": (
        lambda m, x: (lambda y: (m.a(x) + y, y))(m.b(x)),
        {"a": nets.conv(), "b": nets.conv()},
    ),
    "differ in output channels: 3 and 1": (
        lambda m, x: m.a(x) + m.b(x),
        {"a": nn.Linear(4, 3), "b": nn.Linear(4, 1)},
    ),
    "whether adding 0 changes the type of the value is not known": (
        lambda m, x: torch.relu(x) + 0,
        {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("words", REFUSED)
def test_what_is_not_one_convolution_is_refused_with_the_reason(words: str) -> None:
    """Each condition has a message of its own."""
    forward, members = REFUSED[words]
    assert words in refused(forward, **members)


def test_a_zero_is_left_where_it_changes_the_type() -> None:
    """A bool plus 0 is an integer; a float plus 0 is what it was."""
    model = nets.Forward(lambda m, x: (x > 0) + 0)
    made, report = fxr.rewrite(model, "reparam", X)
    assert "may change the type of a value in torch.bool" in report.refused[0].reason
    assert made(X).dtype == torch.int64
    made, _ = fxr.rewrite(nets.Forward(lambda m, x: torch.relu(x) + 0), "reparam", X)
    assert kinds(made) == ["relu"]


def test_a_kernel_lies_where_it_read_before() -> None:
    """A dilated kernel inside a larger one, and padding by name with an odd number."""
    made, _ = merged(
        nets.Forward(
            lambda m, x: m.a(x) + m.b(x),
            a=nn.Conv2d(4, 4, (5, 2), padding="same", dilation=(2, 1)),
            b=nn.Conv2d(4, 4, (3, 1), padding=(2, 0), dilation=(2, 3)),
        ),
        nets.random_input((1, 4, 9, 9)),
        applied=1,
    )
    assert made.a.kernel_size == (5, 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["repvgg_a0", "mobileone_s0", "repghostnet_050", "fastvit_t8"])
def test_timms_blocks_become_what_timms_own_reparameterisation_makes_of_them(name: str) -> None:
    """As many convolutions are left, no more sums, no norm of a branch, and the same result."""
    model = nets.randomise(timm.create_model(name, num_classes=5))
    own = reparameterize_model(copy.deepcopy(model)).eval().double()
    x = nets.random_input((1, 3, 64, 64))
    made, _ = merged(model, x)
    assert largest_error(outputs(own, x), outputs(made, x)) <= 1e-5
    found, theirs = Counter(kinds(made)), Counter(kinds(fx.symbolic_trace(own)))
    assert found["Conv2d"] == theirs["Conv2d"]
    assert sum(found[each] for each in ADDS) <= sum(theirs[each] for each in ADDS)
    assert not [each for each in made.modules() if isinstance(each, nn.BatchNorm2d)]


def test_a_norms_own_activation_is_not_lost() -> None:
    """Of a norm of timm's, the activation stays behind a layer; as a branch it is refused."""
    norm = timm.layers.BatchNormAct2d(4, inplace=False)
    assert refused(lambda m, x: m.a(x) + m.b(x), a=nets.conv(), b=norm) == (
        "the norm also applies a ReLU"
    )
    made, _ = merged(nets.Forward(lambda m, x: m.b(m.a(x)), a=nets.conv(), b=norm), applied=1)
    assert kinds(made) == ["Conv2d", "ReLU"]
