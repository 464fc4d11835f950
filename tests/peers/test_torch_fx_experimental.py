"""What PyTorch proves of its own folding of batch norms in FX graphs.

After `test/test_fx_experimental.py` of PyTorch (BSD-3-Clause) at commit 016b5866: the tests of
`torch.fx.experimental.optimization`. The names are theirs, the models and the words are not.
docs/peers.md lists what differs.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from checks import difference, norms, rewritten
from nets import conv_bn, random_input, randomise
from torch import nn
from torch.fx.experimental import optimization

import fxrewrite as fxr


class Block(nn.Module):
    """A residual block, whose shortcut has a convolution and a norm of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(6, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.short = nn.Sequential(nn.Conv2d(6, 8, 1, 2, bias=False), nn.BatchNorm2d(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += self.short(x)
        return self.relu(y)


def small_resnet() -> nn.Module:
    """A ResNet of one block: stem, block, head."""
    stem = (nn.Conv2d(3, 6, 7, 2, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(inplace=True))
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    return randomise(nn.Sequential(*stem, nn.MaxPool2d(3, 2, 1), Block(), *head)).double()


def test_conv_bn_fusion(into: Any) -> None:
    """No norm of a ResNet is left, and the weights are those of torch's own fold."""
    model, x = small_resnet(), random_input((2, 3, 32, 32))
    made, report = rewritten(model, "conv_bn", x, into=into)
    assert norms(made) == []
    assert len(report.applied) == len(norms(model)) == 4

    theirs = optimization.fuse(model)
    assert difference(theirs, made, x) <= 1e-12
    assert made.state_dict().keys() == theirs.state_dict().keys()
    for name, tensor in theirs.state_dict().items():
        torch.testing.assert_close(made.state_dict()[name], tensor, rtol=1e-12, atol=1e-12)


def test_conv_bn_fusion_not_running_state(into: Any) -> None:
    """A norm that keeps no statistics stays, here with the reason, and the outputs to the bit."""
    model = conv_bn(bn=nn.BatchNorm2d(4, track_running_stats=False)).double()
    x = random_input((1, 4, 5, 5))
    made, report = rewritten(model, "conv_bn", x, into=into)
    assert norms(made) == norms(optimization.fuse(model)) == ["bn"]
    assert torch.equal(made(x), model(x))
    assert "keeps no running statistics" in report.why("bn")


def test_conv_bn_fusion_mixed_dtype(into: Any) -> None:
    """A norm in float32 goes into a convolution in bfloat16, whose weights are rounded once.

    Torch's fold computes in float32, so that its weights are rounded twice: at most a unit in the
    last place away, which in bfloat16 is 2 ** -7 at most.
    """
    half = nn.Conv2d(4, 8, 3, padding=1, bias=False, dtype=torch.bfloat16)
    model = conv_bn(conv=half, bn=nn.BatchNorm2d(8, eps=1e-3))
    made, _ = fxr.rewrite(model, "conv_bn", into=into, expect={"conv_bn": 1})
    exact, _ = fxr.rewrite(copy.deepcopy(model).double(), "conv_bn", into=into)
    theirs = optimization.fuse(model)
    assert norms(made) == norms(theirs) == []
    for name, tensor in exact.state_dict().items():
        assert torch.equal(made.state_dict()[name], tensor.bfloat16())
        torch.testing.assert_close(theirs.state_dict()[name], tensor.bfloat16(), rtol=2**-7, atol=0)
    x = random_input((1, 4, 8, 8)).bfloat16()
    assert made(x).dtype == model(x).dtype == torch.bfloat16


def two_chains() -> nn.Module:
    """Two chains of convolutions with norms, and dropouts, whose results are added."""
    chains = [
        nn.Sequential(
            *(
                each
                for _ in range(3)
                for each in (nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout())
            )
        )
        for _ in range(2)
    ]
    return conv_bn(lambda m, x: m.left(x) + m.right(x), left=chains[0], right=chains[1]).double()


@pytest.mark.parametrize(("rules", "dropouts"), [("inference", 0), ("affine", 6)])
def test_optimize_for_inference_cpu(rules: str, dropouts: int) -> None:
    """Norms go, and dropouts by one set and not by the other, as by torch's `remove_dropout`.

    Torch's conversion to a layout of oneDNN is switched off, for it has none for float64.
    """
    model, x = two_chains(), random_input((1, 4, 8, 8))
    made, _ = rewritten(model, rules, x)
    config = {"remove_dropout": dropouts == 0, "mkldnn_layout_optimize": False}
    theirs = optimization.optimize_for_inference(model, pass_config=config)
    assert difference(theirs, made, x) <= 1e-12
    for each in (made, theirs):
        calls = [n for n in each.graph.nodes if n.op == "call_module"]
        kinds = [type(each.get_submodule(n.target)) for n in calls]
        assert (kinds.count(nn.BatchNorm2d), kinds.count(nn.Dropout)) == (0, dropouts)
