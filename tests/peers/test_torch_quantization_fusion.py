"""What PyTorch proves of the fusions that come before quantising, in eval mode.

After `test/quantization/eager/test_fuse_eager.py` (commit 74d29b51) and the class TestFuseFx in
`test/quantization/fx/test_quantize_fx.py` (commit 87c1facf, and a later one) of PyTorch
(BSD-3-Clause). The names are theirs, the models and the words are not. docs/peers.md lists what
differs.
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
    from torch.ao.quantization import DeQuantStub, QuantStub, fuse_modules
    from torch.ao.quantization.quantize_fx import fuse_fx


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


# What follows is after TestFuseFx.


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
    """As `test_fusion_linear_bn_eval`, in a graph: one call of a linear layer is left."""
    model = trained(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), random_input((8, 4)))
    x = random_input((8, 4), seed=1)
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

    def __init__(self, add: Any, with_bn: bool, left: bool, two: bool, with_relu: bool) -> None:
        super().__init__()
        self.conv, self.other = nn.Conv2d(4, 4, 2), nn.Conv2d(4, 4, 2) if two else None
        self.bn = nn.BatchNorm2d(4) if with_bn else nn.Identity()
        self.relu = nn.ReLU() if with_relu else nn.Identity()
        self.add, self.left = add, left

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        made = self.bn(self.conv(x))
        y = y if self.other is None else self.other(x)
        return self.relu(self.add(made, y) if self.left else self.add(y, made))


@pytest.mark.parametrize("with_relu", [True, False])
@pytest.mark.parametrize("two", [True, False])
@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("with_bn", [True, False])
@pytest.mark.parametrize("add", [torch.add, operator.add])
def test_fuse_conv_bn_add_relu_by_default(
    add: Any, with_bn: bool, left: bool, two: bool, with_relu: bool
) -> None:
    """The norm goes on either side of a sum, however it is written; sum and ReLU stay."""
    model = randomise(AddRelu(add, with_bn, left, two, with_relu)).double()
    inputs = (random_input((1, 4, 3, 3)), random_input((1, 4, 2, 2), seed=1))
    made, report = rewritten(model, "conv_bn", *inputs)
    assert norms(made) == []
    assert len(report.applied) == with_bn
    assert difference(fuse_fx(model), made, *inputs) <= 1e-12
    assert add in {node.target for node in made.graph.nodes}


def test_fuse_conv_bn_add_relu_by_default_of_two_convolutions() -> None:
    """Unlike theirs, the set `inference` makes one convolution of two that are added."""
    model = randomise(AddRelu(torch.add, True, True, True, True)).double()
    inputs = (random_input((1, 4, 3, 3)), random_input((1, 4, 2, 2), seed=1))
    made, _ = rewritten(model, "inference", *inputs, example_inputs=inputs)
    assert [type(each) for each in made.children()] == [nn.Conv2d, nn.ReLU]


def test_fuse_convtranspose_bn_eval() -> None:
    """Of a model that FX traces, three transposed convolutions are left, and no norm."""
    model, x = trained(Transposed(), random_input((8, 3, 6))), random_input((2, 3, 6))
    made, _ = rewritten(model, "affine", x)
    assert [type(each) for each in made.children()] == [
        nn.ConvTranspose1d,
        nn.ConvTranspose2d,
        nn.ConvTranspose3d,
    ]
    assert difference(fuse_fx(model), made, x) <= 1e-12


def test_fuse_module_relu(into: Any) -> None:
    """A norm between two ReLUs stays; theirs joins it with the one behind, which changes nothing."""
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
    with pytest.raises(fxr.errors.UnknownRuleSetError, match="typo.*conv_bn"):
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
    """In a graph it may hold the very module; a module tree takes that for another use of it."""

    @fxr.rule(pattern=CONV_RELU)
    def join(m: Any) -> fxr.Replace:
        return fxr.Replace(ConvRelu(m.conv), slot="conv")

    model = conv_bn(lambda m, x: m.relu(m.conv(x)), relu=nn.ReLU())
    made, report = rewritten(model, join, random_input((1, 4, 5, 5)), into=into)
    assert type(made.conv) is (ConvRelu if into == "graph" else nn.Conv2d)
    assert ("conv is used elsewhere too" in report.why("relu")) == (into == "modules")


@pytest.mark.parametrize("name", ["custom_pattern", "with_multiple_inputs"])
@pytest.mark.parametrize("add", [torch.add, operator.add])
def test_fuse_custom_pattern(add: Any, name: str) -> None:
    """A pattern of one's own may hold a sum with another value, which its module then reads.

    Theirs are two tests: the value is dropped in one, whose result is another model, and an input
    of the new module in the other.
    """

    @fxr.pattern
    class ConvBnAddRelu:
        conv: nn.Conv2d
        bn: nn.BatchNorm2d
        add: fxr.Call = fxr.call(torch.add, operator.add)
        relu: nn.ReLU

    @fxr.rule
    def join(m: ConvBnAddRelu) -> fxr.Replace:
        (added,) = m.add.kwargs.values()
        conv = torch.nn.utils.fusion.fuse_conv_bn_eval(m.conv, m.bn)
        return fxr.Replace(ConvRelu(conv), slot="conv", inputs=(added,))

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        y, x = m.pool(x), m.bn(m.conv(x))
        return m.relu(add(y, x) if name == "custom_pattern" else add(x, y))

    model, x = (
        conv_bn(forward, pool=nn.MaxPool2d(3, 1, 1), relu=nn.ReLU()),
        random_input((1, 4, 5, 5)),
    )
    made, _ = rewritten(model, join, x)
    assert [type(each) for each in made.children()] == [nn.MaxPool2d, ConvRelu]
    (joined,) = [n for n in made.graph.nodes if n.target == "conv"]
    assert len(joined.args) == 2


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
