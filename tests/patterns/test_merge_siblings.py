"""The rule set merge_siblings: which layers become one, and which are left alone."""

from __future__ import annotations

import nets
import pytest
import torch
from fxrewrite.patterns.merge_siblings import of_any_size
from torch import nn

import fxrewrite as fxr
from fxrewrite.testing.written import written


@pytest.mark.slow
def test_inductor_compiles_what_the_rule_set_leaves():
    """The example of the issue that asked for it."""
    model, x = nets.Attention().eval(), torch.randn(2, 5, 4)
    compiled = torch.compile(
        model, backend=fxr.integrations.backend("merge_siblings", inner="inductor")
    )
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))
    torch._dynamo.reset()


def branches(*, groups=1, other=None):
    members = {"a": nn.Conv2d(8, 4, 1, groups=groups), "b": nn.Conv2d(8, 4, 1, groups=groups)}
    return written(
        {**members, "b": other or members["b"]}, ["return F.relu(self.a(x)), F.relu(self.b(x))"]
    )


image = torch.randn(1, 8, 7, 7)


def test_branches_of_one_geometry_become_one_convolution():
    model = branches()
    made, _ = fxr.rewrite(model, "merge_siblings", image, expect={"merge_convs": 1})
    assert made.a.weight.shape == (8, 8, 1, 1)
    for one, other in zip(made(image), model(image), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        (nn.Conv2d(8, 4, 3), "differs in kernel_size: (3, 3), and here (1, 1)"),
        (nn.Conv2d(8, 4, 1, stride=2), "differs in stride: (2, 2), and here (1, 1)"),
        (nn.Conv2d(8, 4, 1, padding=1), "differs in padding: (1, 1), and here (0, 0)"),
        (nn.Conv2d(8, 4, 1, groups=2), "differs in groups: 2, and here 1"),
        (nn.Conv2d(8, 4, 1).double(), "differs in dtype: torch.float64, and here torch.float32"),
        (nn.Conv2d(8, 4, 1, padding_mode="circular"), "differs in padding_mode: circular"),
    ],
)
def test_convolutions_of_another_geometry_are_no_siblings(other, expected):
    report = fxr.plan(branches(other=other), "merge_siblings")
    assert expected in report.missed[0].reason


def test_groups_are_not_interleaved():
    report = fxr.plan(branches(groups=2), "merge_siblings", image)
    assert report.refused[0].reason == "the convolutions have 2 groups"


def test_large_layers_are_left_alone():
    members = {"a": nn.Linear(512, 128), "b": nn.Linear(512, 128)}
    model = written(members, ["return F.relu(self.a(x)), F.relu(self.b(x))"])
    report = fxr.plan(model, "merge_siblings", torch.randn(1, 512))
    assert "the layers have 131072 weights together" in report.refused[0].reason
    assert fxr.plan(model, of_any_size).applied


def test_large_values_are_left_alone():
    report = fxr.plan(branches(), "merge_siblings", torch.randn(1, 8, 128, 128))
    assert "the layers compute some 131072 numbers" in report.refused[0].reason


def test_without_shapes_layers_are_left_alone():
    report = fxr.plan(branches(), "merge_siblings")
    assert "example_inputs would decide it" in report.refused[0].reason
    assert fxr.plan(branches(), of_any_size).applied
