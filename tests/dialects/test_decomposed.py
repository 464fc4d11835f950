"""What `run_decompositions` makes of a layer is read as that layer."""

from __future__ import annotations

import copy
from typing import Any

import nets
import pytest
import torch
from checks import largest_error, outputs
from torch import nn
from torch.export import Dim, export

import fxrewrite as fxr

X = nets.random_input((4, 3, 5))


class Rows(nn.Module):
    """A linear layer on what is not contiguous, and a norm of its rows, as in LeViT."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(3, 6, bias=False), nn.BatchNorm1d(6)
        nets.randomise(self).double()

    def forward(self, x: torch.Tensor) -> Any:
        y = self.linear(x.transpose(1, 2))
        return self.norm(y.flatten(0, 1)).view_as(y)


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_linear_layer_of_several_dimensions(dynamic: bool) -> None:
    """It decomposes into a batched product with its weight repeated, which is the layer."""
    net = Rows().eval()
    sizes = ({0: Dim("batch", min=2, max=64)},) if dynamic else None
    program = export(net, (X,), dynamic_shapes=sizes).run_decompositions()
    made, _ = fxr.rewrite(program, "affine", expect={"affine": 1})
    assert not any("norm" in node.name for node in made.graph.nodes)
    x = X[:3] if dynamic else X
    assert largest_error(outputs(net, x), outputs(copy.deepcopy(made).module(), x)) <= 1e-12
    assert set(made.state_dict) == {"linear.weight", "linear.bias"}
    again, report = fxr.rewrite(made, "affine")
    assert not report.applied
    assert str(again.graph) == str(made.graph)


def test_a_layer_that_stays_is_as_it_was() -> None:
    """Where no rule applies, the product and what repeats the weight are put back."""
    layers = nn.Sequential(nn.Linear(3, 6), nn.Tanh()).double()
    net = nets.Forward(lambda m, x: m.net(x.transpose(1, 2)), net=layers).eval()
    program = export(net, (X,)).run_decompositions()
    made, report = fxr.rewrite(program, ["affine", "cleanup"])
    assert not report.applied
    assert str(made.graph) == str(program.graph)


@pytest.mark.parametrize(
    "product",
    [
        lambda m, x: torch.bmm(x[:, :5], x[:, 5:]),
        lambda m, x: torch.bmm(x, m.several),
        lambda m, x: torch.bmm(x, m.linear.weight.expand(4, -1, -1)),
    ],
    ids=["two values", "a matrix for each", "not transposed"],
)
def test_another_product_is_no_linear_layer(product: Any) -> None:
    """The second must be one matrix of the model, transposed, for all of the batch."""
    net = nets.Forward(
        lambda m, x: m.norm(product(m, x).flatten(0, 1)),
        linear=nn.Linear(4, 4),
        norm=nn.BatchNorm1d(4),
    )
    net.several = nn.Parameter(torch.randn(4, 4, 4))
    nets.randomise(net).double()
    x = nets.random_input((4, 9, 4))
    program = export(net.eval(), (x,)).run_decompositions()
    made, report = fxr.rewrite(program, "affine")
    assert not report.applied
    torch.testing.assert_close(made.module()(x), net(x), rtol=0, atol=1e-12)
