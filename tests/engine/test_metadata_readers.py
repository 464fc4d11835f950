"""Who reads only the shape, dtype or device of a chain's inner value does not stop a rewrite."""

from __future__ import annotations

from typing import Any

import checks
import nets
import pytest
import timm
import torch
import torchvision
from nets import Forward, X, bn, conv
from torch import fx, nn
from torch.export import Dim, export
from torch.nn import functional as F

import fxrewrite as fxr

fx.wrap("len")
fx.wrap("height")


def height(y: torch.Tensor) -> int:
    """What the graph has as one call, of which nothing is known."""
    return y.shape[2]


def flattened(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = m.conv(x)
    b, c, h, w = y.shape
    return m.bn(y).reshape(b, c, h * w)


def behind_and_written(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = m.conv(x)
    return F.relu_(m.bn(y)).add_(1.0).view(y.size(0), -1)


def held(forward: Any, rules: Any = "conv_bn", x: torch.Tensor = X, **members: Any) -> Any:
    """The model rewritten into a graph, held to the same outputs, and its report."""
    model = Forward(forward, **{"conv": conv(), "bn": bn(), **members}).double()
    expected, before = checks.outputs(model, x), checks.Record(model)
    made, report = fxr.rewrite(model, rules, x, into="graph")
    before.assert_unchanged()
    found = checks.outputs(made, x)
    for one, other in zip(expected, found, strict=True):
        assert (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride())
    assert checks.largest_error(expected, found) <= 1e-9
    return made, report


@pytest.mark.parametrize(
    "forward",
    [
        flattened,
        behind_and_written,
        lambda m, x: (y := m.conv(x), m.bn(y).reshape(y.size()))[-1],
        lambda m, x: (y := m.conv(x), m.bn(y) + y.size(-1) + y.dim() + y.ndim + y.numel())[-1],
        lambda m, x: (y := m.conv(x), m.bn(y) + len(y))[-1],
        lambda m, x: (y := m.conv(x), m.bn(y).reshape_as(y))[-1],
        lambda m, x: (y := m.conv(x), m.bn(y).flatten(1).view_as(y))[-1],
        lambda m, x: (y := m.conv(x), m.bn(y).mean((2, 3), keepdim=True).expand_as(other=y))[-1],
        lambda m, x: (y := m.conv(x), m.bn(y).float().type_as(y))[-1],
        lambda m, x: (y := m.conv(x), m.bn(y).float().to(y))[-1],
        lambda m, x: (y := m.conv(x), m.bn(y).to(y.device, y.dtype))[-1],
        lambda m, x: (y := m.conv(x), m.bn(y) + torch.ones_like(y))[-1],
        lambda m, x: (y := m.conv(x), m.bn(y) + torch.full_like(input=y, fill_value=2.0))[-1],
        lambda m, x: (y := m.conv(x), m.bn(y) + y.new_full((4, 1, 1), 3.0))[-1],
        lambda m, x: (y := m.conv(x), m.bn(m.drop(y)).reshape_as(y))[-1],
        lambda m, x: (y := m.drop(m.conv(x)), m.bn(y).reshape_as(y))[-1],
        lambda m, x: (m.bn(y := m.conv(x)), torch.zeros_like(y)),
    ],
)
def test_who_asks_for_the_shape_does_not_stop_a_fold(forward: Any) -> None:
    """The batch norm is folded, and what was read of the convolution's output is the same."""
    made, report = held(forward, drop=nn.Dropout())
    assert len(report.applied) == 1, report.why("bn")
    assert not any(isinstance(each, nn.BatchNorm2d) for each in made.modules())


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: (y := m.conv(x), m.bn(y) * y.stride(0))[-1],
        lambda m, x: (y := m.conv(x), m.bn(y) * y.is_contiguous())[-1],
        lambda m, x: (y := m.conv(x), m.bn(y) * height(y))[-1],
        lambda m, x: (y := m.conv(x), y.reshape_as(x) + m.bn(y))[-1],
        lambda m, x: (y := m.conv(x), y.reshape_as(y) + m.bn(y))[-1],
        lambda m, x: (y := m.conv(x), m.bn(y) + torch.rand_like(y))[-1],
        lambda m, x: (y := m.conv(x), m.bn(y) * y.mT.size(0))[-1],
        lambda m, x: (y := m.conv(x), m.bn(y) * y.requires_grad)[-1],
        lambda m, x: (y := m.conv(x), m.bn(y).where(y.bool(), y.new_zeros(1)))[-1],
        lambda m, x: (y := m.conv(x), y.unsqueeze_(0).squeeze_(0), m.bn(y) + y.dim())[-1],
    ],
)
def test_who_reads_numbers_or_strides_needs_the_value_as_it_is(forward: Any) -> None:
    """Other attributes, the numbers, and the shape beside the numbers, refuse the site."""
    _, report = held(forward)
    assert "needs it as it is" in report.why("bn")


