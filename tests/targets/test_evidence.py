"""With example inputs, one run of the original checks what goes into a module tree."""

from __future__ import annotations

from typing import Any

import checks
import pytest
import torch
from nets import Forward, X, bn, conv
from torch import nn
from torch.nn import functional as F

import fxrewrite as fxr


def branch(m: Any, x: torch.Tensor) -> torch.Tensor:
    """Data decide what happens, so this can't be traced."""
    return m.a(x) if x.sum() > -1e9 else m.b(x)


def parts(**members: nn.Module) -> nn.Module:
    return Forward(branch, **{"a": nn.Identity(), "b": nn.Identity(), **members}).double()


def pair(x: torch.Tensor, m: Any) -> Any:
    return m.bn(m.conv(x))


CASES = {
    "another input": (lambda m, x: m.bn(m.conv(x)) + m.bn(x), "something else than what"),
    "another reader": (lambda m, x: m.bn(m.conv(x)) + m.conv(x), "2 times and"),
}


@pytest.mark.parametrize(("forward", "said"), CASES.values(), ids=list(CASES))
def test_a_run_refuses_what_it_does_otherwise(forward: Any, said: str) -> None:
    """Without a run, both answers of a question are looked at."""
    part = Forward(lambda m, x: m.bn(m.conv(x)), conv=conv(), bn=bn())

    def outer(m: Any, x: torch.Tensor) -> Any:
        return m.part(x) if x.sum() < -1e9 else forward(m.part, x)

    model = Forward(outer, part=part).double()
    expected = checks.outputs(model, X)
    made, report = fxr.rewrite(model, "conv_bn", X)
    assert said in report.refused[0].reason
    assert checks.largest_error(expected, checks.outputs(made, X)) <= 1e-9
    made, report = fxr.rewrite(model, "conv_bn")
    assert "is used elsewhere too" in report.refused[0].reason
    assert checks.largest_error(expected, checks.outputs(made, X)) <= 1e-9


@pytest.mark.parametrize("drop", [False, True])
def test_a_run_agrees_with_what_is_right(drop: bool) -> None:
    layers = [conv(), *([nn.Dropout()] if drop else []), bn(), bn()]
    model = parts(a=nn.Sequential(*layers))
    expected = checks.outputs(model, X)
    made, report = fxr.rewrite(model, "conv_bn", X, expect={"conv_bn": 2})
    assert checks.largest_error(expected, checks.outputs(made, X)) <= 1e-9
    assert report.into == "modules"


def test_the_run_leaves_nothing_behind() -> None:
    """Buffers, hooks, attributes and torch's random numbers are as they were."""
    model = parts(a=nn.Sequential(conv(), bn(), nn.Dropout()), b=bn().train())
    model.a[2].train()
    before, state = checks.Record(model), torch.get_rng_state()
    fxr.rewrite(model, "conv_bn", X)
    before.assert_unchanged(versions=False)
    assert torch.equal(torch.get_rng_state(), state)


def test_inputs_that_the_model_does_not_take_are_an_error() -> None:
    model = parts(a=nn.Sequential(conv(), bn()))
    with pytest.raises(
        fxr.errors.FxRewriteError, match="can't be called with these example_inputs"
    ):
        fxr.rewrite(model, "conv_bn", X[:, :2])


@fxr.pattern
class Act:
    """An activation, and what it reads."""

    x: fxr.Value
    act: nn.ReLU


@fxr.rule(where=[fxr.known_rank("x")])
def tanh(m: Act) -> fxr.Replace:
    return fxr.Replace(nn.Tanh())


def test_rules_learn_shapes_in_parts_that_are_always_called_with_the_same() -> None:
    model = parts(a=nn.Sequential(nn.ReLU()))
    assert not fxr.plan(model, tanh).applied
    assert fxr.plan(model, tanh, X).applied

    def twice(m: Any, x: torch.Tensor) -> Any:
        return m.a(x).sum() + m.a(x[:1]).sum() if x.sum() > -1e9 else x

    model = Forward(twice, a=nn.Sequential(nn.ReLU())).double()
    assert not fxr.plan(model, tanh, X).applied


def twice(second: Any, **members: nn.Module) -> nn.Module:
    """A model that calls a block on what it is given and on something else made of that."""

    def forward(m: Any, x: torch.Tensor) -> Any:
        return m.a(x).sum() + m.a(second(x)).sum() if x.sum() > -1e9 else x

    return Forward(forward, **members).double()


def block(kind: Any) -> nn.Module:
    layers = kind(3, 3, 1), (nn.BatchNorm1d if kind is nn.Conv1d else nn.BatchNorm2d)(3)
    return nn.Sequential(*layers)


@pytest.mark.parametrize("second", [lambda x: x + 1, lambda x: x[:1]], ids=["alike", "smaller"])
def test_a_block_that_is_called_twice_on_one_rank_folds(second: Any) -> None:
    model, x = twice(second, a=block(nn.Conv2d)), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    expected = checks.outputs(model, x)
    made, report = fxr.rewrite(model, "conv_bn", x)
    assert report.applied
    assert checks.largest_error(expected, checks.outputs(made, x)) <= 1e-9


def test_a_block_that_is_also_called_on_what_a_rule_refuses_stays() -> None:
    """A batch norm in one dimension normalises no channels where there is no batch."""
    model, x = twice(lambda x: x[0], a=block(nn.Conv1d)), torch.randn(2, 3, 3).double()
    expected = checks.outputs(model, x)
    made, report = fxr.rewrite(model, "conv_bn", x)
    assert "also called on a tensor of shape (3, 3): the Conv1d" in report.refused[0].reason
    assert checks.largest_error(expected, checks.outputs(made, x)) <= 1e-9


def test_a_rule_is_asked_once_more_where_a_module_is_called_again() -> None:
    """Of all calls the run showed the rank; where it did not go, the guard asks for it."""
    x = torch.randn(2, 3, 3).double()
    assert fxr.plan(twice(lambda x: x + 1, a=nn.Sequential(nn.ReLU())), tanh, x).applied

    def forward(m: Any, x: torch.Tensor) -> Any:
        return m.a(x) if x.sum() > -1e9 else m.a(x[0])

    model = Forward(forward, a=nn.Sequential(nn.ReLU()))
    made, report = fxr.rewrite(model, tanh, x)
    assert report.applied
    made(x)
    with pytest.raises(fxr.errors.GuardError, match=r"a.0 was called on a tensor of 2 dimensions"):
        made(x - 1e9)


@fxr.rule
def add_rank(m: Act) -> fxr.Replace:
    return fxr.Replace(nn.Threshold(0.0, float(m.x.rank or 0)))


def test_a_rule_that_wants_something_else_at_another_call_is_refused() -> None:
    x = torch.randn(2, 3, 3).double()
    report = fxr.plan(twice(lambda x: x[0], a=nn.Sequential(nn.ReLU())), add_rank, x)
    assert "the rule asks for something else there" in report.refused[0].reason


def test_what_is_no_module_is_named_with_its_part() -> None:
    def functional(m: Any, x: torch.Tensor) -> Any:
        return F.batch_norm(x, torch.zeros(4), torch.ones(4))

    a, b = Forward(functional, bn=bn()), Forward(functional, bn=bn())
    report = fxr.plan(parts(a=a, b=b), "conv_bn")
    anchors = [each.anchor for each in report.findings]
    assert anchors == ["a.batch_norm", "b.batch_norm", "a.bn", "b.bn"]
    assert report.why("b.batch_norm").startswith("b.batch_norm: missed")
