"""Each property that `check_model` promises fails for a rule that breaks this one property."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import attrs
import nets
import pytest
import torch
from torch import nn

import fxrewrite as fxr
from fxrewrite.testing import UnsoundError, check_model, properties

ACT = fxr.chain(act=nn.ReLU)
count = itertools.count(2)


class Model(nn.Module):
    """An activation of the input and of a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.act, self.other, self.last = nn.ReLU(), nn.Tanh(), nn.ReLU()
        self.held = nn.Buffer(torch.tensor([1.0, -1.0, 2.0]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.other(self.act(x)) + self.last(self.held)  # type: ignore[no-any-return]


def same(m: Any) -> Any:
    return fxr.Replace(nn.Hardtanh(0.0, 1e9), slot="act")


LEFT: list[Any] = []


def marking(m: Any) -> Any:
    """It changes the model behind the match's back, which no check of the match can see."""
    LEFT[-1].marked = True
    return same(m)


def marking_and_raising(m: Any) -> Any:
    LEFT[-1].marked = True
    raise ValueError


def negating(m: Any) -> Any:
    return fxr.Call(torch.neg)


class Writing(nn.Module):
    """A ReLU that also writes to what it reads, of which nothing tells."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made = x.relu()
        x.sub_(1.0)
        return made


def writing(m: Any) -> Any:
    return fxr.Replace(Writing(), slot="act")


def drifting(m: Any) -> Any:
    return fxr.Replace(nn.Hardtanh(0.0, float(next(count)) * 1e6), slot="act")


class Around(nn.Module):
    """Has inside of it what the rule is about, as a second rewrite sees."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(x)  # type: ignore[no-any-return]


def hiding(m: Any) -> Any:
    return fxr.Replace(Around(), slot="act")


DOES = "a rule does what rules may do"
STAYS = "the model that is rewritten stays as it was"
FAILS = "a rewrite that fails leaves the model as it was"
SAME = "the outputs stay the same"
BROKEN: dict[str, tuple[Callable[[Any], Any], str, str]] = {
    "leaves something behind": (marking, STAYS, "marked"),
    "leaves something behind and raises": (marking_and_raising, FAILS, "marked"),
    "gives a wrong value": (negating, SAME, "output is off by"),
    "writes to the argument or to state": (writing, SAME, ""),
    "gives something else each time": (drifting, "the same rewrite gives the same result", ""),
    "leaves something to do": (hiding, "a second rewrite finds nothing left to do", "it applied"),
}


def rule(action: Callable[[Any], Any], **options: Any) -> fxr.Rule[Any]:
    return fxr.rule(pattern=ACT, name="broken", **options)(action)


@pytest.mark.parametrize("name", BROKEN)
def test_a_rule_that_breaks_a_property_is_caught_by_that_property(name: str) -> None:
    """What is raised says which property it is, so that another one can't stand in for it."""
    action, broken, found = BROKEN[name]
    # In a graph a new module is one step, whatever is inside of it.
    into: Any = "modules" if action is hiding else "graph"
    model = Model().eval()
    LEFT.append(model)
    with pytest.raises(UnsoundError) as caught:
        check_model(rule(action), model, (nets.random_input((2, 3)).float(),), into=into)
    assert caught.value.broken == broken
    assert found in caught.value.found


def test_a_rule_that_breaks_none_passes() -> None:
    """The model that shows the others shows nothing of a right rule."""
    report = check_model(rule(same), Model().eval(), (nets.random_input((2, 3)).float(),))
    assert len(report.applied) == 2


class SlightlyOff(nn.ReLU):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * (1 + 1e-7)


def test_an_error_as_small_as_rounding_in_float32_is_caught_in_float64() -> None:
    """What rounding does to the model in float32 allows no such error in float64."""
    slight = rule(lambda m: fxr.Replace(SlightlyOff(), slot="act"))
    with pytest.raises(UnsoundError) as caught:
        check_model(slight, Model().eval().double(), (nets.random_input((2, 3)),))
    assert caught.value.broken == SAME


@pytest.mark.parametrize(
    ("of", "found"), [(lambda m, x: m.act(x) + 1.0, "argument[0]"), (None, "state['held']")]
)
def test_a_write_that_the_model_does_not_do_is_caught(of: Any, found: str) -> None:
    """To what the caller gave, or to a buffer; the output is right in both cases."""
    model = nets.Forward(of or (lambda m, x: m.act(m.held) + x), act=nn.ReLU())
    model.held = nn.Buffer(torch.ones(3))
    with pytest.raises(UnsoundError) as caught:
        check_model(rule(writing), model, (torch.ones(3),))
    assert caught.value.broken == SAME
    assert caught.value.found.startswith(f"{found} is off by")


def test_a_site_that_is_declined_without_a_reason_is_caught() -> None:
    """Of each refusal and miss the reason is what its reader goes by."""
    silent = rule(same, where=[lambda m: fxr.Declined("")])
    with pytest.raises(UnsoundError) as caught:
        check_model(silent, Model().eval(), (torch.ones(2, 3),))
    assert caught.value.broken == "each refusal and miss has a reason"
    assert caught.value.found == "act has none"


def test_a_site_that_is_not_told_of_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """An anchor of which the report has nothing may be one that was never looked at."""

    def rewrite(*args: Any, **options: Any) -> tuple[Any, fxr.Report]:
        made, report = fxr.rewrite(*args, **options)
        return made, attrs.evolve(report, findings=report.findings[:1])

    monkeypatch.setattr(properties, "rewrite", rewrite)
    with pytest.raises(UnsoundError) as caught:
        check_model(rule(same), Model().eval(), (torch.ones(2, 3),))
    assert caught.value.broken == "each anchor is accounted for"


def test_what_no_rule_may_do_is_no_other_error() -> None:
    """An exception of the rule is the rule's own fault, and is raised as that."""

    def raising(m: Any) -> Any:
        raise ValueError

    model = Model().eval()
    with pytest.raises(UnsoundError, match="raised ValueError") as caught:
        check_model(rule(raising), model, (torch.ones(2, 3),))
    assert caught.value.broken == DOES
