"""What is exact for some ranks, shapes or types only: a rule asks, or a limit is stated here."""

from __future__ import annotations

import copy
from typing import Any

import nets
import pytest
import torch
import torchvision
from hypothesis import given, reject
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import fxrewrite as fxr
from fxrewrite.testing import randomise

SETS = ["conv_bn", "affine", "reparam", "inference"]
TRANSPOSED: dict[int, Any] = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
INSTANCE: dict[int, Any] = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}


def layer_of(draw: Any, dims: int, channels: int, made: int) -> nn.Module:
    if dims == 0:
        return nn.Linear(channels, made, bias=draw(st.booleans()))
    kind = draw(st.sampled_from([nets.CONVS, TRANSPOSED]))[dims]
    return kind(channels, made, draw(st.sampled_from([1, 1, 3])), padding=draw(st.integers(0, 1)))


def norm_of(draw: Any, dims: int, channels: int) -> nn.Module:
    kinds: list[Any] = [nets.BATCH_NORMS[dims or 1], nn.BatchNorm1d, nn.SyncBatchNorm]
    kinds.append(torchvision.ops.FrozenBatchNorm2d)
    kinds.append(lambda c: INSTANCE[dims or 1](c, affine=True, track_running_stats=True))
    return draw(st.sampled_from(kinds))(channels)


OPERATIONS: list[Any] = [
    lambda x, c: x * c,
    lambda x, c: c + x,
    lambda x, c: c - x,
    lambda x, c: x / c,
    lambda x, c: torch.add(x, c, alpha=2),
]


class Chain(nn.Module):
    """A layer, and a partner before it, behind it or beside it; `constant` may be the partner."""

    def __init__(self, where: str, layer: Any, partner: Any, constant: Any) -> None:
        super().__init__()
        self.where, self.layer, self.operation = where, layer, partner
        self.constant = nn.Parameter(constant)

    def meet(self, x: torch.Tensor) -> torch.Tensor:
        if isinstance(self.operation, nn.Module):
            return self.operation(x)
        return self.operation(x, self.constant)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.where == "before":
            return self.layer(self.meet(x))
        return self.meet(self.layer(x)) if self.where == "behind" else self.layer(x) + self.meet(x)

    def extra_repr(self) -> str:
        return f"{self.where}, a constant of shape {tuple(self.constant.shape)}"


@st.composite
def chains(draw: Any) -> tuple[nn.Module, list[torch.Tensor], torch.dtype]:
    """A chain, with an example and further inputs of the same rank and type, batched or not."""
    dims = draw(st.integers(0, 3))
    channels = draw(st.integers(1, 3))
    made = draw(st.sampled_from([channels, channels, 1, 2]))
    where = draw(st.sampled_from(["before", "behind", "beside"]))
    meets = made if where == "behind" else channels
    rank = draw(st.integers(1, 4)) if dims == 0 else draw(st.sampled_from([dims + 1, dims + 2]))
    at = rank - 1 - dims

    def sized() -> torch.Tensor:
        sizes = [draw(st.sampled_from([channels, 3, 4])) for _ in range(rank)]
        sizes[at] = draw(st.sampled_from([channels, channels, channels, 1]))
        return nets.random_input(tuple(sizes), draw(st.integers(0, 3)))

    partner = norm_of(draw, dims, meets) if draw(st.booleans()) else draw(
        st.sampled_from(OPERATIONS)
    )  # fmt: skip
    shape = [draw(st.sampled_from([1, 1, meets, 3])) for _ in range(draw(st.integers(0, rank + 1)))]
    model = Chain(where, layer_of(draw, dims, channels, made), partner, torch.ones(shape))
    randomise(model, draw(st.integers(0, 99)))
    with torch.no_grad():
        model.constant.copy_(nets.random_input(tuple(shape), 1) + 3)
    return model, [sized() for _ in range(3)], draw(st.sampled_from(list(ROUNDING)))


def ran(model: nn.Module, x: torch.Tensor) -> torch.Tensor | None:
    try:
        with torch.no_grad():
            return model(x)
    except (RuntimeError, ValueError):
        return None


@pytest.mark.slow
@given(chains(), st.sampled_from(SETS))
def test_an_example_decides_for_its_rank_and_type(case: Any, rules: str) -> None:
    """With example inputs, no input of their ranks and types gives another result.

    What the chain spreads from one channel over several raises afterwards, and never else.
    """
    model, inputs, dtype = case
    exact, model = copy.deepcopy(model).double(), model.to(dtype)
    example, *others = (x.to(dtype) for x in inputs)
    if ran(model, example) is None:
        reject()
    made, report = fxr.rewrite(model, rules, example)
    channels = example.shape[-1 - spatial(model.layer)]
    for x in (example, *others):
        expected, found = ran(model, x), ran(made, x)
        if expected is None or not expected.numel():
            continue
        if found is None and x is not example:
            assert x.shape[-1 - spatial(model.layer)] == 1 != channels, report
            continue
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype), report
        right = ran(exact, x.double())
        own, of_rewritten = ((each.double() - right).abs().max() for each in (expected, found))
        assert of_rewritten <= 8 * own + ROUNDING[dtype] * (1 + right.abs().max()), report


