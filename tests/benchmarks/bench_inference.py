"""What the rule set `inference` costs and gains on models of torchvision and timm, as a table.

Weights are random, the images small, and the models run in turns on the CPU with one thread:

    python tests/benchmarks/bench_inference.py [--seconds 3] [name ...]

For each model: nodes of the graph, numbers in parameters and buffers, floating-point operations of
its products, and the speed-up of `conv_bn` and of `inference`, with the middle half of all rounds.
The last column is the largest difference of an output of `inference`, relative to the largest
output.
"""

from __future__ import annotations

import argparse
from itertools import chain

import timm
import torch
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fxrewrite as fxr
from fxrewrite.cli.timing import time_in_turns
from fxrewrite.testing import randomise
from fxrewrite.tracing.tracer import trace

TORCHVISION = (
    "resnet18 mobilenet_v2 mobilenet_v3_small shufflenet_v2_x0_5 squeezenet1_1 densenet121 "
    "googlenet efficientnet_b0 regnet_y_400mf mnasnet0_5 convnext_tiny vgg11_bn"
).split()
TIMM = (
    "resnetv2_50 mobileone_s0 repvgg_a0 fastvit_t8 repghostnet_050 repvit_m0_9 convnext_atto "
    "efficientnet_lite0 ghostnet_050 hardcorenas_a hrnet_w18_small dla34 vovnet39a "
    "mixer_s32_224 poolformer_s12 edgenext_xx_small cspresnet50 nfnet_l0 "
    "tf_efficientnet_lite0 inception_v3"
).split()
COLUMNS = (
    "model", "nodes", "after", "10^6 numbers", "after", "10^6 FLOP", "after",
    "speed-up of `conv_bn`", "of `inference`", "error",
)  # fmt: skip
SIZE = {"inception_v3": 96, "mixer_s32_224": 224}


def build(name: str) -> nn.Module:
    """A model with random weights, in eval mode."""
    if name in TORCHVISION:
        options = {"init_weights": True} if name == "googlenet" else {}
        return torchvision.models.get_model(name, weights=None, **options).eval()
    return timm.create_model(name).eval()


def size(model: nn.Module) -> int:
    """How many numbers a model holds."""
    held = {id(each): each.numel() for each in chain(model.parameters(), model.buffers())}
    return sum(held.values())


def flops_of(model: nn.Module, x: torch.Tensor) -> int:
    """What the products of a model take, as torch counts them."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    return int(counter.get_total_flops())


def row(name: str, seconds: float) -> str:
    """One model's row of the table."""
    torch.manual_seed(0)
    model, x = build(name), torch.randn(1, 3, *[SIZE.get(name, 64)] * 2)
    randomise(model)
    rules = fxr.get_rule_set("inference").rules
    graph, _ = trace(model, [kind for rule in rules for kind in rule.pattern.module_types])
    folded, _ = fxr.rewrite(model, "conv_bn")
    made, _ = fxr.rewrite(model, "inference", x)
    with torch.no_grad():
        expected, found = model(x), made(x)
    nodes = [len(each.nodes) for each in (graph, made.graph)]
    sizes = [f"{size(each) / 1e6:.2f}" for each in (model, made)]
    flops = [f"{flops_of(each, x) / 1e6:.0f}" for each in (model, made)]
    gains = []
    for each in (folded, made):
        timing = time_in_turns(model, each, x, seconds=seconds)
        lower, upper = timing.middle_half
        gains.append(f"{timing.speed_up:.2f}x ({lower:.2f} to {upper:.2f})")
    error = float((found - expected).abs().max() / expected.abs().max())
    cells = [name, *map(str, nodes), *sizes, *flops, *gains, f"{error:.0e}"]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=3.0, help="for each of two timings")
    parser.add_argument("names", nargs="*", default=[*TORCHVISION, *TIMM])
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    for name in given.names:
        print(row(name, given.seconds), flush=True)


if __name__ == "__main__":
    main()
