"""The rule set cleanup: what does nothing goes, and what does something stays."""

from __future__ import annotations

from typing import Any

import nets
import pytest
import torch
from nets import Forward
from torch import nn
from torch.nn import functional as F

import fxrewrite as fxr
from fxrewrite.testing import check_rule

X = nets.random_input((2, 4)).float()


RULES = fxr.get_rule_set("cleanup").rules


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:dropout2d", "ignore:.*dropout.*")
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_each_rule_is_sound(rule: Any) -> None:
    """On models drawn around its pattern each rule keeps the outputs, and all that is promised."""
    check_rule(rule, max_examples=30, must_apply=False)


GONE: dict[str, Any] = {
    "identity": lambda m, x: m.same(x) + 1,
    "dropout": lambda m, x: m.drop(x) + 1,
    "functional dropout": lambda m, x: F.dropout(x, 0.5, training=False) + 1,
    "second relu": lambda m, x: F.relu(F.relu(x)),
    "cast": lambda m, x: x.float() + 1,
    "to": lambda m, x: x.to(torch.float32) + 1,
    "flatten": lambda m, x: torch.flatten(x, 1) + 1,
    "permute": lambda m, x: x.permute(0, 1) + 1,
    "contiguous": lambda m, x: m.linear(x).contiguous() + 1,
}
STAYS: dict[str, Any] = {
    "functional dropout in training mode": lambda m, x: F.dropout(x, 0.5, training=True) + 1,
    "another type": lambda m, x: x.double() + 1,
    "joins dimensions": lambda m, x: torch.flatten(x) + 1,
    "another order": lambda m, x: x.permute(1, 0) + 1,
    "the same bits as another type": lambda m, x: x.flatten().view(dtype=torch.int32) + 1,
    "sizes of the example": lambda m, x: x.view(2, 4) + 1,
    "contiguous of what may not be": lambda m, x: x.t().contiguous() + 1,
}


def model_of(forward: Any) -> nn.Module:
    return Forward(forward, same=nn.Identity(), drop=nn.Dropout(), linear=nn.Linear(4, 4))


@pytest.mark.parametrize("forward", GONE.values(), ids=GONE)
def test_what_does_nothing_goes(forward: Any) -> None:
    """It is left out, and the result is the same to the bit."""
    model = model_of(forward)
    made, report = fxr.rewrite(model, "cleanup", X, expect={"cleanup": 1})
    assert torch.equal(made(X), model(X)), report


@pytest.mark.parametrize("forward", STAYS.values(), ids=STAYS)
def test_what_does_something_stays(forward: Any) -> None:
    """What changes values, types or the order of dimensions is left as it is."""
    assert not fxr.plan(model_of(forward), "cleanup", X).applied


@pytest.mark.parametrize("name", ["cast", "flatten"])
def test_what_depends_on_the_input_needs_an_example(name: str) -> None:
    """Without example inputs a cast and a flatten stay, and the reason says what would decide."""
    report = fxr.plan(model_of(GONE[name]), "cleanup")
    assert not report.applied
    assert "example_inputs would decide it" in str(report)


def test_what_was_never_meant_is_no_finding() -> None:
    """A permutation, a view of other sizes, a cast to another type are nothing to clean up."""
    model = Forward(lambda m, x: x.permute(1, 0).reshape(2, 2, 2).double().flatten(1))
    assert not fxr.plan(model, "cleanup", X).findings


def test_in_a_module_tree_a_dropout_becomes_an_identity_and_stays_one() -> None:
    """Something has to stand where the forward calls it, and a second rewrite changes nothing."""
    made, _ = fxr.rewrite(model_of(GONE["dropout"]), "cleanup", into="modules")
    assert type(made.drop) is nn.Identity
    report = fxr.plan(made, "cleanup", into="modules")
    assert not report.applied
    assert "something has to stand there" in report.why("drop")


def test_in_a_module_tree_a_dropout_that_is_called_twice_stays() -> None:
    """One call may not go, so nothing would change, and a second rewrite would say so again."""
    drop = nn.Dropout(inplace=True)
    model = Forward(
        lambda m, x: (lambda y: (F.relu(x, inplace=True), m.drop(y.exp()) + y))(m.drop(x)[:] + 1),
        drop=drop,
    )
    assert not fxr.plan(model, "cleanup", into="modules").applied
    assert len(fxr.plan(model, "cleanup").applied) == 1
