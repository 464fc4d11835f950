"""A compiled graph whose parameters change is renewed, or left, as the rules then act."""

from __future__ import annotations

from typing import Any

import nets
import pytest
import torch
from checks import largest_error, outputs
from torch import nn

import fxrewrite as fxr


def is_known(m: Any) -> str | None:
    """Only of a norm that is its weight, which is one number, times its input."""
    plain = torch.zeros(4).double()
    idle = torch.equal(m.norm.running_mean, plain) and torch.equal(m.norm.bias, plain)
    return None if idle and len(m.norm.weight.unique()) == 1 else "it is more than a factor"


@fxr.rule(pattern=fxr.chain(norm=nn.BatchNorm2d), where=[is_known])
def by_its_factor(m: Any) -> fxr.Call:
    """Another graph for each factor, without any new tensor."""
    factor = m.norm.weight[0].item()
    return fxr.Call({0.0: torch.zeros_like, -1.0: torch.neg}.get(factor, torch.clone))


@pytest.mark.parametrize("order", [(0.0, -1.0, 1.0), (-1.0, 0.0, 0.0), (1.0, 1.0, -1.0)])
def test_rules_that_make_another_graph_of_new_parameters_are_not_held_to_the_old_one(
    order: tuple[float, ...],
) -> None:
    """Whichever factor was compiled, the model then gives what it gives with the one it has."""
    net: Any = nets.Forward(lambda m, x: m.norm(x), norm=nn.BatchNorm2d(4, eps=0.0)).double()
    with torch.no_grad():
        for name, value in {"running_mean": 0.0, "running_var": 1.0, "bias": 0.0}.items():
            getattr(net.norm, name).fill_(value)
        net.norm.weight.fill_(order[0])
    compiled = torch.compile(net, backend=fxr.integrations.backend(by_its_factor, inner="eager"))
    for factor in order:
        with torch.no_grad():
            net.norm.weight.fill_(factor)
        expected = outputs(net, nets.X)
        assert largest_error(expected, outputs(compiled, nets.X)) <= 1e-12
