"""Functional calls around the same tensors are read as one module only where all is the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import nets
import pytest
import torch
from checks import largest_error, outputs
from torch.nn import functional as F

import fxrewrite as fxr


def norm(m: Any, x: torch.Tensor, eps: float) -> torch.Tensor:
    bn = m.bn
    return F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, False, 0.1, eps)


def convolved(m: Any, x: torch.Tensor, **options: Any) -> torch.Tensor:
    given = {"padding": 1, **options}
    return norm(m, F.conv2d(x, m.conv.weight, m.conv.bias, **given), 1e-5)


TWICE: dict[str, tuple[Callable[..., torch.Tensor], Any, Any]] = {
    "eps": (lambda m, x, eps: norm(m, m.conv(x), eps), 1e-5, 0.5),
    "dilation": (lambda m, x, by: convolved(m, x, padding=by, dilation=by), 1, 2),
    "stride": (lambda m, x, by: convolved(m, x, stride=by).mean((2, 3)), 1, 2),
    "padding": (lambda m, x, by: convolved(m, x, padding=by).mean((2, 3)), 0, 1),
    "the tensor": (lambda m, x, name: norm(m, getattr(m, name)(x), 1e-5), "conv", "other"),
}


@pytest.mark.parametrize("differ", TWICE)
@pytest.mark.parametrize("same", [False, True])
def test_two_calls_that_differ_in_a_number_are_of_two_modules(differ: str, same: bool) -> None:
    """Each keeps its own number, in whatever order they stand."""
    call, one, two = TWICE[differ]

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        return call(m, x, one) - 2.0 * call(m, x + 1.0, one if same else two)

    members = {"conv": nets.conv(), "other": nets.conv(), "bn": nets.bn()}
    model = nets.Forward(forward, **members).double()
    with torch.no_grad():
        for parameter in model.other.parameters():
            parameter.neg_()
    expected = outputs(model, nets.X)
    made, report = fxr.rewrite(model, "conv_bn")
    assert len(report.applied) == 2
    assert len({each.became for each in report.applied}) == (1 if same else 2)
    assert largest_error(expected, outputs(made, nets.X)) <= 1e-9
