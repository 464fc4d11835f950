"""States of the thread and gradients of its own, which no graph records, stop a trace."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import checks
import pytest
import torch
from nets import X, conv_bn
from torch import fx

import fxrewrite as fxr


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * 3


def double(x: torch.Tensor) -> torch.Tensor:
    return Doubled.apply(x)


fx.wrap("double")


def test_a_custom_autograd_function_is_not_traced_through() -> None:
    """Its own backward would be lost in a graph, so tracing stops there."""
    with pytest.raises(
        fxr.errors.TraceError, match=r"gradients = False, which a graph does not record"
    ):
        fxr.rewrite(conv_bn(lambda m, x: Doubled.apply(m.bn(m.conv(x)))), "conv_bn", into="graph")


def test_a_wrapped_function_is_one_node() -> None:
    """What `torch.fx.wrap` declares a leaf stays whole, and its own backward is kept."""
    model = conv_bn(lambda m, x: double(m.bn(m.conv(x)))).double()
    fused, _ = checks.folded(model, X, applied=1)
    expected, found = (torch.ones_like(X, requires_grad=True) for _ in range(2))
    model(expected).sum().backward()
    fused(found).sum().backward()
    assert checks.largest_error([expected.grad], [found.grad]) <= 1e-9


REGIONS: list[Callable[[], AbstractContextManager[Any]]] = [
    lambda: torch.autocast("cpu", torch.bfloat16),
    torch.no_grad,
    torch.inference_mode,
]


@pytest.mark.parametrize("region", REGIONS, ids=["autocast", "no_grad", "inference_mode"])
def test_a_region_of_another_state_is_not_lost(region: Any) -> None:
    """A graph does not record autocast, no_grad or inference mode, so tracing stops at it."""

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = m.conv(x)
        with region():
            return m.bn(y)

    with pytest.raises(fxr.errors.TraceError, match=r"which a graph does not record") as error:
        fxr.rewrite(conv_bn(forward), "conv_bn", into="graph")
    assert "return m.bn(y)" in str(error.value)


@pytest.mark.parametrize("region", REGIONS, ids=["autocast", "no_grad", "inference_mode"])
def test_a_region_around_the_model_is_the_callers(region: Any) -> None:
    """Under autocast the result computes in half precision, as the model does."""
    model = conv_bn().float()
    fused, x = fxr.fuse(model), X.float()
    with region():
        assert fused(x).dtype == model(x).dtype
        assert checks.largest_error([model(x).float()], [fused(x).float()]) <= 2e-2
