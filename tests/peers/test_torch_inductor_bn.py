"""What PyTorch proves of the folds that inductor does: of batch norms, and of constants.

After `test/inductor/test_efficient_conv_bn_eval.py` (commit a25a54e0) and
`test/inductor/test_binary_folding.py` (commit 2a6bcbd8) of PyTorch (BSD-3-Clause). The names are
theirs, the models and the words are not. docs/peers.md lists what differs.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from checks import difference, norms, rewritten
from nets import BATCH_NORMS, CONVS, random_input, randomise
from torch import fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx

import fxrewrite as fxr

TRANSPOSED: dict[int, Any] = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
LAYERS: list[Any] = [nn.Linear, *CONVS.values(), *TRANSPOSED.values()]
OPS = [torch.add, torch.sub, torch.mul, torch.div]
# Each rank, and a bias or none.
CONVS_AND_BIASES = [*zip(CONVS.values(), [True, False, True], strict=True)]


def dims(layer: Any) -> int:
    """How many dimensions follow the channels."""
    return 0 if layer is nn.Linear else int(layer.__name__[-2])


def built(layer: Any, ins: int, bias: bool) -> tuple[nn.Module, nn.Module]:
    """A layer that makes six channels, and the norm of its rank."""
    sizes = {} if layer is nn.Linear else {"kernel_size": 2}
    return layer(ins, 6, bias=bias, **sizes), BATCH_NORMS[max(dims(layer), 1)](6)


class ConvOp(nn.Module):
    """A layer and its norm."""

    def __init__(self, layer: Any, bias: bool) -> None:
        super().__init__()
        self.conv, self.bn = built(layer, 3, bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn(self.conv(x))


class MultiUserConvOp(nn.Module):
    """Two modules that are called twice, and a value that is read twice."""

    def __init__(self, layer: Any, bias: bool) -> None:
        super().__init__()
        self.conv1, self.bn1 = built(layer, 3, bias)
        self.conv2, self.bn2 = built(layer, 6, bias)
        self.conv3, self.bn3 = built(layer, 6, bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.bn1(self.conv1(input=x))
        x = self.bn2(input=self.conv2(self.conv2(x)))
        x = self.bn3(input=self.conv3(input=x))
        return self.bn3(x) + x


def case(kind: Any, layer: Any, bias: bool, sync: bool = False) -> tuple[nn.Module, torch.Tensor]:
    """Such a model in float64, and an input."""
    model = randomise(kind(layer, bias))
    if sync:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model).eval()
    return model.double(), random_input((2, 3, *[5] * dims(layer)))


def decomposed(model: nn.Module, x: torch.Tensor) -> fx.GraphModule:
    """The operations of ATen that the model consists of, before autograd."""
    with enable_python_dispatcher():
        return make_fx(model, pre_dispatch=True)(x)


def norms_called(made: fx.GraphModule) -> int:
    """How many calls of batch norms a graph has, as modules or as operations."""
    called = {n.target for n in made.graph.nodes if n.op == "call_module"} & set(norms(made))
    calls = [n for n in made.graph.nodes if n.target in called or "batch_norm" in str(n.target)]
    return len(calls)


@pytest.mark.parametrize(
    ("form", "bias"), [("modules", True), ("modules", False), ("sync", True), ("aten", True)]
)
@pytest.mark.parametrize("layer", LAYERS)
def test_basic(layer: Any, form: str, bias: bool) -> None:
    """Behind each kind of layer the norm goes: as a module, synchronised or not, and as ATen's."""
    model, x = case(ConvOp, layer, bias, sync=form == "sync")
    given = decomposed(model, x) if form == "aten" else model
    assert norms_called(fx.symbolic_trace(given)) == 1
    made, _ = rewritten(given, "affine", x, example_inputs=x)
    assert norms_called(made) == 0
    assert difference(model, made, x) <= 1e-9


@pytest.mark.parametrize("form", ["modules", "aten"])
@pytest.mark.parametrize("layer", [nn.Linear, nn.Conv2d, nn.ConvTranspose2d])
def test_basic_with_several_users(layer: Any, form: str) -> None:
    """Of four calls of norms three go, as in theirs; the fourth reads what a sum reads, too."""
    model, x = case(MultiUserConvOp, layer, True)
    given = decomposed(model, x) if form == "aten" else model
    assert norms_called(fx.symbolic_trace(given)) == 4
    made, _ = rewritten(given, "affine", x, example_inputs=x)
    assert norms_called(made) == 1
    assert difference(model, made, x) <= 1e-9


@pytest.mark.parametrize(
    ("layer", "left"), [(nn.Conv2d, ["bn3"]), (nn.ConvTranspose2d, ["bn2", "bn3"])]
)
def test_basic_with_several_users_in_a_module_tree(layer: Any, left: list[str]) -> None:
    """There a module that is called twice stays one: bn3 can't go, nor can conv2 take a norm.

    What bn2 does the third convolution takes; a transposed one can't, since it spreads a shift.
    """
    model, x = case(MultiUserConvOp, layer, True)
    made, _ = rewritten(model, "affine", x, example_inputs=x, into="modules")
    assert norms(made) == left


@pytest.mark.parametrize("layer", [nn.Linear, nn.Conv2d, nn.ConvTranspose2d])
def test_basic_after_a_training_step(layer: Any) -> None:
    """Compiled, a model follows its parameters: they get their gradients, and may change.

    Inductor folds in each call, gradient or not. Here nothing is folded where a gradient may flow,
    and elsewhere once for the parameters as they are, and again when they are others.
    """
    model, x = case(ConvOp, layer, True)
    graphs: list[fx.GraphModule] = []

    def inner(graph_module: fx.GraphModule, example_inputs: Any) -> Any:
        graphs.append(graph_module)
        return graph_module

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=fxr.integrations.backend("affine", inner=inner))
    assert difference(model, compiled, x) <= 1e-9
    assert norms_called(graphs[-1]) == 0

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gradients = []
    for each in (model, compiled):
        optimizer.zero_grad()
        each(x).square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert norms_called(graphs[-1]) == 1
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)

    optimizer.step()
    before = len(graphs)
    assert difference(model, compiled, x) <= 1e-9
    assert len(graphs) == before


