"""What a forward computes from parameters alone is a constant."""

import operator

import nets
import pytest
import torch
from torch import nn

import fxrewrite as fxr


def captured(forward, **members):
    """What a rule is given as a factor in this forward; None if the product is no such step."""
    found = []
    pattern = fxr.chain(
        conv=nn.Conv2d, scaled=fxr.call(operator.mul, torch.mul, "mul", side_inputs=False)
    )
    rule = fxr.rule(pattern=pattern, name="look", where=[lambda m: found.append(m) or "seen"])
    model = nets.Forward(forward, conv=nets.conv(), **members)
    report = fxr.plan(model, rule(lambda m: fxr.Bypass()))
    if found:
        (factor,) = found[0].scaled.kwargs.values()
        return factor
    return [each.reason for each in report.findings]


GAMMA = nn.Parameter(torch.tensor([1.0, -2.0, 3.0, 0.5]))


SPELT = {
    "view": (lambda m, x: m.conv(x) * m.gamma.view(1, -1, 1, 1), lambda g: g.view(1, -1, 1, 1)),
    "index": (lambda m, x: m.gamma[:, None, None] * m.conv(x), lambda g: g[:, None, None]),
    "exp": (lambda m, x: m.conv(x) * m.gamma.mul(2).sigmoid(), lambda g: (2 * g).sigmoid()),
    "function": (lambda m, x: torch.mul(m.conv(x), torch.sqrt(m.gamma)), torch.sqrt),
}


@pytest.mark.parametrize("how", SPELT)
def test_what_is_computed_from_parameters_alone_is_a_constant(how):
    forward, expected = SPELT[how]
    assert torch.equal(captured(forward, gamma=GAMMA).nan_to_num(), expected(GAMMA).nan_to_num())


def test_a_call_that_reads_more_is_no_anchor():
    assert captured(lambda m, x: m.conv(x) * x) == []


def test_a_constant_that_is_written_to_is_none():
    def forward(m, x):
        doubled = m.gamma * 2
        doubled.add_(1)
        return m.conv(x) * doubled

    assert captured(forward, gamma=GAMMA) == [
        "mul_1 (mul()) reads mul (mul()), which the model writes to"
    ]


def test_what_computed_a_constant_goes_with_its_chain():
    pattern = fxr.chain(conv=nn.Conv2d, scaled=fxr.call(operator.mul, side_inputs=False))
    rule = fxr.rule(pattern=pattern, name="drop")(lambda m: fxr.Replace(m.conv))
    model = nets.Forward(
        lambda m, x: m.conv(x) * m.gamma.exp().view(1, -1, 1, 1), conv=nets.conv(), gamma=GAMMA
    )
    rewritten, _ = fxr.rewrite(model, rule, expect={"drop": 1})
    assert [node.op for node in rewritten.graph.nodes] == ["placeholder", "call_module", "output"]