def test_the_reason_names_who_reads_the_numbers() -> None:
    """And not somebody who asks for the shape before."""
    _, report = held(lambda m, x: (y := m.conv(x), m.bn(y) + y.size(0) + y.mean())[-1])
    assert "also read by mean (.mean())" in report.why("bn")


@pytest.mark.parametrize("traced", [True, False])
def test_in_a_module_tree_a_question_for_the_shape_is_answered_by_what_stands_there(
    traced: bool,
) -> None:
    """The code that asks stays, and asks the new module's output."""
    model: Any = Forward(flattened, conv=conv(), bn=bn()).double()
    model = fx.symbolic_trace(model) if traced else model
    expected = checks.outputs(model, X)
    made, report = fxr.rewrite(model, "conv_bn", X, into="modules")
    assert len(report.applied) == 1
    assert checks.largest_error(expected, checks.outputs(made, X)) <= 1e-9


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: (y := m.conv(x), m.bn(y).unsqueeze_(0), x + y.dim())[-1],
        lambda m, x: (y := m.conv(x), z := m.bn(y), m.idle(z).squeeze_(), x + y.dim())[-1],
        lambda m, x: (y := m.conv(x), m.bn(y).transpose_(1, 3), x + y.size(1))[-1],
    ],
)
def test_a_write_in_place_that_may_change_the_shape(forward: Any) -> None:
    """What the chain gives has another shape by the time that the inner value is asked for its."""
    _, report = held(forward, x=X[:1], idle=nn.Identity())
    assert "may have changed its shape" in report.why("bn")


@pytest.mark.slow
def test_a_program_of_any_size_asks_its_values_for_their_sizes() -> None:
    """In an exported program with a dynamic shape, the sizes are read off the new convolution."""

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = m.conv(x)
        return m.bn(y).reshape(y.shape[0], -1) + torch.zeros_like(y).flatten(1)

    net = Forward(forward, conv=conv(), bn=bn()).double()
    shapes = ({0: Dim("batch", min=2, max=64)},)
    program = export(net, (X,), dynamic_shapes={"x": shapes[0]}).run_decompositions()
    # The exporter reads each size off an input; a program may as well read it off a value.
    calls = {node.target: node for node in program.graph.nodes}
    size, made_by = calls[torch.ops.aten.sym_size.int], calls[torch.ops.aten.convolution.default]
    made_by.append(size)
    size.args = (made_by, 0)
    assert {each.name for each in made_by.users} >= {size.name, "full_like"}
    made, _ = fxr.rewrite(program, "conv_bn", expect={"conv_bn": 1})
    for x in (X, torch.cat([X, X * 2])):
        expected = checks.outputs(net, x)
        assert checks.largest_error(expected, checks.outputs(made.module(), x)) <= 1e-9


