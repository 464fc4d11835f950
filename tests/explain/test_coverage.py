"""What became of a layer that no node calls: spelt as a function, in another part, or unused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import nets
import pytest
import torch
from nets import Forward, bn, conv
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import fxrewrite as fxr
from fxrewrite.testing import check_model


def in_parts(m: Any, x: torch.Tensor) -> torch.Tensor:
    """A forward that can't be traced, so that what it calls is traced by itself."""
    return m.block(x) if x.sum() > 0 else x


def normed(m: Any, x: torch.Tensor, weight: Any) -> torch.Tensor:
    """A batch norm as the call of a function, on the tensors of a layer that is never called."""
    return F.batch_norm(x, m.bn.running_mean, m.bn.running_var, weight)


SPELT: dict[str, tuple[Callable[[Any, Any], Any], str]] = {
    "a module": (lambda m, x: normed(m, m.up(x), m.bn.weight), "it reads block.up (ConvTr"),
    "none": (lambda m, x: normed(m, x, x.mean()), "its weight is mean (.mean()), not a tensor of"),
}


@pytest.mark.parametrize("into", ["parts", "modules", "graph"])
@pytest.mark.parametrize("spelt", SPELT)
def test_the_layer_behind_a_function_is_told_of_as_the_call_is(spelt: str, into: Any) -> None:
    """By the layer's name, its alias and its block's; whether the call can be read as it or not."""
    forward, said = SPELT[spelt]
    block = Forward(forward, bn=bn(), up=nn.ConvTranspose2d(4, 4, 1))
    model = Forward(lambda m, x: m.block(x), block=block, alias=block.bn)
    if into == "parts":
        model = Forward(in_parts, block=block, alias=block.bn)
    report = fxr.plan(model, "conv_bn", into=None if into == "parts" else into)
    (finding,) = report.findings
    assert finding.anchor in ("batch_norm", "block.batch_norm")
    assert finding.outcome == "missed"
    assert said in finding.reason
    for name in ("block.bn", "alias", "block", finding.anchor):
        assert report.why(name) == str(finding)


def test_a_layer_behind_several_calls_is_told_of_at_each() -> None:
    """Its own call, and those of functions that are given its tensors."""
    one = Forward(lambda m, x: m.bn(normed(m, x, None)), bn=bn())
    two = Forward(lambda m, x: normed(m, x, None), bn=one.bn)
    model = Forward(
        lambda m, x: m.one(x) if x.sum() > 0 else m.two(x), one=one, two=two, alias=one.bn
    )
    report = fxr.plan(model, "conv_bn")
    anchors = ["batch_norm", "one.bn", "two.batch_norm"]
    for name in ("one.bn", "two.bn", "alias"):
        told = report.why(name).splitlines()
        assert sorted(each.partition(":")[0] for each in told) == anchors


def test_a_call_does_not_speak_for_a_layer_of_another_kind() -> None:
    """A norm that is scaled by the bias of a linear layer says nothing of linear layers."""
    children = {"conv": conv(), "bn": bn(), "linear": nn.Linear(4, 4)}
    model = Forward(lambda m, x: normed(m, m.conv(x), m.linear.bias), **children)
    findings = fxr.plan(model, ["conv_bn", "merge_siblings"]).findings
    assert "linear: missed by merge_linears: no call of it is in the traced graph" in map(
        str, findings
    )


def test_a_layer_that_is_the_model_itself_is_told_to_be_wrapped() -> None:
    """Its own forward spells it as a function, which is told of by itself."""
    report = check_model("merge_siblings", nn.Linear(5, 5).double().eval(), (nets.X,))
    assert [str(each) for each in report.findings] == [
        "linear: missed by merge_linears: no other Linear reads the model's input 'input'",
        "Linear: missed by merge_linears: it is the model itself, which is traced through; wrap it",
    ]


@pytest.mark.parametrize("into", ["graph", "modules"])
def test_a_layer_whose_computed_weight_alone_is_read_is_never_called(into: Any) -> None:
    """What computes its weight is called, which is inside of it, but it is not."""
    model = Forward(
        lambda m, x: x * m.l.weight.mean(), l=parametrizations.weight_norm(nn.Linear(3, 3))
    )
    report = fxr.plan(model, "merge_siblings", into=into)
    assert [str(each) for each in report.findings] == [
        "l: missed by merge_linears: no call of it is in the traced graph"
    ]


def test_a_part_does_not_speak_for_what_has_the_same_names_outside() -> None:
    """A node of a part is known by the part's name and its own, and so is what it went through."""
    block = Forward(lambda m, x: m.bn(m.act(m.conv(x))), conv=conv(), act=nn.ReLU(), bn=bn())
    report = fxr.plan(Forward(in_parts, block=block, conv=conv(), bn=bn()), "conv_bn")
    assert "it reads block.act (ReLU)" in report.why("block.bn")
    assert "it feeds block.act (ReLU)" in report.why("block.conv")
    for name in ("conv", "bn"):
        (said,) = report.why(name).splitlines()
        assert "no call of it could be traced: tracing stopped in" in said
