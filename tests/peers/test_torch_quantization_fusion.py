"""What PyTorch proves of the fusions of named modules before quantising, in eval mode.

After `test/quantization/eager/test_fuse_eager.py` of PyTorch (BSD-3-Clause) at commit 74d29b51. The
names are theirs, the models and the words are not. docs/peers.md lists what differs.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from checks import difference, norms, rewritten
from nets import random_input, randomise
from torch import nn

import fxrewrite as fxr

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch deprecates its own package of these
    from torch.ao.quantization import DeQuantStub, QuantStub, fuse_modules


def weights_are_alike(made: nn.Module, theirs: dict[str, nn.Module]) -> None:
    """Those of the layers with these names, to the rounding of float64."""
    for name, layer in theirs.items():
        for key, tensor in layer.state_dict().items():
            mine = made.get_submodule(name).state_dict()[key]
            torch.testing.assert_close(mine, tensor, rtol=1e-12, atol=1e-12)


class ForFusion(nn.Module):
    """Convolutions of all ranks, with a norm, behind an activation or none, and stubs."""

    def __init__(self) -> None:
        super().__init__()
        self.quant, self.dequant = QuantStub(), DeQuantStub()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv3d(3, 4, 1, bias=False), nn.BatchNorm3d(4)
        self.conv3, self.bn3 = nn.Conv1d(3, 3, 2), nn.BatchNorm1d(3)
        self.sub1 = nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4))
        self.sub2 = nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), nn.ReLU())
        self.relu1, self.relu3, self.relu4 = (nn.ReLU(inplace=True) for _ in range(3))
        self.relu2 = nn.ReLU()

    def forward(self, x: torch.Tensor) -> Any:
        x = self.relu4(self.bn3(self.conv3(self.quant(x)))).unsqueeze(2)
        y = self.relu3(self.bn2(self.relu2(self.conv2(x.unsqueeze(2)))))
        x = self.sub1(self.relu1(self.bn1(self.conv1(x))))
        return self.sub2(self.dequant(x)), self.dequant(y)


TRIPLES = [
    ["conv3", "bn3", "relu4"],
    ["conv1", "bn1", "relu1"],
    ["conv2", "relu2"],
    ["bn2", "relu3"],
    ["sub1.0", "sub1.1"],
]


def test_fuse_module_eval(into: Any) -> None:
    """Three norms are gone, an Identity stands for each in a module tree; bn2 follows a ReLU.

    Nobody has to name the modules. ReLUs stay modules, for only a quantised layer has one in it.
    """
    model, x = randomise(ForFusion()).double(), random_input((2, 3, 9))
    made, report = rewritten(model, "conv_bn", x, into=into)
    assert norms(made) == ["bn2"]
    assert "it reads relu2 (ReLU)" in report.why("bn2")
    theirs: Any = fuse_modules(model, TRIPLES)
    assert difference(theirs, made, x) <= 1e-12
    folded = {"conv1": theirs.conv1[0], "conv3": theirs.conv3[0], "sub1.0": theirs.sub1[0]}
    weights_are_alike(made, folded)
    if into == "modules":
        assert [type(each) for each in (made.bn1, made.bn3, made.sub1[1])] == [nn.Identity] * 3
        assert type(theirs.bn1) is nn.Identity


@pytest.mark.parametrize("rules", ["conv_bn", "affine", "inference"])
def test_fuse_module_train(rules: str, into: Any) -> None:
    """In training mode nothing is folded: theirs makes modules that train on, and ours stays."""
    model = randomise(ForFusion()).train()
    made, report = fxr.rewrite(model, rules, into=into)
    assert norms(made) == norms(model)
    assert not report.applied
    assert "is in training mode" in report.why("bn1")


def sequential() -> nn.Module:
    """Containers of a type of its own in a container, and a classifier."""

    class ConvBnRelu(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Conv2d(3, 3, 1, bias=False), nn.BatchNorm2d(3), nn.ReLU())

    features = nn.Sequential(*(ConvBnRelu() for _ in range(3)))
    stem = (nn.Conv2d(3, 3, 1), nn.ReLU())
    classifier = nn.Sequential(nn.Linear(48, 5), nn.ReLU())
    return randomise(nn.Sequential(*stem, features, nn.Flatten(), classifier)).double()


def test_fusion_sequential_model_eval(into: Any) -> None:
    """In each container inside of a container the norm goes."""
    model, x = sequential(), random_input((2, 3, 4, 4))
    made, _ = rewritten(model, "conv_bn", x, into=into)
    assert norms(made) == []
    triples = [[f"2.{i}.{j}" for j in range(3)] for i in range(3)]
    theirs: Any = fuse_modules(model, triples)
    assert difference(theirs, made, x) <= 1e-12
    weights_are_alike(made, {f"2.{i}.0": theirs[2][i][0][0] for i in range(3)})


def test_fusion_sequential_model_train(into: Any) -> None:
    """In training mode each norm in a container stays."""
    model = sequential().train()
    made, report = fxr.rewrite(model, "conv_bn", into=into)
    assert norms(made) == norms(model)
    assert len(report.refused) == 3


def test_fusion_conv_with_bias(into: Any) -> None:
    """A bias is scaled and shifted with the rest. Theirs is in training mode, ours in eval mode."""
    layers = (nn.Conv2d(3, 4, 5), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
    model = randomise(nn.Sequential(*layers, nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))).double()
    x = random_input((2, 3, 8, 8))
    made, _ = rewritten(model, "conv_bn", x, into=into)
    assert norms(made) == []
    theirs: Any = fuse_modules(model, [["0", "1", "2"], ["3", "4"]])
    weights_are_alike(made, {"0": theirs[0][0], "3": theirs[3]})
    assert norms(fxr.rewrite(model.train(), "conv_bn")[0]) == ["1", "4"]


def trained(model: nn.Module, x: torch.Tensor) -> Any:
    """After a step in training mode, which gives the norms statistics that fit."""
    randomise(model).double().train()(x)
    return model.eval()


def test_fusion_linear_bn_eval(into: Any) -> None:
    """A linear layer takes its norm, given that its input is known to have two dimensions.

    Torch's function is told so by being called. In three a norm normalises the second.
    """
    model = trained(nn.Sequential(nn.Linear(20, 10), nn.BatchNorm1d(10)), random_input((8, 20)))
    x = random_input((8, 20), seed=1)
    made, _ = rewritten(model, "affine", x, example_inputs=x, into=into)
    assert norms(made) == []
    theirs: Any = fuse_modules(model, [["0", "1"]])
    weights_are_alike(made, {"0": theirs[0]})
    unknown = fxr.plan(model, "affine", into=into).why("1")
    assert "example_inputs would decide it" in unknown


class Transposed(nn.Module):
    """A transposed convolution of each rank, with its norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.ConvTranspose1d(3, 4, 2), nn.BatchNorm1d(4)
        self.conv2, self.bn2 = nn.ConvTranspose2d(4, 3, 1), nn.BatchNorm2d(3)
        self.conv3, self.bn3 = nn.ConvTranspose3d(3, 3, 1), nn.BatchNorm3d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.bn1(self.conv1(x)).unsqueeze(2)
        x = self.bn2(self.conv2(x)).unsqueeze(2)
        return self.bn3(self.conv3(x))