@pytest.mark.parametrize(
    ("forward", "members"),
    [
        (lambda m, x: (y := m.conv(x), y * 2.0 + y.size(1))[-1], {}),
        (lambda m, x: (y := m.bn(x), m.conv(y) + y.size(1))[-1], {"conv": nn.Conv2d(4, 4, 3)}),
        (
            lambda m, x: (y := m.conv(x), m.bn(y) + y.size(1))[-1],
            {"bn": torchvision.ops.FrozenBatchNorm2d(4)},
        ),
        (
            lambda m, x: (y := m.conv(x), m.bn(y) + y.size(1))[-1],
            {"bn": timm.layers.BatchNormAct2d(4)},
        ),
        (
            lambda m, x: (z := m.one(x).flatten(0, -2), m.bn(z).view(z.shape) + z.size(0))[-1],
            {"one": nn.Linear(5, 7), "bn": nn.BatchNorm1d(7)},
        ),
    ],
    ids=["constant", "norm before", "frozen", "with an activation", "rows"],
)
def test_a_layer_with_other_numbers_has_its_shape(forward: Any, members: Any) -> None:
    """So has what a norm reads, where the fold goes into the layer behind it."""
    _, report = held(forward, "affine", **members)
    assert len(report.applied) == 1, report


@pytest.mark.parametrize(
    ("forward", "members"),
    [
        # The convolution that is left reads what the frozen norm read, which it might have spread.
        (
            lambda m, x: (y := m.bn(x), m.conv(y) + y.size(1))[-1],
            {"bn": torchvision.ops.FrozenBatchNorm2d(4), "conv": nn.Conv2d(4, 4, 3)},
        ),
        # Of two layers one is left, which makes another shape than the first.
        (
            lambda m, x: (y := m.one(x), m.two(y) + y.size(-1))[-1],
            {"one": nn.Linear(5, 7), "two": nn.Linear(7, 3)},
        ),
    ],
)
def test_another_shape_may_stand_there(forward: Any, members: Any) -> None:
    """Where what stands there is not sure to have the shape, the site is refused with that."""
    _, report = held(forward, "affine", **members)
    assert any("not sure to have the same shape" in each.reason for each in report.refused), report


class Both(nn.Module):
    """Calls modules one after the other."""

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__()
        self.all = nn.ModuleList(modules)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for each in self.all:
            x = each(x)
        return x


def together(m: Any) -> fxr.Replace:
    """One module that does what two did."""
    return fxr.Replace(Both(m.one, m.two))


class Single(nn.Module):
    """Changes the type."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.float()


class Double(nn.Module):
    """Changes it back."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.double()


