"""Why a module or node is what it is: each rule's answer, in words that are made when asked for."""

from __future__ import annotations

from typing import Any

import nets
import pytest
import torch
from nets import Forward, bn, conv
from torch import nn
from torch.nn import functional as F

import fxrewrite as fxr


def test_a_convolution_that_feeds_something_else_tells_what() -> None:
    """What is no anchor tells at which step the chain stopped around it, and what stood there."""
    model = Forward(lambda m, x: m.bn(m.act(m.conv(x))), conv=conv(), act=nn.ReLU(), bn=bn())
    report = fxr.plan(model, "conv_bn")
    assert report.why("conv") == (
        "conv: it could be the conv of fold_conv_bn, but it feeds act (ReLU), "
        "not a BatchNorm1d, BatchNorm2d or BatchNorm3d"
    )
    assert report.why("bn") == (
        "bn: missed by fold_conv_bn: it reads act (ReLU), not a Conv1d, Conv2d or Conv3d"
    )


def test_a_convolution_whose_output_nothing_reads() -> None:
    """A dead call is a bystander like any other."""
    model = Forward(lambda m, x: (m.conv(x), x)[1], conv=conv())
    said = fxr.plan(model, "conv_bn").why("conv")
    assert "but nothing reads its output, where a BatchNorm1d, BatchNorm2d or" in said


def test_each_call_of_a_bystander_is_told_of() -> None:
    """A module that is called twice has an answer for each call, and one by the call's own name."""
    model = Forward(lambda m, x: m.act(m.conv(x)) + m.conv(x), conv=conv(), act=nn.ReLU())
    report = fxr.plan(model, "conv_bn")
    assert ["act (ReLU)" in each for each in report.why("conv").splitlines()] == [True, False]
    assert "it feeds add (add())" in report.why("conv_1")


def test_a_bystander_is_known_by_its_alias_too() -> None:
    """The second name of a module has the answer of the first."""
    model = Forward(lambda m, x: m.act(m.conv(x)), conv=conv(), act=nn.ReLU())
    model.other = model.conv
    report = fxr.plan(model, "conv_bn")
    assert "it feeds act (ReLU)" in report.why("other")
    assert "it feeds act (ReLU)" in report.why("conv")


def declines(name: str, reason: str | None, **steps: Any) -> Any:
    where = [lambda m: reason] if reason else []
    make = fxr.rule(pattern=fxr.chain(**steps), name=name, where=where)
    return make(lambda m: fxr.Bypass())


def test_every_rule_with_its_anchor_there_is_heard() -> None:
    """Of an anchor at which nothing was applied, each rule's answer is given."""
    near = declines("near", None, a=nn.Tanh, b=nn.GELU, c=nn.ReLU)
    far = declines("far", None, a=nn.Tanh, c=nn.ReLU)
    guarded = declines("guarded", "not today", c=nn.ReLU)
    model = nn.Sequential(nn.GELU(), nn.ReLU()).eval()
    lines = fxr.plan(model, [far, near, guarded]).why("1").splitlines()
    assert lines == [
        "1: refused by guarded: not today",
        "1: missed by far: it reads 0 (GELU), not a Tanh",
        "1: missed by near: 0 (GELU) reads the model's input 'input', not a Tanh",
    ]
    assert fxr.plan(model, [far, near]).findings[0].rule == "near"


def test_what_another_rule_refused_is_known_by_all_its_steps() -> None:
    """A step of a chain that the second rule refused leads to that refusal."""
    one = declines("one", "never", b=nn.ReLU)
    two = declines("two", "not this pair", a=nn.GELU, b=nn.ReLU)
    report = fxr.plan(nn.Sequential(nn.GELU(), nn.ReLU()).eval(), [one, two])
    assert "1: refused by two: not this pair" in report.why("0")
    assert len(report.findings) == 1


def test_a_function_that_no_rule_is_about_is_known_by_its_node() -> None:
    """Each node of the graph has an answer, by its name; what is no node is an error."""
    model = Forward(lambda m, x: F.gelu(m.bn(m.conv(x))) + 1, conv=conv(), bn=bn())
    report = fxr.plan(model, "conv_bn")
    for name in ("gelu", "add", "x"):
        assert report.why(name) == (
            f"{name}: no rule looks for a node of this kind, and no match includes it"
        )
    with pytest.raises(LookupError, match="'gelu_1'"):
        report.why("gelu_1")


def test_words_are_made_only_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rewrite with nothing but misses describes no node; the report does, when it is read."""
    from fxrewrite.sites import Seen

    described: list[Any] = []
    in_words = Seen.__str__
    monkeypatch.setattr(Seen, "__str__", lambda seen: described.append(seen) or in_words(seen))
    model = nets.randomise(nn.Sequential(*[bn() for _ in range(5)], conv(), nn.ReLU()))
    report = fxr.plan(model, "conv_bn")
    assert len(report.missed) == 5
    assert not described
    assert "it feeds 6 (ReLU)" in report.why("5")
    assert described


def test_a_value_with_many_readers_is_described_by_three_of_them() -> None:
    """Of nine readers the first three are named."""
    pair = declines("pair", None, a=nn.ReLU, b=nn.GELU)

    def forward(m: Any, x: torch.Tensor) -> Any:
        y = m.act(x)
        return [torch.neg(y) for _ in range(9)]

    model = Forward(forward, act=nn.ReLU())
    said = fxr.plan(model, pair).why("act")
    assert said.endswith("but it feeds neg (neg()) and neg_1 (neg()) and neg_2 (neg()), not a GELU")
