"""Without example inputs, both answers to a question are looked at, and both must agree."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from nets import X, bn, conv, randomise
from torch import nn

import fxrewrite as fxr


def late(m: Any, x: torch.Tensor) -> Any:
    if x.sum() < -1e9:
        x = x + 1
    return m.bn(m.conv(x))


def on_one_side(m: Any, x: torch.Tensor) -> Any:
    return m.bn(m.conv(x)) if x.sum() > 0 else x


def on_both_sides(m: Any, x: torch.Tensor) -> Any:
    return m.bn(m.conv(x)) if x.sum() > 0 else m.bn(m.conv(-x)) + 1


def while_it_lasts(m: Any, x: torch.Tensor) -> Any:
    while x.sum() > 1e9:
        x = m.bn(m.conv(x)) / 2
    return x


def after_a_list(m: Any, x: torch.Tensor) -> Any:
    m.seen.append(1)
    return m.bn(m.conv(x))


def without_the_norm(m: Any, x: torch.Tensor) -> Any:
    y = m.conv(x)
    return m.bn(y) if x.sum() > 0 else y


def on_something_else(m: Any, x: torch.Tensor) -> Any:
    y = m.conv(x) if x.sum() > 0 else x
    return m.bn(y)


def read_on_one_side(m: Any, x: torch.Tensor) -> Any:
    y = m.conv(x)
    return m.bn(y) + y if x.sum() > 0 else m.bn(y)


FOLDED = [late, on_one_side, on_both_sides, while_it_lasts, after_a_list]
STAY = [without_the_norm, on_something_else, read_on_one_side]


def net(forward: Callable[[Any, Any], Any]) -> nn.Module:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn, self.seen = conv(), bn(), list[int]()

    Net.forward = forward  # type: ignore[method-assign, assignment]
    torch.manual_seed(0)
    return randomise(Net()).double().eval()


@pytest.mark.parametrize("forward", [*FOLDED, *STAY])
def test_what_follows_a_question_is_rewritten_where_both_answers_allow_it(forward: Any) -> None:
    """The model computes the same on both ways, without an error of the guard."""
    model = net(forward)
    made, report = fxr.rewrite(model, "conv_bn")
    assert report.into == "modules"
    assert bool(report.applied) is (forward in FOLDED)
    for x in (X, -X, X.abs(), -X.abs()):
        torch.testing.assert_close(made(x), model(x), rtol=1e-9, atol=1e-9)


def test_a_guess_leaves_the_model_as_it_was() -> None:
    """What the forward does on the way of a guess is undone."""

    def forward(m: Any, x: torch.Tensor) -> Any:
        if x.sum() > 0:
            m.seen.append(1)
        return m.bn(m.conv(x))

    model: Any = net(forward)
    fxr.rewrite(model, "conv_bn")
    assert model.seen == []


def test_a_part_that_asks_is_looked_at_by_both_answers_too() -> None:
    """Its own questions, also where the model around it could be traced but for that part."""
    model = nn.Sequential(net(late), nn.Tanh(), net(on_both_sides)).eval()
    made, report = fxr.rewrite(model, "conv_bn")
    assert {each.anchor for each in report.applied} == {"0.bn", "2.bn"}
    for x in (X, -X, X.abs(), -X.abs()):
        torch.testing.assert_close(made(x), model(x), rtol=1e-9, atol=1e-9)
