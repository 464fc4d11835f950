"""Why a module or node is what it is: each rule's answer, in words that are made when asked for."""

from __future__ import annotations

import operator
from collections.abc import Callable
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
        "not a BatchNorm1d, BatchNorm2d, BatchNorm3d or another batch norm such as SyncBatchNorm"
    )
    assert report.why("bn") == (
        "bn: missed by fold_conv_bn: it reads act (ReLU), not a Conv1d, Conv2d or Conv3d"
    )


def test_a_convolution_whose_output_nothing_reads() -> None:
    """A dead call has its near misses like any other."""
    model = Forward(lambda m, x: (m.conv(x), x)[1], conv=conv())
    said = fxr.plan(model, "conv_bn").why("conv")
    assert "but nothing reads its output, where a BatchNorm1d, BatchNorm2d," in said


def test_each_call_that_could_be_a_step_is_told_of() -> None:
    """A module that is called twice has an answer for each call, and one by the call's own name."""
    model = Forward(lambda m, x: m.act(m.conv(x)) + m.conv(x), conv=conv(), act=nn.ReLU())
    report = fxr.plan(model, "conv_bn")
    assert ["act (ReLU)" in each for each in report.why("conv").splitlines()] == [True, False]
    assert "it feeds add (add())" in report.why("conv_1")


def test_a_near_miss_is_known_by_its_alias_too() -> None:
    """The second name of a module has the answer of the first."""
    model = Forward(lambda m, x: m.act(m.conv(x)), conv=conv(), act=nn.ReLU())
    model.other = model.conv
    report = fxr.plan(model, "conv_bn")
    assert "it feeds act (ReLU)" in report.why("other")
    assert "it feeds act (ReLU)" in report.why("conv")


@fxr.pattern
class Convolved:
    """One branch."""

    conv: nn.Conv2d
    act: nn.ReLU


@fxr.pattern
class Plain:
    """The other."""

    conv: nn.Conv2d


@fxr.pattern
class Summed:
    """A sum of that and what another convolution makes."""

    left: Convolved
    right: Plain
    join: fxr.Call = fxr.call(operator.add, torch.add, "add", "add_")


@fxr.rule
def add_up(m: Summed) -> fxr.Bypass:
    return fxr.Bypass()


IN_A_BRANCH: dict[str, tuple[Callable[[Any, Any], Any], str, str]] = {
    "the branch itself": (
        lambda m, x: m.a(x).tanh() + m.b(x),
        "a",
        "the left.conv of add_up, but it feeds tanh (.tanh()), not a ReLU",
    ),
    "the branch, from its end": (
        lambda m, x: m.act(x) + m.b(x),
        "act",
        "the left.act of add_up, but it reads the model's input 'x', not a Conv2d",
    ),
    "no join": (
        lambda m, x: m.act(m.a(x)) * m.b(x),
        "a",
        "the left.conv of add_up, but act (ReLU) feeds mul (mul()), not an add()",
    ),
    "the other branch": (
        lambda m, x: m.act(m.a(x)) + x,
        "a",
        "the left.conv of add_up, but in branch right, add (add()) reads the model's input 'x', "
        "not a Conv2d",
    ),
    "different values": (
        lambda m, x: m.act(m.a(x)) + m.b(x.tanh()),
        "a",
        "the left.conv of add_up, but add (add()) joins branches of different values: "
        "the model's input 'x' and tanh (.tanh())",
    ),
}


@pytest.mark.parametrize("where", IN_A_BRANCH)
def test_a_step_of_a_branch_tells_where_the_match_stopped(where: str) -> None:
    """In its own branch, behind it, in another branch, or where the branches part."""
    forward, name, said = IN_A_BRANCH[where]
    model = Forward(forward, a=conv(), b=conv(), act=nn.ReLU())
    told = fxr.plan(model, add_up).why(name)
    assert told.startswith(f"{name}: it could be ")
    assert said in told


def test_an_anchor_at_which_no_chain_matched_is_known_by_its_node_too() -> None:
    """A node of the graph is called otherwise than the module."""
    block = Forward(lambda m, x: m.bn(x.tanh()), bn=bn())
    report = fxr.plan(Forward(lambda m, x: m.block(x), block=block), "conv_bn")
    assert "it reads tanh (.tanh())" in report.why("block_bn")


def test_a_reason_that_several_rules_have_is_told_once() -> None:
    """The steps that a node could be are listed before it."""
    rules = [declines(name, None, a=nn.ReLU, b=nn.GELU) for name in ("one", "two", "three")]
    assert fxr.plan(nn.Sequential(nn.ReLU(), nn.Tanh()).eval(), rules).why("0") == (
        "0: it could be the a of one, the a of two or the a of three, but it feeds 1 (Tanh), "
        "not a GELU"
    )


def test_a_module_that_no_call_reaches_says_so() -> None:
    """Never called, or inside of what is kept whole: that, not that no rule is about it."""
    inner = nn.Sequential(conv(), nn.ReLU())
    inner.register_forward_hook(lambda *of: None)
    model = Forward(lambda m, x: m.inner(m.conv(x)), conv=conv(), inner=inner, unused=conv())
    report = fxr.plan(model, "conv_bn")
    assert report.why("unused") == "unused: no call of it is in the traced graph"
    assert report.why("inner.0") == (
        "inner.0: it is inside inner (Sequential), which is kept whole, since it carries a "
        "forward hook"
    )


def test_what_is_inside_of_an_alias_is_known_by_it() -> None:
    """Under each of its names a container, and what is in it, has the same answers."""

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 0:  # it is traced in parts, and a part has the name that it is called by
            x = x + 1
        return m.block(x)

    inner = bn()
    model = Forward(forward, alone=inner, block=nn.Sequential(conv(), nn.ReLU(), inner))
    model.other = model.block
    report = fxr.plan(model, "conv_bn")
    assert "missed by fold_conv_bn: it reads block.1" in report.why("block.2")
    pairs = ("block.2", "alone"), ("block.2", "other.2"), ("block", "other"), ("block.0", "other.0")
    for one, other in pairs:
        assert report.why(one).partition(":")[2] == report.why(other).partition(":")[2]


def test_a_container_names_what_in_it_was_near_a_match() -> None:
    """Where nothing of it took part in a match, it says whom to ask."""
    model = Forward(lambda m, x: m.block(x), block=nn.Sequential(conv(), nn.ReLU()))
    assert fxr.plan(model, "conv_bn").why("block") == (
        "block: no match includes anything of it; there might have been one at block.0"
    )
    assert "no rule looks for a module" in fxr.plan(model, declines("r", None, a=nn.GELU)).why(
        "block"
    )


def test_a_call_that_reads_more_than_a_step_allows_does_not_speak_for_others() -> None:
    """Of two sums, the one with a constant could be the step, whichever comes first."""

    @fxr.pattern
    class Scaled:
        linear: nn.Linear
        by: fxr.Call = fxr.call(operator.add, side_inputs=False)
        relu: nn.ReLU

    rule = fxr.rule(pattern=Scaled, name="scaled")(lambda m: fxr.Bypass())
    report = fxr.plan(Forward(lambda m, x: (x + x.tanh()) + 1), rule)
    assert "no rule looks for a node" in report.why("add")
    assert "it could be the by of scaled" in report.why("add_1")


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
    from fxrewrite.ir.describe import Seen

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
