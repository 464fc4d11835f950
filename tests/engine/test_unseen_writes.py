"""Writes in place and hooks that a rewrite could miss: each refuses it, or shows in no result."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import nets
import pytest
import torch
from nets import Forward, X, bn, conv
from torch import nn

import fxrewrite as fxr
from fxrewrite.ir.aliases import writes_in_place
from fxrewrite.module_utils.hooks import has_hooks


@fxr.rule(pattern=fxr.chain(copy=nn.LeakyReLU), last=True)
def hand_on(m: Any) -> fxr.Bypass:
    """For a leaky ReLU of slope 1, which copies what it reads."""
    return fxr.Bypass()


@fxr.rule(pattern=fxr.chain(act=nn.ReLU))
def write_in_place(m: Any) -> fxr.Replace:
    return fxr.Replace(nn.ELU(inplace=True))


@fxr.rule(pattern=fxr.chain(act=nn.ReLU, idle=nn.Dropout))
def leave_out_dropout(m: Any) -> fxr.Revise:
    return fxr.Revise(idle=None)


@fxr.rule(pattern=fxr.chain(copy=nn.LeakyReLU), name="hand_on")
def hand_on_by_a_call(m: Any) -> fxr.Call:
    return fxr.Call(lambda x: x)


def copied() -> nn.Module:
    return nn.LeakyReLU(1.0)


@pytest.mark.parametrize(
    "stored", [lambda m, x: x, lambda m, x: m.scale, lambda m, x: m.scale[:1], lambda m, x: x.t()]
)
@pytest.mark.parametrize("rule", [hand_on, hand_on_by_a_call], ids=["bypass", "call"])
def test_what_is_returned_becomes_no_part_of_what_the_model_holds_or_is_given(
    rule: Any, stored: Any
) -> None:
    """A caller that writes to the output writes neither to a parameter nor to its own input."""
    model = Forward(lambda m, x: m.copy(stored(m, x)), copy=copied())
    model.scale = nn.Parameter(torch.ones(3, 4))
    x = torch.ones(3, 4)
    made, report = fxr.rewrite(model, rule)
    with torch.no_grad():
        made(x).zero_()
    assert bool((x == 1).all())
    assert bool((model.scale == 1).all())
    assert "a caller that writes in place could tell" in report.why("copy")


@pytest.mark.parametrize(
    ("rule", "act"),
    [(write_in_place, nn.ReLU()), (leave_out_dropout, nn.ReLU(inplace=True))],
    ids=["made", "kept"],
)
def test_what_one_rule_leaves_writing_in_place_refuses_the_next(rule: Any, act: nn.Module) -> None:
    """A copy before a step that writes stays, whichever rule made or kept that step."""
    children = {"copy": copied(), "act": act, "idle": nn.Dropout()}
    model = Forward(lambda m, x: m.idle(m.act(m.copy(x))) + 1.0, **children)
    x = nets.random_input((3, 4))
    made, report = fxr.rewrite(model, [rule, hand_on])
    assert [each.rule for each in report.applied] == [rule.name]
    given = x.clone()
    made(given)
    assert torch.equal(given, x)


DERIVED: dict[str, Callable[[Any], torch.Tensor]] = {
    "itself": lambda m: m.count,
    "computed": lambda m: m.count * 2.0,
    "computed of what is computed": lambda m: (m.count + 1.0).exp(),
    "a view": lambda m: m.count.view(1),
}


@pytest.mark.parametrize("name", DERIVED)
@pytest.mark.parametrize("early", [False, True])
def test_what_follows_from_a_tensor_that_the_forward_writes_to_is_no_constant(
    name: str, early: bool
) -> None:
    """It is another number at each call, so it is not folded."""

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        if early:
            m.count.add_(1.0)
        y = m.conv(x) * DERIVED[name](m)
        if not early:
            m.count.add_(1.0)
        return y

    model = Forward(forward, conv=conv()).double()
    model.count = nn.Buffer(torch.tensor(1.0, dtype=torch.float64))
    made, report = fxr.rewrite(copy.deepcopy(model), "affine", X)
    assert not report.applied
    for _ in range(3):
        torch.testing.assert_close(made(X), model(X), rtol=0, atol=1e-9)


@pytest.mark.parametrize("by_view", [False, True])
def test_what_is_computed_of_a_tensor_and_then_written_to_is_no_constant(by_view: bool) -> None:
    """The tensor stays what it is, and yet what follows from it is not what a rule computes."""

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        factor = m.count * 2.0
        (factor.view(-1) if by_view else factor).mul_(3.0)
        return m.conv(x) * factor

    model = Forward(forward, conv=conv()).double()
    model.count = nn.Buffer(torch.tensor(1.0, dtype=torch.float64))
    expected = model(X)
    made, report = fxr.rewrite(model, "affine", X)
    assert not report.applied
    torch.testing.assert_close(made(X), expected, rtol=0, atol=1e-9)


@fxr.rule(pattern=fxr.chain(same=nn.Identity, act=nn.Tanh))
def tanh_alone(m: Any) -> fxr.Replace:
    return fxr.Replace(nn.Tanh(), slot="act")


CONTAINERS: list[Callable[[nn.Module], nn.Module]] = [
    nn.Sequential,
    lambda act: nn.Sequential(nn.Identity(), nn.Sequential(act)),
    lambda act: Forward(lambda m, x: m.act(x), act=act),
]


@pytest.mark.parametrize("around", CONTAINERS)
def test_a_container_that_is_kept_whole_writes_where_one_inside_it_does(around: Any) -> None:
    """What stands before such a write is not read after it."""

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        z = x + 1.0
        y = m.same(z)
        m.whole(z)
        return m.act(y)

    whole = around(nn.ReLU(inplace=True))
    assert writes_in_place(whole)
    assert not writes_in_place(around(nn.ReLU()))
    model = Forward(forward, same=nn.Identity(), whole=whole, act=nn.Tanh())
    made, report = fxr.Rewriter(tanh_alone, leaf_modules=["whole"]).rewrite(model)
    x = nets.random_input((3, 4))
    assert torch.equal(made(x), model(x))
    assert "in place to what the chain reads" in report.why("act")


def registrations() -> list[str]:
    """All ways that torch has to put a hook on a module."""
    named = inspect.getmembers(nn.Module, inspect.isfunction)
    return [name for name, _ in named if "register" in name and name.endswith("hook")]


@pytest.mark.parametrize("register", registrations())
@pytest.mark.parametrize("name", ["conv", "bn"])
def test_a_hook_of_any_kind_keeps_its_module(register: str, name: str) -> None:
    """Of the forward, the backward, or the state dict: none is bypassed."""
    model = Forward(lambda m, x: m.bn(m.conv(x)), conv=conv(), bn=bn())
    hooked = model.get_submodule(name)
    assert has_hooks(hooked) is None
    getattr(hooked, register)(lambda *_: None)
    assert has_hooks(hooked) is not None
    report = fxr.plan(model, "conv_bn")
    assert not report.applied
    assert "hook, which a rewrite would bypass; remove it first" in report.why("bn")
