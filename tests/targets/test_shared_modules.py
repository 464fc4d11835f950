"""Modules that a forward calls at several places, and what they become in a module tree."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from nets import Forward, X, bn, conv, randomise
from torch import nn

import fxrewrite as fxr


def apart(m: Any, x: torch.Tensor) -> Any:
    one, other = m.conv(x), m.conv(x * 2)
    return m.bn(one) + m.bn(other)


# How often the rule applies to each, of which all calls become calls of the same.
TOGETHER: dict[str, tuple[Callable[[Any, Any], Any], int]] = {
    "both in turn": (lambda m, x: m.bn(m.conv(x)) + m.bn(m.conv(x * 2)), 2),
    "both at once": (apart, 2),
    "in a loop": (lambda m, x: sum(m.bn(m.conv(x * i)) for i in range(3)), 3),
    "one norm": (lambda m, x: m.bn(m.conv(x)) + m.bn(m.conv2(x * 2)), 2),
    "one dropout": (lambda m, x: m.bn2(m.drop(m.conv2(m.bn(m.drop(m.conv(x)))))), 2),
    "a dropout elsewhere": (lambda m, x: m.bn(m.drop(m.conv(x))) + m.drop(x), 1),
}
# Those of which some calls would have to stay as they are.
TORN: dict[str, Callable[[Any, Any], Any]] = {
    "two norms": lambda m, x: m.bn(m.conv(x)) + m.bn2(m.conv(x * 2)),
    "without the norm": lambda m, x: m.bn(m.conv(x)) + m.conv(x * 2),
    "the norm alone": lambda m, x: m.bn(m.conv(x)) + m.bn(x),
    "the weight": lambda m, x: m.bn(m.conv(x)) + m.conv.weight.mean() + m.bn(m.conv(x * 2)),
}


class Net(nn.Module):
    """Two convolutions and two norms under a forward that asks or does not."""

    def __init__(self, run: Callable[[Any, Any], Any], asks: bool) -> None:
        super().__init__()
        self.conv, self.conv2, self.bn, self.bn2 = conv(), conv(), bn(), bn()
        self.drop, self.run, self.asks = nn.Dropout(), run, asks

    def forward(self, x: torch.Tensor) -> Any:
        if self.asks and x.sum() < -1e9:
            return x
        return self.run(self, x)


def names_of(run: Any) -> set[str]:
    """What a function mentions."""
    inner = [each for each in run.__code__.co_consts if hasattr(each, "co_names")]
    return {name for code in (run.__code__, *inner) for name in code.co_names}


def net(run: Callable[[Any, Any], Any], *, asks: bool) -> nn.Module:
    torch.manual_seed(0)
    return randomise(Net(run, asks)).double().eval()


@pytest.mark.parametrize("asks", [False, True], ids=["traced", "seen in a run"])
@pytest.mark.parametrize("example", [None, X], ids=["", "example inputs"])
@pytest.mark.parametrize(("run", "applied"), TOGETHER.values(), ids=TOGETHER)
def test_a_module_may_change_if_all_its_calls_do(
    run: Any, applied: int, example: Any, asks: bool
) -> None:
    """The model computes the same, without an error of the guard."""
    model = net(run, asks=asks)
    made, report = fxr.rewrite(model, "conv_bn", example, into="modules")
    torch.testing.assert_close(made(X), model(X), rtol=1e-9, atol=1e-9)
    if asks:  # what is called several times on what the same gave is one call to a run
        changed = {to for each in report.applied for _, to in each.steps if "conv" in to}
        assert changed == {"conv", "conv2"} & names_of(run)
    else:
        assert len(report.applied) == applied


@pytest.mark.parametrize("asks", [False, True], ids=["traced", "seen in a run"])
@pytest.mark.parametrize("run", TORN.values(), ids=TORN)
def test_a_module_stays_if_one_of_its_calls_does(run: Any, asks: bool) -> None:
    model = net(run, asks=asks)
    for example in (None, X):
        made, report = fxr.rewrite(model, "conv_bn", example, into="modules")
        assert not report.applied
        assert torch.equal(made(X), model(X))


@pytest.mark.parametrize("name", ["both in turn", "both at once", "in a loop", "one norm"])
def test_in_a_graph_it_keeps_its_name(name: str) -> None:
    """The keys of the state dict are those of the model, without the norm's."""
    run, applied = TOGETHER[name]
    model = net(run, asks=False)
    made, report = fxr.rewrite(model, "conv_bn", expect={"conv_bn": applied})
    torch.testing.assert_close(made(X), model(X), rtol=1e-9, atol=1e-9)
    expected = {"conv.weight", "conv.bias", "conv2.weight", "conv2.bias"}
    assert made.state_dict().keys() == {k for k in expected if name == "one norm" or "2" not in k}
    assert report.parameter_names["conv.weight"].how == "changed"


def test_one_activation_for_many_calls_keeps_its_name() -> None:
    """As the ReLU of a block of a ResNet, once it no longer writes in place."""

    @fxr.pattern
    class Act:
        act: nn.ReLU

    @fxr.rule
    def smooth(m: Act) -> fxr.Replace:
        return fxr.Replace(nn.PReLU(), slot="act")

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.relu = conv(), nn.ReLU()

        def forward(self, x: torch.Tensor) -> Any:
            return self.relu(self.conv(self.relu(x)) + x)

    for into in ("graph", "modules"):
        made, _ = fxr.rewrite(Block().eval(), smooth, into=into, expect={"smooth": 2})
        assert {"relu.weight"} == {k for k in made.state_dict() if "conv" not in k}


def test_a_chain_that_calls_one_module_twice_stays() -> None:
    """What it becomes would be called as often as the module was."""
    model = Forward(lambda m, x: m.conv(m.conv(x)), conv=nn.Conv2d(4, 4, 1, bias=False))
    made, report = fxr.rewrite(model.double(), "affine", into="modules")
    assert "calls one module more than once" in report.refused[0].reason
    torch.testing.assert_close(made(X), model(X), rtol=0, atol=0)


@pytest.mark.parametrize("inputs", [None, X], ids=["", "example inputs"])
def test_a_shared_norm_behind_a_norm_that_goes_is_behind_what_that_read(inputs: Any) -> None:
    """What a shared module is called on changes as others are folded."""
    members = {"conv": conv(), "bn": bn(), "conv_": conv(), "shared": bn()}
    model = Forward(lambda m, x: m.shared(m.conv_(m.shared(m.bn(m.conv(x))))), **members)
    model = randomise(model).double().eval()
    made, _ = fxr.rewrite(model, "conv_bn", inputs, into="modules", expect={"conv_bn": 3})
    torch.testing.assert_close(made(X), model(X), rtol=1e-9, atol=1e-9)