PAIRS = [[f"conv{i}", f"bn{i}"] for i in (1, 2, 3)]


def test_fusion_convtranspose_bn_eval(into: Any) -> None:
    """Each transposed convolution takes its norm."""
    model = trained(Transposed(), random_input((8, 3, 6)))
    x = random_input((8, 3, 6), seed=1)
    made, _ = rewritten(model, "affine", x, into=into)
    assert norms(made) == []
    theirs: Any = fuse_modules(model, PAIRS)
    weights_are_alike(made, {name: theirs.get_submodule(name) for name, _ in PAIRS})


def test_forward_hooks_preserved(into: Any) -> None:
    """Theirs moves hooks to the fused module; here what carries one stays, and the hook runs.

    Where the hook stands outside of what is folded, behind a ReLU, it is in nobody's way.
    """
    model, x = randomise(ForFusion()).double(), random_input((2, 3, 9))
    called: list[str] = []
    model.conv1.register_forward_pre_hook(lambda *_: called.append("conv1"))
    model.sub1[1].register_forward_hook(lambda *_: called.append("sub1.1"))
    model.relu4.register_forward_hook(lambda *_: called.append("relu4"))
    made, report = rewritten(model, "conv_bn", x, into=into)
    assert norms(made) == ["bn1", "bn2", "sub1.1"]
    assert "conv1 carries a forward pre hook" in report.why("bn1")
    assert "sub1.1 carries a forward hook" in report.why("sub1.1")
    called.clear()
    made(x)
    assert called == ["relu4", "conv1", "sub1.1"]
