"""What PyTorch proves of the fusions in FX graphs before quantising, in eval mode.

After the class TestFuseFx in `test/quantization/fx/test_quantize_fx.py` of PyTorch (BSD-3-Clause),
read at commit 4b78f859 of the fork maggiemoss/pytorch. The names are theirs, the models and the
words are not. docs/peers.md lists what differs.
"""

from __future__ import annotations

import operator
import warnings
from typing import Any

import pytest
import torch
from checks import difference, norms, rewritten
from nets import BATCH_NORMS, CONVS, conv_bn, random_input, randomise
from torch import nn

import fxrewrite as fxr

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch deprecates its own package of these
    from torch.ao.quantization.quantize_fx import fuse_fx


class Ranks(nn.Module):
    """A convolution and a norm of each rank, twice, with one ReLU that is called three times."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.ModuleList(
            nn.Sequential(CONVS[i](2, 2, 1), BATCH_NORMS[i](2)) for i in (1, 2, 3)
        )
        self.active = nn.ModuleList(
            nn.Sequential(CONVS[i](2, 2, 1), BATCH_NORMS[i](2)) for i in (3, 2, 1)
        )
        self.relu = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for each in self.plain:
            x = each(x).unsqueeze(-1)
        for each in self.active:
            x = self.relu(each(x.squeeze(-1)))
        return x


def test_fuse_conv_bn_relu(into: Any) -> None:
    """A norm of each rank goes, whether a ReLU follows or not, and the ReLU stays one module."""
    model, x = randomise(Ranks()).double(), random_input((2, 2, 5))
    made, _ = rewritten(model, "conv_bn", x, into=into)
    assert norms(made) == norms(fuse_fx(model)) == []
    assert difference(fuse_fx(model), made, x) <= 1e-12
    assert [type(each) for each in made.modules()].count(nn.ReLU) == 1


def test_fuse_linear_bn_eval() -> None:
    """Of a linear layer and its norm one call is left, given that the input has two dimensions."""
    model, x = randomise(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))), random_input((8, 4))
    made, _ = rewritten(model, "affine", x, example_inputs=x)
    assert [type(each) for each in made.children()] == [nn.Linear]
    assert difference(fuse_fx(model), made, x) <= 1e-12


@pytest.mark.parametrize("with_bn", [True, False])
def test_linear_bn_leaky_relu_not_fused_by_default(with_bn: bool) -> None:
    """The linear layer and the activation stay two modules, as they do by default in theirs."""
    between = [nn.BatchNorm1d(5)] if with_bn else []
    model = randomise(nn.Sequential(nn.Linear(5, 5), *between, nn.LeakyReLU())).double()
    x = random_input((3, 5))
    made, _ = rewritten(model, "affine", x, example_inputs=x)
    assert [type(each) for each in made.children()] == [nn.Linear, nn.LeakyReLU]
    assert difference(fuse_fx(model), made, x) <= 1e-12


def test_linear_tanh_not_fused_by_default() -> None:
    """There is nothing to fold: the result is the same to the bit."""
    model, x = nn.Sequential(nn.Linear(5, 5), nn.Tanh()).double().eval(), random_input((3, 5))
    made, report = rewritten(model, "inference", x, example_inputs=x)
    assert not report.applied
    assert torch.equal(made(x), model(x))


class AddRelu(nn.Module):
    """A convolution, a norm or none, a sum on either side with a convolution or input, a ReLU."""

    def __init__(self, add: Any, with_bn: bool, left: bool, two: bool) -> None:
        super().__init__()
        self.conv, self.other = nn.Conv2d(4, 4, 2), nn.Conv2d(4, 4, 2) if two else None
        self.bn = nn.BatchNorm2d(4) if with_bn else nn.Identity()
        self.relu, self.add, self.left = nn.ReLU(), add, left

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        made = self.bn(self.conv(x))
        y = y if self.other is None else self.other(x)
        return self.relu(self.add(made, y) if self.left else self.add(y, made))


@pytest.mark.parametrize("two", [True, False])
@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("with_bn", [True, False])
@pytest.mark.parametrize("add", [torch.add, operator.add])
def test_fuse_conv_bn_add_relu_by_default(add: Any, with_bn: bool, left: bool, two: bool) -> None:
    """The norm goes on either side of a sum, however it is written; sum and ReLU stay."""
    model = randomise(AddRelu(add, with_bn, left, two)).double()
    inputs = (random_input((1, 4, 3, 3)), random_input((1, 4, 2, 2), seed=1))
    made, report = rewritten(model, "conv_bn", *inputs)
    assert norms(made) == []
    assert len(report.applied) == with_bn
    assert difference(fuse_fx(model), made, *inputs) <= 1e-12
    assert add in {node.target for node in made.graph.nodes}


def test_fuse_conv_bn_add_relu_by_default_of_two_convolutions() -> None:
    """Unlike theirs, the set `inference` makes one convolution of two that are added."""
    model = randomise(AddRelu(torch.add, True, True, True)).double()
    inputs = (random_input((1, 4, 3, 3)), random_input((1, 4, 2, 2), seed=1))
    made, _ = rewritten(model, "inference", *inputs, example_inputs=inputs)
    assert [type(each) for each in made.children()] == [nn.Conv2d, nn.ReLU]


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_fuse_convtranspose_bn_eval(rank: int) -> None:
    """Of a transposed convolution of each rank and its norm one call is left."""
    layer = getattr(nn, f"ConvTranspose{rank}d")(3, 4, 2)
    model = randomise(nn.Sequential(layer, BATCH_NORMS[rank](4)))
    x = random_input((2, 3, *[4] * rank))
    made, _ = rewritten(model, "affine", x)
    assert [type(each) for each in made.children()] == [type(layer)]
    assert difference(fuse_fx(model), made, x) <= 1e-12


def test_fuse_module_relu(into: Any) -> None:
    """A norm between two ReLUs stays, as in theirs, which joins it with the one behind."""
    layers = (nn.Conv2d(4, 4, 1), nn.ReLU(), nn.BatchNorm2d(4), nn.ReLU())
    model, x = randomise(nn.Sequential(*layers)).double(), random_input((2, 4, 5, 5))
    made, report = rewritten(model, "inference", x, into=into)
    assert norms(made) == ["2"]
    assert len(norms(fuse_fx(model))) == 1
    assert "it reads 1 (ReLU)" in report.why("2")


def test_problematic_fuse_example(into: Any) -> None:
    """What stands in a container of a type of its own is found as what stands outside."""

    class LinearBn(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Linear(5, 5), nn.BatchNorm1d(5))

    model = randomise(nn.Sequential(LinearBn(), nn.ReLU(), nn.Linear(5, 5))).double()
    x = random_input((3, 5))
    made, _ = rewritten(model, "affine", x, example_inputs=x, into=into)
    assert norms(made) == []


def test_fuse_custom_config_dict_validity() -> None:
    """A rule set that does not exist is an error that names those that do."""
    with pytest.raises(fxr.errors.UnknownRuleSetError, match=r"typo.*conv_bn"):
        fxr.rewrite(nn.Sequential(nn.Conv2d(3, 3, 1)).eval(), "typo")


class ConvRelu(nn.Module):
    """What somebody's own rule makes of a convolution, a ReLU, and what is added between."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: torch.Tensor, *added: torch.Tensor) -> torch.Tensor:
        return torch.relu(sum(added, self.conv(x)))


