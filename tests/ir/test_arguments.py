"""A call's arguments by name are those of the overload that torch takes for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx, nn

import fxrewrite as fxr
from fxrewrite.ir.arguments import arguments

Y = torch.randn(3, 2)
CALLS: dict[str, tuple[Any, dict[str, Any]]] = {
    "max of a dimension": (lambda x: torch.max(x, 1), {"dim": 1}),
    "max of a dimension by name": (lambda x: x.max(dim=1), {"dim": 1}),
    "max of two": (lambda x: torch.max(x, Y), {"other": Y}),
    "max of all": (lambda x: x.max(), {}),
    "min, kept": (lambda x: x.min(-1, True), {"dim": -1, "keepdim": True}),
    "std of a dimension": (lambda x: torch.std(x, 1), {"dim": 1}),
    "std, biased": (lambda x: torch.std(x, False), {"unbiased": False}),
    "var of some dimensions": (lambda x: x.var([0, 1], False), {"dim": [0, 1], "unbiased": False}),
    "norm": (lambda x: x.norm(2, 1), {"p": 2, "dim": 1}),
    "to a device": (lambda x: x.to("cpu"), {"device": "cpu"}),
    "to a type": (lambda x: x.to(torch.float64), {"dtype": torch.float64}),
    "to both": (
        lambda x: x.to("cpu", torch.float64),
        {"device": "cpu", "dtype": torch.float64},
    ),
    "to like another": (lambda x: x.to(Y), {"other": Y}),
    "view as a type": (lambda x: x.view(torch.int32), {"dtype": torch.int32}),
    "view of a size": (lambda x: x.view(2, 3), {"size": (2, 3)}),
    "split by a size": (lambda x: x.tensor_split(2), {"sections": 2}),
    "split at places": (lambda x: x.tensor_split([1]), {"indices": [1]}),
    "sum of some": (lambda x: x.sum((0, 1)), {"dim": (0, 1)}),
}


@pytest.mark.parametrize("name", CALLS)
def test_arguments_are_named_as_in_the_overload_that_takes_them(name: str) -> None:
    """And by these names, torch gives the same as by the call that was traced."""
    function, wanted = CALLS[name]

    class Model(nn.Module):
        def forward(self, x: Any) -> Any:
            return function(x)

    traced = fx.symbolic_trace(Model())
    (node,) = [each for each in traced.graph.nodes if each.op in ("call_function", "call_method")]
    given = arguments(node, node.target)
    assert isinstance(given.pop("input"), fx.Node)
    shown = {
        k: getattr(traced, v.target) if isinstance(v, fx.Node) else v for k, v in given.items()
    }
    assert shown.keys() == wanted.keys()
    assert all(shown[key] is each or shown[key] == each for key, each in wanted.items())
    x = torch.randn(3, 2)
    name = getattr(node.target, "__name__", node.target)
    made, expected = getattr(torch.ops.aten, name)(x, **shown), function(x)
    torch.testing.assert_close(made, expected, rtol=0, atol=0)


def test_a_rule_finds_an_argument_by_name_however_it_was_given() -> None:
    """A guard on `dim` sees that of `torch.max(x, 1)`."""

    @fxr.rule(
        pattern=fxr.chain(conv=nn.Conv2d, most=fxr.call(torch.max, "max", chain="input")),
        where=[lambda m: None if m.most.kwargs.get("dim") == 1 else "it is not of dimension 1"],
    )
    def first_of_one(m: Any) -> fxr.Call:
        return fxr.Call(lambda x: torch.max(x, 1))

    def counts(function: Any) -> dict[str, int]:
        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv = nn.Conv2d(3, 3, 1)

            def forward(self, x: Any) -> Any:
                return function(self.conv(x))

        return dict(fxr.plan(Model().eval(), first_of_one).counts["first_of_one"])

    assert counts(lambda x: torch.max(x, 1))["applied"] == 1
    assert counts(lambda x: x.max(dim=1))["applied"] == 1
    assert counts(lambda x: torch.max(x, 2))["refused"] == 1
    assert counts(torch.max)["refused"] == 1
