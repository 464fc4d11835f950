"""A module that is a layer of torch but in name folds in a module tree, as it does in a graph."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from checks import Record
from nets import Forward, random_input, randomise
from torch import nn
from torch.nn import functional as F

import fxrewrite as fxr

X = random_input((3, 4))


class Lin(nn.Module):
    """A linear layer of somebody's own."""

    def __init__(self, inputs: int = 4, outputs: int = 5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs))
        self.bias = nn.Parameter(torch.randn(outputs))
        self.outputs, self.scale = outputs, 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)

    def size(self) -> int:
        return self.outputs


class WithoutBias(Lin):
    """Its bias is no parameter, but an attribute that is None."""

    def __init__(self) -> None:
        super().__init__()
        del self.bias
        self.bias = None


class Scaled(Lin):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias) * 2


class Asking(Lin):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias if x.sum() < 1e9 else None)


class Called(Lin):
    def __call__(self, x: torch.Tensor) -> Any:
        return super().__call__(x) + 1


class Kept(Lin):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.last = x
        return F.linear(x, self.weight, self.bias)


def plain(m: Any, x: torch.Tensor) -> torch.Tensor:
    return m.bn(m.lin(x))


def asks(m: Any, x: torch.Tensor) -> torch.Tensor:
    return m.bn(m.lin(x)) if x.sum() < 1e9 else x


def net(forward: Any = asks, lin: nn.Module | None = None, **members: nn.Module) -> nn.Module:
    layers = {"lin": lin or Lin(), "bn": nn.BatchNorm1d(5), **members}
    return randomise(Forward(forward, **layers)).double().eval()


def test_a_bias_that_was_none_is_the_shift_afterwards() -> None:
    model = net(asks, WithoutBias())
    made, _ = fxr.rewrite(model, "affine", X, into="modules", expect={"affine": 1})
    torch.testing.assert_close(made(X), model(X), rtol=0, atol=1e-12)


@pytest.mark.parametrize("forward", [plain, asks])
def test_it_folds_in_a_module_tree(forward: Any) -> None:
    """The tensors keep their names; the result is as the model; the model is as it was."""
    model = net(forward)
    before = Record(model)
    made, report = fxr.rewrite(model, "affine", X, into="modules", expect={"affine": 1})
    before.assert_unchanged()
    assert report.applied[0].assurance == ("proved" if forward is plain else "guarded")
    assert {"lin.weight", "lin.bias"} == {k for k in made.state_dict() if k.startswith("lin")}
    assert isinstance(made.lin, nn.Linear)
    assert type(made) is type(model)
    torch.testing.assert_close(made(X), model(X), rtol=0, atol=1e-12)
    copied = pickle.loads(pickle.dumps(made.lin))
    torch.testing.assert_close(copied(X), made.lin(X), rtol=0, atol=0)


def test_what_no_rule_changes_keeps_its_class() -> None:
    """Of two such modules, one folds; the other one is of its own class, with the same tensors."""
    model = net(lambda m, x: m.other(torch.relu(asks(m, x))), other=Lin(5, 2))
    made, _ = fxr.rewrite(model, "affine", X, into="modules", expect={"affine": 1})
    assert type(made.other) is Lin
    assert made.other.weight is model.other.weight
    assert made.other is not model.other


@pytest.mark.parametrize("kind", [Scaled, Asking, Called, Kept])
def test_what_does_more_is_no_layer(kind: type[Lin]) -> None:
    """A module that computes more, asks something, or remembers what it read stays as it is."""
    model = net(lin=kind())
    made, report = fxr.rewrite(model, "affine", X, into="modules")
    assert not report.applied
    assert type(made.lin) is kind
    torch.testing.assert_close(made(X), model(X), rtol=0, atol=0)


def test_hooks_stay() -> None:
    model = net()
    model.lin.register_forward_hook(lambda module, args, output: output + 1)
    made, report = fxr.rewrite(model, "affine", X, into="modules")
    assert not report.applied
    torch.testing.assert_close(made(X), model(X), rtol=0, atol=0)


@pytest.mark.parametrize("given", [None, X])
def test_a_forward_that_uses_more_of_it_goes_on_as_it_did(given: Any) -> None:
    """A method of the module's own is none of the layer's, so the module stays."""

    def uses(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = asks(m, x)
        return y[:, : m.lin.size()] * m.lin.scale

    model = net(uses)
    made, report = fxr.rewrite(model, "affine", given, into="modules")
    assert not report.applied
    assert not any("AttributeError" in each.reason for each in (*report.refused, *report.missed))
    assert type(made.lin) is Lin
    torch.testing.assert_close(made(X), model(X), rtol=0, atol=0)


def test_a_module_that_is_called_twice_is_rewritten_for_all_calls_or_none() -> None:
    """Where the calls conflict, the rewrite is done once more without."""
    shared = Lin(4, 4)

    def twice(m: Any, x: torch.Tensor) -> torch.Tensor:
        return m.bn(m.lin(m.bn(m.lin(x)))) if x.sum() < 1e9 else x

    def once(m: Any, x: torch.Tensor) -> torch.Tensor:
        return m.bn(m.lin(m.lin(x))) if x.sum() < 1e9 else x

    for forward, applied in ((twice, 1), (once, 0)):
        model = net(forward, copy.deepcopy(shared), bn=nn.BatchNorm1d(4))
        made, report = fxr.rewrite(model, "affine", X, into="modules")
        assert bool(report.applied) is bool(applied)
        torch.testing.assert_close(made(X), model(X), rtol=0, atol=1e-12)
        assert isinstance(made.lin, nn.Linear if applied else Lin)
