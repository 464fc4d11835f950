"""What code of somebody else may do with a module that it is given, and what tells of tensors."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import nets
import pytest
import torch
from nets import X, bn, conv
from torch import nn

import fxrewrite as fxr
from fxrewrite.testing.written import compiled


def of_package(name: str, code: str) -> Callable[..., Any]:
    """A function whose source can't be read, as if it came with a package of that name."""
    namespace: dict[str, Any] = {"__name__": name}
    exec(code, namespace)
    found: Callable[..., Any] = namespace["use"]
    return found


CALLS_IT = "def use(module, x): return module(x)"
REACHES_IN = "def use(module, x): return module.conv(x)"


class Block(nn.Module):
    """A convolution and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = conv(), bn()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn(self.conv(x))  # type: ignore[no-any-return]


class Uses(nn.Module):
    """Gives its block to a function, when it is asked to."""

    def __init__(self, use: Callable[..., Any], given: str = "block") -> None:
        super().__init__()
        self.block, self.use, self.given = nets.randomise(Block()), use, given

    def forward(self, x: torch.Tensor, asked: bool = False) -> torch.Tensor:
        if asked:
            x = x + self.use(self.get_submodule(self.given), x)
        return self.block(x)  # type: ignore[no-any-return]


def rewritten(model: nn.Module, applied: int, *example: Any) -> fxr.Report:
    model = model.double().eval()
    made, report = fxr.rewrite(model, "conv_bn", example or None, into="modules")
    assert len(report.applied) == applied, report
    torch.testing.assert_close(made(X), model(X), rtol=1e-9, atol=1e-9)
    return report


def test_without_an_example_code_that_can_not_be_read_may_do_anything() -> None:
    report = rewritten(Uses(of_package("attr.tools", CALLS_IT)), 0)
    assert "used by use (<string>), whose source can't be read" in report.why("block.bn")
    assert "with example_inputs, code of another library is taken to call only" in str(report)


def test_with_an_example_code_of_another_library_is_taken_to_call_what_it_is_given() -> None:
    """The report says so."""
    model = Uses(of_package("attr.tools", CALLS_IT))
    report = rewritten(model, 1, X)
    assert "trusted to call only what it is given: use (<string>), who" in report.why("block.bn")
    made, _ = fxr.rewrite(model, "conv_bn", (X,), into="modules")
    torch.testing.assert_close(made(X, True), model(X, True), rtol=1e-9, atol=1e-9)


def test_a_module_that_it_is_given_itself_stays() -> None:
    rewritten(Uses(of_package("attr.tools", CALLS_IT), "block.conv"), 0, X)


def test_the_run_refuses_what_it_does_otherwise() -> None:
    report = rewritten(Uses(of_package("attr.tools", REACHES_IN)), 0, X, True)
    assert "the run on the example inputs called block.conv" in report.why("block.bn")


CALLBACKS = {
    "a lambda": "self.use(self.block, lambda block: block.conv(x))",
    "a function": "self.use(self.block, reach_in)",
    "a method": "self.use(self.block, self.reach_in)",
    "one among others": "self.use(self.block, *[x, reach_in])",
    "a name": "self.use(self.block, x=reach_in)",
    "in an object": "self.use(self.block, types.SimpleNamespace(do=reach_in))",
    "in a list": "self.use(self.block, [x, [reach_in]])",
    "what a function makes": "self.use(self.block, (lambda: reach_in)())",
    "an item": "self.use(self.block, [x, reach_in][1])",
    "put into an object": "self.use(self.block, setting(types.SimpleNamespace()))",
}


OWN = (
    "def reach_in(self, x=None):\n    return self.block.conv(x)\n"
    "def setting(obj):\n    obj.do = reach_in\n    return obj\n"
)


@pytest.mark.parametrize("call", CALLBACKS.values(), ids=list(CALLBACKS))
def test_code_that_is_given_own_code_as_well_is_not_trusted(call: str) -> None:
    namespace: dict[str, Any] = {"__name__": __name__, "types": types}
    forward = f"def forward(self, x, asked=False):\n    x = x + {call} if asked else x\n"
    compiled(f"{forward}    return self.block(x)\n{OWN}", namespace)
    methods = {name: namespace[name] for name in ("forward", "reach_in")}
    model = type("Calls", (Uses,), methods)(of_package("attr.tools", CALLS_IT))
    rewritten(model, 0, X)


def test_a_wrapper_around_own_code_is_not_trusted() -> None:
    wrapped = of_package("attr.tools", "def use(function): return lambda m, x: function(m, x)")
    rewritten(Uses(wrapped(lambda module, x: module.conv(x))), 0, X)


@pytest.mark.parametrize("package", ["test_handed", "__main__", "", "not_installed"])
def test_code_that_comes_with_the_model_is_not_trusted(package: str) -> None:
    """Nor is code of which nobody knows where it comes from."""
    rewritten(Uses(of_package(package, CALLS_IT)), 0, X)


class AsksForTheType(nn.Module):
    """Takes the type of its input from the tensors of one of its modules."""

    def __init__(self, of: str, **members: nn.Module) -> None:
        super().__init__()
        self.conv, self.bn, self.of = conv(), bn(), of
        for name, member in members.items():
            self.add_module(name, member)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(next(self.get_submodule(self.of).parameters()).dtype)
        return self.bn(self.conv(x))  # type: ignore[no-any-return]


def test_the_type_of_tensors_may_be_asked_for_while_some_are_left() -> None:
    rewritten(nets.randomise(AsksForTheType("")), 1)
    rewritten(nets.randomise(AsksForTheType("bn")), 0)
    wrapped = AsksForTheType("norm", norm=nn.Sequential())
    wrapped.norm.append(wrapped.bn)
    report = rewritten(nets.randomise(wrapped), 0)
    assert "the type or device of tensors of norm may be asked for, by `x = x.to(" in str(report)


def test_it_may_not_be_asked_for_where_tensors_are_of_several_types() -> None:
    """Of which a rewrite might leave another one first."""
    model = nets.randomise(AsksForTheType("", other=nn.Linear(2, 2))).double().eval()
    model.other.half()
    report = fxr.plan(model, "conv_bn", into="modules")
    assert "the type or device of tensors of AsksForTheType may be asked for" in report.why("bn")
