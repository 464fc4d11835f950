"""Where example inputs are given, rules see the shapes of the run; no reason asks for inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from nets import Forward, random_input, randomise
from torch import nn
from torch.nn import functional as F

import fxrewrite as fxr

X = random_input((3, 4))


def branching(m: Any, x: torch.Tensor) -> torch.Tensor:
    """Data decide what happens; the code calls layers itself, and a part."""
    if x.sum() > 1e9:
        return x
    return m.part(m.bn(m.lin(x)))


def net(forward: Any = branching, **members: nn.Module) -> nn.Module:
    """Linear layers with norms that may normalise another dimension, called by that code."""
    part = nn.Sequential(nn.Linear(5, 5), nn.Dropout(), nn.BatchNorm1d(5))
    layers = {"lin": nn.Linear(4, 5), "bn": nn.BatchNorm1d(5), "part": part, **members}
    return randomise(Forward(forward, **layers)).double().eval()


def test_the_rank_that_the_run_showed_decides() -> None:
    """In code that can't be traced, and in a part; a guard sees to it that it stays so."""
    model = net()
    assert len(fxr.plan(model, "affine").refused) == 2
    made, report = fxr.rewrite(model, "affine", X, expect={"affine": 2})
    assert {each.assurance for each in report.applied} == {"guarded"}
    for x in (X, random_input((7, 4))):
        torch.testing.assert_close(made(x), model(x), rtol=0, atol=1e-12)
    with pytest.raises(fxr.errors.GuardError):
        made(random_input((3, 5, 4)))


def test_another_rank_in_the_run_refuses_it() -> None:
    """The norm of three dimensions normalises another one."""
    model, x = net(), random_input((3, 5, 4))
    report = fxr.plan(model, "affine", x)
    assert not report.applied
    assert {each.reason for each in report.refused} == {
        "a BatchNorm1d normalises dimension 1 of the 3-d tensor between, which is not that of the "
        "Linear's channels"
    }


def test_of_several_ranks_none_is_taken() -> None:
    """A layer that is called on both is refused, for the one that does not fit."""

    def twice(m: Any, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 1e9:
            return x
        return m.bn(m.lin(x)).sum() + m.bn(m.lin(x[:, None].expand(-1, 5, -1))).sum()

    report = fxr.plan(net(twice), "affine", X)
    assert not report.applied
    assert not any("would" in each.reason for each in report.refused)


def test_a_call_that_raises_is_no_call_of_the_run() -> None:
    """As where code tries a call with more arguments first; the reason says so."""

    def trying(m: Any, x: torch.Tensor) -> torch.Tensor:
        for layer in (m.lin, m.bn):
            try:
                x = layer(x, lengths=None)
            except TypeError:
                x = layer(x)
        return x

    for trust in (None, "run"):
        _, report = fxr.rewrite(net(trying), "affine", X, trust=trust)  # type: ignore[arg-type]
        (reason,) = {each.reason for each in report.refused if each.anchor == "bn"}
        assert (
            reason == "in the run on the example inputs a call of lin raised, and the model went on"
        )


def uncalled(m: Any, x: torch.Tensor) -> torch.Tensor:
    return m.lin(x) if x.sum() < 1e9 else m.bn(m.lin(x))


def by_data(m: Any, x: torch.Tensor) -> torch.Tensor:
    return m.bn(m.lin(x[x.sum(-1) < 1e9])).flatten(1).float().double() + 0


def twice(m: Any, x: torch.Tensor) -> torch.Tensor:
    if x.sum() > 1e9:
        return x
    return m.part(m.lin(x)).sum() + m.part(m.lin(x[:2])).flatten(1).double().sum()


def no_tensor(m: Any, x: torch.Tensor) -> torch.Tensor:
    return m.bn(F.linear(x, m.lin.weight)) * x.shape[0] + 0


@pytest.mark.parametrize("into", [None, "modules"])
@pytest.mark.parametrize("forward", [branching, uncalled, by_data, twice, no_tensor])
def test_no_reason_asks_for_what_was_given(forward: Any, into: Any) -> None:
    """Not that example inputs would decide it, and not that a run would show it."""
    sets = ["inference", "reparam", "merge_siblings"]
    options = {"into": into} if into else {}
    without = fxr.plan(net(forward), sets, **options)
    report = fxr.plan(net(forward), sets, X, **options)
    asks = ("example_inputs would", "run on example_inputs would", "call rewrite with")
    reasons = [each.reason for each in (*report.refused, *report.missed)]
    assert not [each for each in reasons if any(ask in each for ask in asks)]
    if forward in (branching, uncalled):
        told = [each.reason for each in (*without.refused, *without.missed)]
        assert [each for each in told if any(ask in each for ask in asks)]


def test_what_the_run_does_not_call_is_said_to_be_so() -> None:
    """A norm in code that was not traced, and not reached."""

    def never(m: Any, x: torch.Tensor) -> torch.Tensor:
        return m.lin(x) if x.sum().item() < 1e9 else m.bn(m.lin(x))

    (missed,) = (each for each in fxr.plan(net(never), "affine", X).missed if each.anchor == "bn")
    assert missed.reason.endswith("the run on the example_inputs did not call it either")
