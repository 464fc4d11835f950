"""Any layer, with whatever options, computes with a fold what it computed before it."""

from __future__ import annotations

import copy
from typing import Any

import nets
import pytest
import torch
from checks import Record, largest_error, outputs
from fxrewrite.patterns import backward, reparam
from fxrewrite.patterns.affine import reading_scaled
from hypothesis import assume, example, given
from hypothesis import strategies as st
from torch import nn

import fxrewrite as fxr

TRANSPOSED: dict[int, Any] = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
SIDE = 7  # as long as a kernel of 4 with a dilation of 2


def rewritten(model: nn.Module, x: torch.Tensor, rules: Any) -> fxr.Report:
    """The report of a rewrite that leaves the model alone and gives what it gave."""
    expected, before = outputs(copy.deepcopy(model), x), Record(model)
    made, report = fxr.rewrite(model, rules, x)
    before.assert_unchanged(versions=False)
    assert largest_error(expected, outputs(made, x)) <= 1e-9, report
    return report


def norm_before(layer: Any) -> tuple[nn.Module, torch.Tensor]:
    """A norm with numbers of its own per channel before a layer, and an input."""
    rank = layer.weight.dim() - 2
    model = nets.randomise(nn.Sequential(nets.BATCH_NORMS[rank](layer.in_channels), layer))
    return model.double(), nets.random_input((2, layer.in_channels, *[SIDE] * rank))


ranks, groups, per_group = st.sampled_from([1, 1, 2, 3]), st.integers(1, 3), st.integers(1, 3)


@st.composite
def convolutions(draw: Any) -> nn.Module:
    """Of any kernel, even and odd, and any padding."""
    rank, count = draw(ranks), draw(groups)
    padding: Any = draw(st.sampled_from(["same", "valid", 0, 1]))
    return nets.CONVS[rank](  # type: ignore[no-any-return]
        count * draw(per_group),
        count * draw(per_group),
        draw(st.integers(1, 4)),
        stride=1 if padding == "same" else draw(st.integers(1, 2)),
        padding=padding,
        dilation=draw(st.integers(1, 2)),
        groups=count,
        bias=draw(st.booleans()),
        padding_mode=draw(st.sampled_from(["zeros", "zeros", "circular"])),
    )


@st.composite
def transposed_convolutions(draw: Any) -> nn.Module:
    """Of any groups, stride, dilation, padding, and remainder that one of these allows."""
    rank, count = draw(ranks), draw(groups)
    kernel, dilation = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    stride = draw(st.sampled_from([1, 1, 2]))
    return TRANSPOSED[rank](  # type: ignore[no-any-return]
        count * draw(per_group),
        count * draw(per_group),
        kernel,
        stride=stride,
        # So much crops all outputs that see a part of the input alone.
        padding=draw(st.sampled_from([0, dilation * (kernel - 1)])),
        output_padding=draw(st.integers(0, max(stride, dilation) - 1)),
        dilation=dilation,
        groups=count,
        bias=draw(st.booleans()),
    )


@pytest.mark.slow
@given(convolutions())
@example(nn.Conv2d(4, 6, 2, padding="same"))
@example(nn.Conv1d(4, 6, 4, padding="same", dilation=2, groups=2))
def test_a_norm_before_a_convolution(layer: nn.Module) -> None:
    """A fold keeps what the kernel sees at the border, where padding of any kind is."""
    rewritten(*norm_before(layer), backward.fold_norm_before)


@pytest.mark.slow
@given(transposed_convolutions())
@example(nn.ConvTranspose2d(4, 6, 1, groups=2))
@example(nn.ConvTranspose1d(4, 6, 1, dilation=2, output_padding=1))
@example(nn.ConvTranspose1d(4, 6, 3, padding=6, dilation=3, output_padding=2))
def test_a_norm_before_a_transposed_convolution(layer: nn.Module) -> None:
    """A fold keeps outputs that see no input, and tells the groups apart."""
    model, x = norm_before(layer)
    assume(_runs(model, x))
    rewritten(model, x, backward.fold_norm_before)


def _runs(model: nn.Module, x: torch.Tensor) -> bool:
    try:
        outputs(model, x)
    except RuntimeError:  # such as an output of no size
        return False
    return True


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, 2),
        nn.Conv2d(4, 6, 1, padding="same"),
        nn.Conv2d(4, 6, 2, padding="same", padding_mode="circular"),
        nn.ConvTranspose2d(4, 6, 1, groups=2),
        nn.ConvTranspose2d(4, 6, 3, padding=4, dilation=2),
    ],
)
def test_a_norm_before_a_layer_without_a_border_folds(layer: nn.Module) -> None:
    """Where each output sees a whole kernel of inputs, the fold is made."""
    assert len(rewritten(*norm_before(layer), backward.fold_norm_before).applied) == 1


@given(ranks, groups, per_group, per_group, st.booleans(), st.booleans())
def test_scale_and_shift_of_inputs_are_of_their_own_group(
    rank: int, count: int, inputs: int, made: int, transposed: bool, bias: bool
) -> None:
    """`reading_scaled` computes `layer(x * scale + shift)`, whatever the groups."""
    kind = (TRANSPOSED if transposed else nets.CONVS)[rank]
    layer = kind(count * inputs, count * made, 1, groups=count, bias=bias).double()
    size = (count * inputs, *[1] * rank)
    scale, shift = nets.random_input(size, 1), nets.random_input(size, 2)
    x = nets.random_input((2, count * inputs, *[3] * rank))
    found = reading_scaled(layer, scale.flatten(), shift.flatten())(x)
    torch.testing.assert_close(found, layer(x * scale + shift), rtol=0, atol=1e-9)


def signed(first: str, second: str, swap: bool) -> Any:
    """A forward that joins three layers by these signs."""

    def plus(a: Any, b: Any, sign: str) -> Any:
        return a + b if sign == "+" else a - b

    def forward(m: Any, x: torch.Tensor) -> Any:
        pair, third = plus(m.a(x), m.b(x), first), m.c(x)
        return plus(third, pair, second) if swap else plus(pair, third, second)

    return forward


@pytest.mark.slow
@given(st.sampled_from("+-"), st.sampled_from("+-"), st.booleans(), st.permutations("abc"))
def test_three_layers_that_are_added_and_subtracted(
    first: str, second: str, swap: bool, names: list[str]
) -> None:
    """Whichever sign, and whichever layer is the one that reads all: the sum is the same."""
    layers = [
        nn.Conv2d(4, 4, 3, padding=1),
        nn.Conv2d(4, 4, (1, 3), padding=(0, 1)),
        nn.Conv2d(4, 4, (3, 1), padding=(1, 0)),
    ]
    model = nets.Forward(signed(first, second, swap), **dict(zip(names, layers, strict=True)))
    report = rewritten(model.double(), nets.X, reparam.reparam)
    if first == second == "+":
        assert len(report.applied) == (1 if names[0] == "c" else 2)