class Binary(nn.Module):
    """A layer, and an operation on what it gives and a number or a parameter."""

    def __init__(self, layer: nn.Module, op: Any, other: Any) -> None:
        super().__init__()
        self.layer, self.op = layer, op
        self.other = nn.Parameter(other) if isinstance(other, torch.Tensor) else other

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.op(self.layer(x), self.other)


def binary(layer: nn.Module, op: Any, shape: tuple[int, ...] | None) -> nn.Module:
    """With a tensor of this shape, none of whose numbers is near zero, or else with a number."""
    other = 2.0 if shape is None else random_input(shape).sign() * (0.5 + random_input(shape).abs())
    return randomise(Binary(layer, op, other)).double()


def check_binary(model: nn.Module, x: torch.Tensor, folds: bool, known: bool = True) -> str:
    """Whether the operation goes, given the input's shape or not; what the report says of it."""
    made, report = rewritten(model, "affine", x, example_inputs=x if known else None)
    calls = [node for node in made.graph.nodes if node.op == "call_function"]
    assert len(calls) == (0 if folds else 1)
    return str(report.findings[0])


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("conv", "bias"), CONVS_AND_BIASES)
def test_conv_binary_folding(conv: Any, bias: bool, op: Any) -> None:
    """A number, or a tensor of one number per channel, goes into the convolution."""
    x = random_input((2, 3, *[4] * dims(conv)))
    for shape in (None, (1, 6, *[1] * dims(conv))):
        check_binary(binary(conv(3, 6, 3, bias=bias), op, shape), x, folds=True)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("bias", [True, False])
def test_conv_binary_folding_of_other_shapes(bias: bool, op: Any) -> None:
    """A tensor of one number goes in as well; one that is not per channel makes more, and stays."""
    x = random_input((2, 3, 4, 4))
    check_binary(binary(nn.Conv2d(3, 6, 3, 2, bias=bias), op, (1, 1)), x, folds=True)
    model = binary(nn.Conv2d(3, 6, 3, 2, bias=bias), op, (6, 1, 6))
    assert "one number for each of the 6 channels" in check_binary(model, x, folds=False)


@pytest.mark.parametrize("op", OPS)
def test_conv_binary_folding_of_another_dtype(op: Any) -> None:
    """A float64 tensor makes float64 of what a convolution gives in float32, and stays."""
    model = Binary(nn.Conv2d(3, 6, 3), op, torch.tensor([2.0], dtype=torch.float64)).eval()
    x = random_input((2, 3, 4, 4)).float()
    made, report = fxr.rewrite(model, "affine", x)
    assert "makes the result float64" in report.findings[0].reason
    assert torch.equal(made(x), model(x))


def test_conv_binary_folding_of_an_unknown_rank() -> None:
    """Unlike theirs, which knows all shapes, a constant with a batch of one needs an example.

    To what has no batch it would add one.
    """
    model, x = binary(nn.Conv2d(3, 6, 3), torch.add, (1, 6, 1, 1)), random_input((2, 3, 4, 4))
    assert "example_inputs would decide it" in check_binary(model, x, folds=False, known=False)
    assert model(x[0]).dim() == 4


@pytest.mark.parametrize(("conv", "bias"), CONVS_AND_BIASES)
def test_conv_bn_folding(conv: Any, bias: bool) -> None:
    """An exported program that is decomposed has the convolution left, and nothing more."""
    model, x = case(ConvOp, conv, bias)
    program = torch.export.export(model, (x,)).run_decompositions()
    made, _ = fxr.rewrite(program, "conv_bn", expect={"conv_bn": 1})
    assert difference(model, made.module(), x) <= 1e-9
    (left,) = [n.target for n in made.graph.nodes if n.op == "call_function"]
    assert left is torch.ops.aten.convolution.default


def test_conv_bn_folding_by_the_decompositions_of_inductor() -> None:
    """A norm that is taken apart into a difference, two products and a sum is four constants.

    Casts of `prims` come with it, and what they make of a statistic is a constant as well.
    """
    model, x = case(ConvOp, nn.Conv2d, True)
    program = torch.export.export(model, (x,)).run_decompositions(select_decomp_table())
    made, report = fxr.rewrite(program, "affine")
    assert report.counts["fold_constant"]["applied"] == 4
    assert difference(model, made.module(), x) <= 1e-9


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("rank", "bias"), [(2, True), (3, False)])
def test_linear_binary_folding(rank: int, bias: bool, op: Any) -> None:
    """A number per feature, or one, goes into a linear layer, unless it adds a dimension."""
    x = random_input((2, 4, 3)[3 - rank :])
    shapes: list[Any] = [None, (6,), (1, 6), (1,), (1, 1), (1, 1, 6), (1, 1, 1)]
    for shape in shapes:
        folds = shape is None or len(shape) <= rank
        check_binary(binary(nn.Linear(3, 6, bias=bias), op, shape), x, folds)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("bias", [True, False])
def test_linear_binary_folding_of_other_shapes(bias: bool, op: Any) -> None:
    """Numbers that are not per feature stay."""
    for shape in ((4, 6), (4, 1)):
        model = binary(nn.Linear(3, 6, bias=bias), op, shape)
        said = check_binary(model, random_input((4, 3)), folds=False)
        assert "one number for each of the 6 channels" in said