class Flattening(nn.ReLU):
    """Does not do what its base does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1)


@pytest.mark.parametrize(
    ("one", "two", "applied"),
    [
        (nn.Conv2d(4, 3, 1), nn.ReLU(), True),
        (nn.Conv2d(4, 3, 1), nn.BatchNorm2d(3), True),
        (nn.Conv2d(4, 3, 1), nn.Conv2d(3, 3, 1), False),
        (nn.Conv2d(4, 3, 1), nn.MaxPool2d(2), False),
        (nn.Conv2d(4, 3, 1), nn.Softmax(1), False),
        (nn.Conv2d(4, 3, 1), Single(), False),
        (nn.Conv2d(4, 3, 1), Flattening(), False),
        (Single(), nn.ReLU(), True),
        (nn.MaxPool2d(2), nn.ReLU(), True),
    ],
)
def test_the_rest_of_the_chain_has_to_keep_the_shape(
    one: nn.Module, two: nn.Module, applied: bool
) -> None:
    """What a rule puts in the place of all may be asked, if what follows keeps shape and type."""

    def forward(m: Any, x: torch.Tensor) -> Any:
        y = m.one(x)
        return m.two(y), x.new_zeros(y.shape, dtype=y.dtype)

    rule = fxr.rule(pattern=fxr.chain(one=type(one), two=type(two)))(together)
    _, report = held(forward, rule, one=one, two=two)
    assert len(report.applied) == applied, report
    if not applied:
        assert "not sure to have the same shape" in report.refused[0].reason


def test_what_has_the_strides_of_a_value_needs_a_layer_to_have_made_it() -> None:
    """A module of the user may lay out its output in any way, and what replaces it in another."""

    class Turned(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.transpose(2, 3)

    class Straight(Both):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).contiguous()

    @fxr.rule(pattern=fxr.chain(one=Turned, two=nn.ReLU))
    def straight(m: Any) -> fxr.Replace:
        return fxr.Replace(Straight(m.one, m.two))

    def forward(m: Any, x: torch.Tensor) -> Any:
        y = m.one(x)
        return m.two(y).contiguous(), torch.zeros_like(y)

    _, report = held(forward, straight, one=Turned(), two=nn.ReLU())
    assert "needs it as it is" in report.refused[0].reason


def channels(count: int, dtype: torch.dtype = torch.float64) -> nn.Conv2d:
    return nn.Conv2d(4, count, 1, dtype=dtype)


@pytest.mark.parametrize(
    ("new", "applied"),
    [
        (channels(3), True),
        (channels(5), False),
        (channels(3, torch.float32), False),
        (nn.Conv2d(4, 3, 1, padding=1, dtype=torch.float64), False),
        (nn.Sequential(channels(3)), False),
    ],
)
def test_a_new_layer_in_a_step_has_the_shape_of_one_alike(new: nn.Module, applied: bool) -> None:
    """One that differs in its numbers alone may be asked for the shape of the one before."""

    class Any3(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.mean((1, 2, 3)) * 0

    @fxr.rule(pattern=fxr.chain(one=nn.Conv2d, two=Any3))
    def another(m: Any) -> fxr.Revise:
        return fxr.Revise(one=new, two=nn.Sequential(Single(), m.two, Double()))

    def forward(m: Any, x: torch.Tensor) -> Any:
        y = m.one(x)
        return m.two(y), x.new_zeros(y.shape, dtype=y.dtype)

    _, report = held(forward, fxr.RuleSet("one", [another]), one=channels(3), two=Any3())
    assert bool(report.applied) == applied, report


def test_a_layer_that_reads_another_shape_makes_another_shape() -> None:
    """So a new layer that is alike may not be asked where what it reads is new as well."""

    @fxr.rule(pattern=fxr.chain(zero=nn.Tanh, one=nn.Conv2d, two=nn.AdaptiveAvgPool2d))
    def larger(m: Any) -> fxr.Revise:
        twice = nn.Sequential(nn.Upsample(scale_factor=2.0), nn.Softsign())
        return fxr.Revise(zero=twice, one=nets.randomise(channels(3), 1), two=Zero())

    def forward(m: Any, x: torch.Tensor) -> Any:
        y = m.one(m.zero(x))
        return m.two(y) * 0, x.new_zeros(y.shape)

    members = {"zero": nn.Tanh(), "one": channels(3), "two": nn.AdaptiveAvgPool2d(1)}
    _, report = held(forward, larger, **members)
    assert "not sure to have the same shape" in report.refused[0].reason


class Zero(nn.Module):
    """Gives nothing but the mean of each channel, times zero."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3), keepdim=True) * 0


@fxr.pattern
class Activated:
    """A convolution and an activation, and what they read."""

    x: fxr.Value
    one: nn.Conv2d
    two: nn.ReLU


class Twice(Both):
    """Reads its input twice."""

    def forward(self, x: torch.Tensor, again: torch.Tensor) -> torch.Tensor:
        return super().forward((x + again) / 2)


@pytest.mark.parametrize("before", [True, False])
def test_nothing_is_read_before_it_is_made(before: bool) -> None:
    """What stands where the chain ended can't be asked by who asked in its middle."""

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = m.one(x)
        size = y.size(1) if before else None
        z = m.two(y)
        return z * (y.size(1) if size is None else size)

    @fxr.rule(pattern=Activated)
    def twice(m: Activated) -> fxr.Replace:
        return fxr.Replace(Twice(m.one, m.two), inputs=(m.x,))

    _, report = held(forward, twice, one=channels(3), two=nn.ReLU())
    assert bool(report.applied) != before, report
    if before:
        assert "before there would be what replaces the chain" in report.refused[0].reason


def test_branches_have_nothing_that_stands_there() -> None:
    """Of a value inside a branch nothing may be read, its shape included."""

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = m.conv(x)
        return (y + m.other(x)) * y.size(1)

    _, report = held(forward, "reparam", other=conv())
    assert "needs it as it is" in str(report.refused[0].reason)