CONV_RELU = fxr.chain(conv=nn.Conv2d, relu=nn.ReLU)


def test_fuse_addtional_fuser_method(into: Any) -> None:
    """A module of one's own takes the place of a convolution and a ReLU, and holds a copy."""

    @fxr.rule(pattern=CONV_RELU)
    def join(m: Any) -> fxr.Replace:
        return fxr.Replace(ConvRelu(fxr.evolve(m.conv)), slot="conv")

    model = conv_bn(lambda m, x: m.relu(m.conv(x)), relu=nn.ReLU())
    made, _ = rewritten(model, join, random_input((1, 4, 5, 5)), into=into)
    assert type(made.conv) is ConvRelu


def test_fuse_addtional_fuser_method_that_holds_what_it_replaces(into: Any) -> None:
    """It may hold the very module, in a graph and in a module tree."""

    @fxr.rule(pattern=CONV_RELU)
    def join(m: Any) -> fxr.Replace:
        return fxr.Replace(ConvRelu(m.conv), slot="conv")

    model = conv_bn(lambda m, x: m.relu(m.conv(x)), relu=nn.ReLU())
    made, _ = rewritten(model, join, random_input((1, 4, 5, 5)), into=into)
    assert type(made.conv) is ConvRelu


@fxr.pattern
class ConvBnAddRelu:
    """A convolution and its norm, to which another value is added before a ReLU."""

    conv: nn.Conv2d
    bn: nn.BatchNorm2d
    add: fxr.Call = fxr.call(torch.add, operator.add)
    relu: nn.ReLU


