"""What a forward asks by `callable`, or of what one of two expressions gives, is seen as it is."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import nets
import pytest
import torch
from torch import nn

import fxrewrite as fxr
from fxrewrite.tracing.questions import questions

X, M = nets.X, nets.random_input((2, 4, 5, 5), seed=1)


def of_callable(y: Any, a: Any, b: Any, first: bool) -> Any:
    return a(y) if callable(a) else y


def of_not_callable(y: Any, a: Any, b: Any, first: bool) -> Any:
    if not callable(b):
        return y + 1
    return y


def of_one_of_two(y: Any, a: Any, b: Any, first: bool) -> Any:
    return y + 2 if (a if first else b) is None else y


def of_the_other_of_two(y: Any, a: Any, b: Any, first: bool) -> Any:
    return y + 3 if isinstance(b if first else a, torch.Tensor) else y


def of_the_first_that_is_there(y: Any, a: Any, b: Any, first: bool) -> Any:
    return y + 4 if (a or b) is None else y


def of_either(y: Any, a: Any, b: Any, first: bool) -> Any:
    return y + 5 if (b if a is None else a) is None else y


def against_one_of_two(y: Any, a: Any, b: Any, first: bool) -> Any:
    return y + 6 if a is (None if first else b) else y


def whether_one_is_callable(y: Any, a: Any, b: Any, first: bool) -> Any:
    return y + 7 if callable(a if first else b) else y


ASKING: list[Callable[..., Any]] = [
    of_callable,
    of_not_callable,
    of_one_of_two,
    of_the_other_of_two,
    of_the_first_that_is_there,
    of_either,
    against_one_of_two,
    whether_one_is_callable,
]
VALUES = [None, True, 1.0, M, torch.tanh, nn.Sigmoid()]


class Asking(nn.Module):
    """Steps after a convolution and a batch norm, each of which asks something."""

    def __init__(self, steps: list[Callable[..., Any]], first: bool) -> None:
        super().__init__()
        self.conv, self.bn, self.steps, self.first = nets.conv(), nets.bn(), steps, first

    def forward(self, x: Any, a: Any = None, b: Any = None) -> Any:
        y = self.bn(self.conv(x))
        for step in self.steps:
            y = step(y, a, b, self.first)
        return y


def outcome(model: Any, args: Any) -> Any:
    try:
        with torch.no_grad():
            return model(X, *args)
    except Exception as error:
        return error


@pytest.mark.slow
@pytest.mark.parametrize("step", ASKING)
@pytest.mark.parametrize("into", ["graph", None])
@pytest.mark.parametrize("first", [False, True])
def test_another_answer_is_given_as_the_model_gives_it_or_refused(
    step: Any, into: Any, first: bool
) -> None:
    """On whatever the arguments are, no graph goes the way of those that it was traced with."""
    model = nets.randomise(Asking([step], first)).double()
    try:
        made, _ = fxr.rewrite(copy.deepcopy(model), "conv_bn", into=into)
    except fxr.errors.TraceError:
        assert into == "graph"
        return
    for args in itertools.product(VALUES, VALUES):
        expected, found = outcome(model, args), outcome(made, args)
        if isinstance(found, fxr.errors.SpecialisedError) or isinstance(expected, Exception):
            assert isinstance(found, Exception), args
        else:
            assert isinstance(found, torch.Tensor), (args, found)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("asking", "kind", "names"),
    [
        (lambda a, b, c: callable(a), "callable", [{"a"}]),
        (lambda a, b, c: callable(a.b), "callable", [{"a"}]),
        (lambda a, b, c: a is b, "is", [{"a"}, {"b"}]),
        (lambda a, b, c: a[0] is b, "is", [{"a"}, {"b"}]),
        (lambda a, b, c: (a if c else b) is c, "is", None),
        (lambda a, b, c: a is (b if c else c), "is", None),
        (lambda a, b, c: (a or b) is c, "is", None),
        (lambda a, b, c: (a if c else b).grad is c, "is", None),
        (lambda a, b, c: callable((a or b).grad), "callable", None),
        (lambda a, b, c: callable(a if c else b), "callable", None),
        (lambda a, b, c: isinstance(a and b, c), "isinstance", None),
    ],
)
def test_an_operand_is_told_apart_unless_code_jumps_there(
    asking: Any, kind: str, names: list[set[str]] | None
) -> None:
    """Where two ways arrive, it can't be said which value is asked about, so nothing is."""
    found = {each.kind: each for each in questions(asking.__code__).values()}
    operands = found["call" if kind not in found else kind].operands
    if names is None:
        assert operands is None
        return
    assert operands is not None
    assert [{i.variable for i in each if i.variable} for each in operands] == names
