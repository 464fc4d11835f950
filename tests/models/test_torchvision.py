"""Torchvision's models: each foldable batch norm goes, and the outputs stay.

No trained weights are needed to find a wrong fold, but statistics are that suit the model. Those of
a fresh batch norm (mean 0, variance 1) would let a fold prove nothing, and blindly random ones make
a deep model's signal fade or explode layer by layer, so that an error in it shows nowhere, or its
own float32 noise everywhere. So each batch norm is given a variance around the mean square of what
really comes in, one scale for the layer: a scale for each channel would blow up the rounding errors
of channels that carry next to nothing.
"""

from __future__ import annotations

from typing import Any

import checks
import nets
import pytest
import torch
from torch import fx, nn
from torchvision import models

import fxrewrite as fxr


def calibrated(model: nn.Module, x: torch.Tensor) -> nn.Module:
    """Random statistics and weights to the scale of the activations, in one forward."""
    make = torch.Generator().manual_seed(0)

    def set_to_scale(bn: Any, args: tuple[torch.Tensor]) -> None:
        def normal() -> torch.Tensor:
            return torch.randn(bn.num_features, generator=make)

        mean_square = args[0].square().mean()
        bn.running_mean.copy_(0.2 * mean_square.sqrt() * normal())
        bn.running_var.copy_(mean_square * (0.3 * normal()).exp())
        weight = normal().sign() * (0.5 + torch.rand(bn.num_features, generator=make))
        rare = torch.rand(bn.num_features, generator=make) < 0.05
        bn.weight.copy_(torch.where(rare, weight * 1e-6, weight))
        bn.bias.copy_(normal())

    norms = [each for each in model.eval().modules() if isinstance(each, nets.ANY_BATCH_NORM)]
    hooks = [each.register_forward_pre_hook(set_to_scale) for each in norms]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return model


def foldable(graph_module: fx.GraphModule) -> int:
    """How many batch norms read a convolution that nothing else reads, counted by hand."""
    count = 0
    for node in graph_module.graph.nodes:
        if node.op == "call_module" and is_a(graph_module, node, nets.ANY_BATCH_NORM):
            (source,) = node.all_input_nodes
            alone = len(source.users) == 1
            count += alone and is_a(graph_module, source, nets.ANY_CONV)
    return count


def is_a(graph_module: fx.GraphModule, node: fx.Node, kinds: tuple[Any, ...]) -> bool:
    called = node.op == "call_module"
    return called and isinstance(graph_module.get_submodule(str(node.target)), kinds)


def vgg16_bn_features() -> nn.Module:
    """The part of vgg16_bn with the batch norms.

    The classifier behind it, three linear layers of up to 25,088 random weights each, loses up to
    2e-6 in float32 by itself, with or without a fold.
    """
    return models.vgg16_bn(init_weights=False).features


CASES: list[tuple[Any, int, int]] = [  # model, batch norms folded, batch norms that stay
    (models.resnet18, 20, 0),
    (models.resnet34, 36, 0),
    (models.resnet50, 53, 0),
    (models.resnet101, 104, 0),
    (models.mobilenet_v2, 52, 0),
    (models.mobilenet_v3_small, 34, 0),
    (models.mobilenet_v3_large, 46, 0),
    (models.densenet121, 59, 62),  # those that stay come before a convolution
    (models.googlenet, 57, 2),  # those that stay are in auxiliary classifiers, not called here
    (models.inception_v3, 94, 2),
    (models.regnet_x_400mf, 71, 0),
    (models.regnet_y_400mf, 53, 0),
    (models.efficientnet_b0, 49, 0),
    (models.shufflenet_v2_x1_0, 56, 0),
    (models.mnasnet1_0, 52, 0),
    (vgg16_bn_features, 13, 0),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "applied", "missed"), CASES, ids=[make.__name__ for make, *_ in CASES]
)
def test_a_model_with_batch_norms(make: Any, applied: int, missed: int) -> None:
    """All that can be folded is, with the outputs of float64 to 1e-9, and in float32 to 1e-6."""
    slow_to_initialise = make in (models.googlenet, models.inception_v3)
    model = make(init_weights=False) if slow_to_initialise else make()
    side = 80 if make is models.inception_v3 else 64
    x = torch.randn(1, 3, side, side)
    calibrated(model, x)

    assert foldable(fx.symbolic_trace(model)) == applied
    fused, report = fxr.rewrite(model, "conv_bn", expect={"conv_bn": applied})
    assert foldable(fused) == 0
    assert (len(report.refused), len(report.missed)) == (0, missed)
    found = [each.double() for each in checks.outputs(fused, x)]

    exact = checks.outputs(model.double(), x.double())
    assert checks.largest_error(exact, found) <= 1e-6
    assert checks.largest_error(exact, checks.outputs(fxr.fuse(model), x.double())) <= 1e-9


@pytest.mark.parametrize("make", [models.squeezenet1_0, models.convnext_tiny])
def test_a_model_without_batch_norms(make: Any) -> None:
    """Nothing applies, and the outputs are the same to the bit."""
    model, x = make().eval(), torch.randn(1, 3, 64, 64)
    fused, report = fxr.rewrite(model, "conv_bn")
    assert report.findings == ()
    assert torch.equal(checks.outputs(fused, x)[0], checks.outputs(model, x)[0])