@fxr.rule
def join_four(m: ConvBnAddRelu) -> fxr.Replace:
    """All four as one module, which reads the other value, too."""
    (added,) = m.add.kwargs.values()
    conv = torch.nn.utils.fusion.fuse_conv_bn_eval(m.conv, m.bn)
    return fxr.Replace(ConvRelu(conv), slot="conv", inputs=(added,))


def check_join(forward: Any) -> None:
    """Pooling and that module are left, and the module has two inputs."""
    model = conv_bn(forward, pool=nn.MaxPool2d(3, 1, 1), relu=nn.ReLU())
    made, _ = rewritten(model, join_four, random_input((1, 4, 5, 5)))
    assert [type(each) for each in made.children()] == [nn.MaxPool2d, ConvRelu]
    (joined,) = [node for node in made.graph.nodes if node.target == "conv"]
    assert len(joined.args) == 2


@pytest.mark.parametrize("add", [torch.add, operator.add])
def test_fuse_custom_pattern(add: Any) -> None:
    """A pattern of one's own may hold a sum with another value, which comes first here.

    Theirs drops that value, so that its result is another model.
    """
    check_join(lambda m, x: m.relu(add(m.pool(x), m.bn(m.conv(x)))))


def test_fusion_pattern_with_multiple_inputs() -> None:
    """The other value comes second; no function has to be given that finds it."""
    check_join(lambda m, x: m.relu(torch.add(m.bn(m.conv(x)), m.pool(x))))


def test_fusion_pattern_with_matchallnode() -> None:
    """What is added to a chain is an input of it, and may be the end of a chain of its own."""

    @fxr.pattern
    class ConvAddRelu:
        conv: nn.Conv2d
        add: fxr.Call | None = fxr.call(torch.add)
        relu: nn.ReLU

    @fxr.rule
    def join(m: ConvAddRelu) -> fxr.Replace:
        added = () if m.add is None else tuple(m.add.kwargs.values())
        return fxr.Replace(ConvRelu(m.conv), slot="conv", inputs=added)

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = m.relu1(m.conv1(x))
        return m.relu2(torch.add(m.conv2(x), y))

    layers = {"conv1": nn.Conv2d(4, 4, 1), "conv2": nn.Conv2d(4, 4, 1)}
    relus = {"relu1": nn.ReLU(), "relu2": nn.ReLU()}
    model, x = conv_bn(forward, **layers, **relus), random_input((1, 4, 5, 5))
    made, _ = rewritten(model, join, x)
    assert [type(each) for each in made.children()] == [ConvRelu, ConvRelu]