def spatial(layer: Any) -> int:
    return layer.weight.dim() - 2


def call_of_batch_norm(m: Any, x: torch.Tensor) -> torch.Tensor:
    bn = m.bn
    return F.batch_norm(m.conv(x), bn.running_mean, bn.running_var, bn.weight, bn.bias)


def beside(m: Any, x: torch.Tensor) -> torch.Tensor:
    return m.conv(x) + m.bn(x)


# What takes an input without a batch, and then normalises another dimension or adds one.
LENIENT: dict[str, tuple[str, nn.Module, Any]] = {
    "Conv1d, BatchNorm1d": ("conv_bn", nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4)),
    "the same in affine": ("affine", nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4)),
    "Conv2d, FrozenBatchNorm2d": (
        "affine", nn.Conv2d(4, 4, 1), torchvision.ops.FrozenBatchNorm2d(4),
    ),
    "Conv2d, SyncBatchNorm": ("affine", nn.Conv2d(4, 4, 1), nn.SyncBatchNorm(4)),
    "Conv2d, F.batch_norm": ("conv_bn", nn.Conv2d(4, 4, 1), call_of_batch_norm),
}  # fmt: skip


@pytest.mark.parametrize("name", LENIENT)
def test_without_an_example_a_convolution_is_taken_to_read_a_batch(name: str) -> None:
    """Such pairs fold, and differ on an input without a batch; an example of that rank refuses."""
    rules, conv, norm = LENIENT[name]
    if isinstance(norm, nn.Module):
        model: nn.Module = nn.Sequential(conv, norm)
    else:
        model = nets.Forward(norm, conv=conv, bn=nn.BatchNorm2d(4))
    randomise(model).double()
    made, _ = fxr.rewrite(model, rules, expect={rules: 1})
    batched = nets.random_input((2, *[4] * (conv.weight.dim() - 1)))
    single = batched[0]
    torch.testing.assert_close(made(batched), model(batched))
    expected, found = model(single), made(single)
    assert expected.shape != found.shape or not torch.allclose(expected, found)
    told, report = fxr.rewrite(model, rules, single)
    assert not report.applied
    assert "no batch dimension" in str(report) or "normalises dimension 1" in str(report) or (
        "does not normalise" in str(report)
    )  # fmt: skip
    assert torch.equal(told(single), expected)


@pytest.mark.parametrize("partner", [nn.BatchNorm1d(4), nn.SyncBatchNorm(4)], ids=["1d", "sync"])
@pytest.mark.parametrize("rules", ["affine", "reparam"])
def test_before_and_beside_a_convolution_a_lenient_norm_needs_an_example(
    rules: str, partner: nn.Module
) -> None:
    """There the rank decides, and without example inputs it is not known."""
    conv = nn.Conv1d(4, 4, 1)
    model = nn.Sequential(partner, conv) if rules == "affine" else None
    model = model or nets.Forward(beside, conv=conv, bn=partner)
    report = fxr.plan(model.eval(), rules)
    assert not report.applied
    assert "example_inputs would decide it" in str(report)
    assert len(fxr.plan(model, rules, torch.randn(2, 4, 5)).applied) == 1
    assert not fxr.plan(model, rules, torch.randn(4, 4)).applied


def test_a_channel_that_a_constant_spreads_over_several_raises_afterwards() -> None:
    """A limit: the layer reads what the constant read, and that had to be spread out first."""
    scale = nn.Parameter(torch.randn(4, 1, 1))
    model = nets.Forward(lambda m, x: m.conv(x * m.scale), conv=nn.Conv2d(4, 2, 1), scale=scale)
    made, _ = fxr.rewrite(model, "affine", torch.randn(2, 4, 5, 5), expect={"affine": 1})
    gray = torch.randn(2, 1, 5, 5)
    assert model(gray).shape == (2, 2, 5, 5)
    with pytest.raises(RuntimeError, match="expected input"):
        made(gray)
    assert not fxr.plan(model, "affine", gray).applied


def test_under_autocast_a_constant_that_is_folded_does_not_widen() -> None:
    """A limit: there a float32 constant makes float32 of what a layer makes in half precision."""
    gamma = nn.Parameter(torch.randn(4, 1, 1))
    model = nets.Forward(lambda m, x: m.conv(x) * m.gamma, conv=nn.Conv2d(4, 4, 1), gamma=gamma)
    made, _ = fxr.rewrite(model, "affine", expect={"affine": 1})
    x = torch.randn(2, 4, 5, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(x).dtype == torch.float32
        assert made(x).dtype == torch.bfloat16
