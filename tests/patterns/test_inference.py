"""The rule set inference: all of affine, reparam and cleanup, nothing added, nothing slower."""

from __future__ import annotations

from itertools import chain
from typing import Any

import nets
import pytest
import strategies
import timm
import torch
import torchvision
from checks import largest_error, outputs
from hypothesis import strategies as st
from nets import Forward, bn, conv
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fxrewrite as fxr
from fxrewrite.testing import check_rule, models_around, randomise, register_strategy
from fxrewrite.tracing.tracer import trace

register_strategy(
    timm.layers.StdConv2d,
    lambda s: st.builds(timm.layers.StdConv2d, st.just(s[1]), st.integers(1, 4), st.just(1)),
    ranks=[4],
)
RULES = fxr.get_rule_set("inference").rules
MODELS: dict[str, Any] = {
    "resnet18": torchvision.models.resnet18,
    "mobilenet_v3_small": torchvision.models.mobilenet_v3_small,
    **{
        name: lambda name=name: timm.create_model(name)
        for name in ("repghostnet_050", "fastvit_t8", "convnext_atto", "nfnet_l0")
    },
}


def test_one_set_does_it_all() -> None:
    """A norm, a scale, a branch, a zero, a dropout and an identity are gone."""
    model = Forward(
        lambda m, x: m.same(m.drop(m.bn(m.conv(x)) * 2 + 0 + m.point(x))),
        conv=conv(), bn=bn(), drop=nn.Dropout(), same=nn.Identity(), point=nn.Conv2d(4, 4, 1),
    )  # fmt: skip
    expected = outputs(model.double(), nets.X)
    made, _ = fxr.rewrite(model, "inference", nets.X)
    assert [type(each) for each in made.children()] == [nn.Conv2d]
    assert largest_error(expected, outputs(made, nets.X)) <= 1e-9


def test_a_zero_that_is_added_makes_no_bias() -> None:
    """It is left out before it could be folded as a constant."""
    model = Forward(lambda m, x: m.conv(x) + 0, conv=nn.Conv2d(4, 4, 1, bias=False))
    made, _ = fxr.rewrite(model, "inference", nets.X.float())
    assert list(made.state_dict()) == ["conv.weight"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:dropout2d", "ignore:.*dropout.*")
def test_all_rules_together_are_sound() -> None:
    """On models around each chain, and on sums of branches, they keep what each must keep."""
    for rule in RULES:
        if not rule.pattern.branches:
            drawn = models_around(rule.pattern)
            check_rule("inference", drawn, max_examples=4, must_apply=False)
    check_rule("inference", strategies.branches(), max_examples=10, must_apply=False)


def numbers(model: nn.Module) -> int:
    held = {id(each): each.numel() for each in chain(model.parameters(), model.buffers())}
    return sum(held.values())


def flops(model: nn.Module, x: torch.Tensor) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    return int(counter.get_total_flops())


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_nothing_is_added(name: str) -> None:
    """No node, no number, no multiplication more than before; a second rewrite changes nothing."""
    model = randomise(MODELS[name]()).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = [model(x)]
    made, report = fxr.rewrite(model, "inference", x)
    graph, _ = trace(model, [kind for rule in RULES for kind in rule.pattern.module_types])
    assert report.applied
    assert len(made.graph.nodes) < len(graph.nodes)
    assert numbers(made) < numbers(model)
    assert flops(made, x) <= flops(model, x)
    again, second = fxr.rewrite(made, "inference", x)
    assert not second.applied
    assert [str(node) for node in again.graph.nodes] == [str(node) for node in made.graph.nodes]
    with torch.no_grad():
        assert largest_error(expected, [made(x)]) <= 1e-4


def pair(first: nn.Module, second: nn.Module) -> nn.Module:
    return Forward(lambda m, x: m.second(m.first(x)), first=first, second=second)


def gamma() -> nn.Parameter:
    return nn.Parameter(torch.rand(4, 1, 1) + 0.5)


FLAT = nets.random_input((3, 4))
# In words, the model, an example, and how many calls are left.
EXPORTED: dict[str, tuple[nn.Module, torch.Tensor, int]] = {
    "transposed convolution, norm": (
        pair(nn.ConvTranspose2d(4, 4, 3, stride=2, groups=2, output_padding=1), bn()), nets.X, 1,
    ),
    "linear layer, norm": (pair(nn.Linear(4, 4), nn.BatchNorm1d(4)), FLAT, 1),
    "frozen norm": (pair(conv(), torchvision.ops.FrozenBatchNorm2d(4)), nets.X, 1),
    "norm, convolution": (pair(bn(), nn.Conv2d(4, 4, 3)), nets.X, 1),
    "learned scale": (Forward(lambda m, x: m.c(x) * m.g, c=conv(), g=gamma()), nets.X, 1),
    "numbers": (Forward(lambda m, x: 1 - (-m.c(x) / 3 + 2), c=conv()), nets.X, 1),
    "normalised input": (
        Forward(lambda m, x: m.c((x - m.g) / m.g), c=nn.Conv2d(4, 4, 3), g=gamma()), nets.X, 1,
    ),
    "two linear layers": (pair(nn.Linear(4, 8), nn.Linear(8, 1)), FLAT, 1),
    "two convolutions": (pair(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 1, 1)), nets.X, 1),
    "branches": (
        Forward(
            lambda m, x: m.n(m.c(x)) + m.d(x) + x, c=conv(), n=bn(), d=nn.Conv2d(4, 4, 1)
        ), nets.X, 1,
    ),
    "dropout, two relus": (
        Forward(lambda m, x: m.d(torch.relu(torch.relu(x))), d=nn.Dropout()), FLAT, 1,
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("decomposed", [False, True], ids=["exported", "decomposed"])
@pytest.mark.parametrize("name", EXPORTED)
def test_an_exported_program_folds_alike(name: str, decomposed: bool) -> None:
    """What a model of modules comes to, its program comes to as well, in both forms."""
    model, x, left = EXPORTED[name]
    model.double()
    program = torch.export.export(model, (x,))
    program = program.run_decompositions() if decomposed else program
    expected = outputs(model, x)
    made, _ = fxr.rewrite(program, "inference")
    assert largest_error(expected, outputs(made.module(), x)) <= 1e-9
    # What a program decomposes a linear layer into transposes its weight.
    calls = [n for n in made.graph.nodes if n.op == "call_function" and "permute" not in n.name]
    assert len(calls) == left, made.graph
    graph, _ = fxr.rewrite(model, "inference", x)
    assert sum(n.op.startswith("call") for n in graph.graph.nodes) == left
