"""Rules on module types match the same steps where a graph spells them as functions."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import nets
import pytest
import strategies
import torch
from checks import Record, largest_error, outputs
from hypothesis import given
from hypothesis import strategies as st
from torch import fx, nn
from torch.nn import functional as F

import fxrewrite as fxr
from fxrewrite.dialects.op_table import SPELLINGS, Spelling
from fxrewrite.dialects.semantics import Transposed

CONV_OF: dict[Any, Any] = {
    nn.Conv1d: F.conv1d,
    nn.Conv2d: F.conv2d,
    nn.Conv3d: F.conv3d,
}


def conv(net: nn.Module, x: Any, name: str) -> Any:
    """The call of a convolution, written out."""
    own = net.get_submodule(name)
    settings = {k: getattr(own, k) for k in ("stride", "padding", "dilation", "groups")}
    return CONV_OF[type(own)](x, own.weight, own.bias, **settings)


def bn(net: nn.Module, x: Any, name: str) -> Any:
    """The call of a batch norm in eval mode, written out."""
    own = net.get_submodule(name)
    stats, affine = (own.running_mean, own.running_var), (own.weight, own.bias)
    return F.batch_norm(x, *stats, *affine, own.running_mean is None, 0.1, own.eps)


def called(graph: fx.GraphModule) -> list[str]:
    """What a graph calls: functions by name, modules by type."""
    nodes = [n for n in graph.graph.nodes if n.op.startswith("call_")]
    return [
        type(graph.get_submodule(n.target)).__name__
        if n.op == "call_module"
        else getattr(n.target, "__name__", n.target)
        for n in nodes
    ]


# The table of facts.

MODULES: dict[Any, Any] = {
    **{kind: lambda kind=kind: kind(4, 6, 3, 2, 2, dilation=2, groups=2) for kind in CONV_OF},
    **{
        kind: lambda kind=kind: kind(4, 6, 3, 2, 1, output_padding=1, groups=2, dilation=2)
        for kind in (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    },
    nn.Linear: lambda: nn.Linear(7, 3),
    **{kind: lambda kind=kind: kind(4, eps=0.1) for kind in nets.ANY_BATCH_NORM},
    nn.Hardtanh: lambda: nn.Hardtanh(-0.5, 0.25),
    nn.LeakyReLU: lambda: nn.LeakyReLU(0.3),
    nn.ELU: lambda: nn.ELU(0.7),
    nn.CELU: lambda: nn.CELU(0.6),
    nn.Softplus: lambda: nn.Softplus(0.5, 3.0),
    nn.Hardshrink: lambda: nn.Hardshrink(0.3),
    nn.Softshrink: lambda: nn.Softshrink(0.3),
    nn.GELU: lambda: nn.GELU("tanh"),
}
SHAPES: dict[Any, tuple[int, ...]] = {nn.Linear: (4, 7)}
for rank, (side, *kinds) in {
    1: (9, nn.Conv1d, nn.ConvTranspose1d, nn.BatchNorm1d, nn.Dropout1d),
    2: (9, nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d, nn.Dropout2d),
    3: (6, nn.Conv3d, nn.ConvTranspose3d, nn.BatchNorm3d, nn.Dropout3d),
}.items():
    SHAPES.update((kind, (2, 4, *[side] * rank)) for kind in kinds)
SPELT = [
    (spelling, kind)
    for spelling in SPELLINGS.values()
    for kind in spelling.meaning.kinds
    if spelling.function is not torch.ops.aten.bmm.default  # which nothing is spelt by
]


def name_of(each: Any) -> str:
    """What a case is called: the module, or the function with its library."""
    if isinstance(each, Spelling):
        return f"{getattr(each.function, '__module__', 'method')}.{named(each)}"
    return str(each.__name__)


def named(spelling: Spelling) -> str:
    """What a function is called, its overload included."""
    return str(getattr(spelling.function, "__name__", spelling.function))


@pytest.mark.parametrize(("spelling", "kind"), SPELT, ids=name_of)
def test_a_spelling_says_what_the_module_does(spelling: Spelling, kind: type[nn.Module]) -> None:
    """Called with the arguments that spell a module, the function gives what the module gives.

    Read from these arguments, the module has the same settings and the very same tensors. What says
    by its name that it writes in place does so, and so does the module, if it has such a form.
    """
    module = nets.randomise(MODULES.get(kind, kind)()).double()
    if spelling.implied:
        assert spelling.spell(module) is None
        module.inplace = True
    if spelling.function is torch.ops.aten.mm.default:
        module.bias = None
    if named(spelling).endswith(".padding"):
        module = kind(4, 6, 3, padding="same", dilation=2).double()
    x = nets.random_input(SHAPES.get(kind, (2, 4, 3)))
    spelt = spelling.spell(module)
    assert spelt is not None
    plain = {
        k: v.tensor.t() if isinstance(v, Transposed) else list(v) if isinstance(v, tuple) else v
        for k, v in {**spelt, spelling.data: x}.items()
    }
    function = spelling.function
    function = getattr(torch.Tensor, function) if isinstance(function, str) else function
    plain[spelling.data] = given = x.clone()
    made = function(
        *(plain[name] for name in spelling.names), **{k: plain[k] for k in spelling.keywords}
    )
    made = made if spelling.item is None else made[spelling.item]
    assert made is given or not spelling.implied
    torch.testing.assert_close(made, module(x.clone()), rtol=0, atol=1e-12)
    written = {k: v for k, v in {**spelt, **spelling.implied}.items() if v is not None}
    again = spelling.meaning.lift(written, x.dim())
    assert isinstance(again, nn.Module)
    assert repr(again) == repr(module)
    for name, tensor in itertools.chain(module.named_parameters(), module.named_buffers()):
        if name != "num_batches_tracked":
            assert getattr(again, name) is tensor
    torch.testing.assert_close(again(x.clone()), module(x.clone()), rtol=0, atol=1e-12)


# Chains.


class Functional(nn.Module):
    """Layers whose forward is written out: (function, name of the layer)."""

    def __init__(self, *steps: tuple[Any, str], **layers: nn.Module) -> None:
        super().__init__()
        self.steps = steps
        for name, layer in layers.items():
            self.add_module(name, layer)
        nets.randomise(self).double()

    def forward(self, x: Any) -> Any:
        for function, name in self.steps:
            x = function(self, x, name)
        return x


def relu(net: nn.Module, x: Any, name: str) -> Any:
    return F.relu(x)


def dropout(net: nn.Module, x: Any, name: str) -> Any:
    return F.dropout(x, training=net.training)


def call(net: nn.Module, x: Any, name: str) -> Any:
    return net.get_submodule(name)(x)


def folded(net: nn.Module, x: torch.Tensor, applied: int, **options: Any) -> Any:
    """Rewritten with conv_bn and held to the model's own outputs."""
    before, expected = Record(net), outputs(copy.deepcopy(net), x)
    made, report = fxr.rewrite(net, "conv_bn", **options)
    before.assert_unchanged()
    assert len(report.applied) == applied, report
    assert largest_error(expected, outputs(made, x)) <= 1e-12
    return made, report


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_functional_chain_becomes_a_functional_call(rank: int) -> None:
    """Nothing is left of the batch norm, and the folded tensors have the names of the old ones.

    The forward read its mode, so that the graph checks it.
    """
    layers = {"conv": nets.CONVS[rank](4, 4, 3, padding=1), "norm": nets.BATCH_NORMS[rank](4)}
    net = Functional((conv, "conv"), (dropout, ""), (bn, "norm"), (relu, ""), **layers)
    made, report = folded(net, nets.random_input((2, 4, *[5] * rank)), 1)
    assert called(made) == [f"conv{rank}d", "Mode", "relu"]
    assert list(made.state_dict()) == ["conv.weight", "conv.bias"]
    assert str(report.applied[0]) == (
        f"batch_norm: applied by fold_conv_bn: conv{rank}d -> dropout -> batch_norm "
        f"became conv{rank}d"
    )
    assert report.why("norm") == report.why("batch_norm")


def test_a_new_bias_stands_beside_the_weight() -> None:
    """A convolution without bias gets one under the name that a layer would give it."""
    layers = {"conv": nn.Conv2d(4, 4, 1, bias=False), "norm": nets.bn()}
    net = Functional((conv, "conv"), (bn, "norm"), **layers)
    made, _ = folded(net, nets.X, 1)
    assert list(made.state_dict()) == ["conv.weight", "conv.bias"]
    net.register_buffer("kernel", torch.randn(4, 4, 1, 1).double())
    net.steps = ((lambda net, x, name: F.conv2d(x, net.kernel), ""), (bn, "norm"))
    made, _ = folded(net, nets.X, 1)
    assert list(made.state_dict()) == ["kernel", "kernel_bias"]
    assert not list(made.parameters())


@pytest.mark.parametrize(("first", "second"), [(call, bn), (conv, call)])
def test_chains_of_both_dialects(first: Any, second: Any) -> None:
    """A layer and a written-out call make a chain; the result is in the convolution's dialect."""
    steps = [(first, "conv"), (second, "norm")]
    made, _ = folded(Functional(*steps, conv=nets.conv(), norm=nets.bn()), nets.X, 1)
    assert called(made) == ["Conv2d" if first is call else "conv2d"]


def test_a_weight_that_is_read_elsewhere_stays() -> None:
    """The folded tensors then get names of their own, and what reads the old one still does."""
    steps = [(conv, "conv"), (bn, "norm"), (lambda net, x, name: x * net.conv.weight.sum(), "")]
    made, _ = folded(Functional(*steps, conv=nets.conv(), norm=nets.bn()), nets.X, 1)
    assert set(made.state_dict()) == {"conv.weight", "conv.weight_1", "conv.bias"}


def test_calls_of_one_layer_share_what_they_become() -> None:
    """Two written-out calls of one convolution and one batch norm read one folded weight."""
    steps = [(conv, "conv"), (bn, "norm")] * 2
    made, report = folded(Functional(*steps, conv=nets.conv(), norm=nets.bn()), nets.X, 2)
    assert list(made.state_dict()) == ["conv.weight", "conv.bias"]
    assert [found.anchor for found in report.applied] == ["batch_norm", "batch_norm_1"]


def test_one_convolution_before_two_norms() -> None:
    """Each call then has a weight of its own."""
    steps = [(conv, "conv"), (bn, "norm"), (conv, "conv"), (bn, "other")]
    net = Functional(*steps, conv=nets.conv(), norm=nets.bn(), other=nets.bn())
    made, _ = folded(net, nets.X, 2)
    assert len(made.state_dict()) == 4


def test_what_no_rule_touches_is_put_back() -> None:
    """Where nothing applies, the graph is as it was, to the names of its nodes."""
    steps = [(bn, "norm"), (conv, "conv"), (dropout, ""), (relu, ""), (conv, "conv"), (bn, "norm")]
    net = fx.symbolic_trace(Functional(*steps, conv=nets.conv(), norm=nets.bn()))
    read_twice = net.graph.find_nodes(op="call_function", target=torch.conv2d)[-1]
    net.graph.output_node().args = ((read_twice, net.graph.output_node().args[0]),)
    made, report = fxr.rewrite(net, "conv_bn")
    assert len(report.refused) == 1
    assert str(made.graph) == str(net.graph)


def norm_of(net: nn.Module, x: Any, **settings: Any) -> Any:
    own = net.norm
    return F.batch_norm(x, own.running_mean, own.running_var, own.weight, own.bias, **settings)


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (
            lambda net, x: norm_of(net, F.conv2d(x, net.conv.weight * 2)),
            "it reads conv2d (conv2d(): its weight is mul (mul()), not a tensor of the model), "
            "not a Conv1d, Conv2d or Conv3d",
        ),
        (
            lambda net, x: norm_of(net, net.conv(x), training=True),
            "it is called with training=True, where it normalises by each batch and updates its "
            "statistics; call model.eval() first",
        ),
        (
            lambda net, x: norm_of(net, norm_of(net, net.conv(x)), training=True),
            "its running_mean is updated by batch_norm_1 (batch_norm())",
        ),
        (
            lambda net, x: norm_of(net, net.conv(x), eps=x.shape[0]),
            "its eps is getitem (getitem()), not a tensor of the model",
        ),
        (
            lambda net, x: norm_of(net, net.conv(x) + 1),
            "whether it is one of 1, 2 or 3 dimensions is not known, since the shape that it reads "
            "is not; example_inputs would decide it",
        ),
    ],
    ids=["computed weight", "training", "updated", "computed setting", "rank"],
)
def test_what_can_not_be_read_as_a_layer(forward: Any, reason: str) -> None:
    """It stays a call of its function, and the report says why."""
    net = nets.Forward(forward, conv=nets.conv(), norm=nets.bn())
    report = fxr.plan(net, "conv_bn")
    assert not report.applied
    assert report.missed[0].reason == reason


def test_without_a_batch_dimension() -> None:
    """Then the function normalises another dimension than the convolution's channels."""

    def forward(net: nn.Module, x: Any) -> Any:
        return norm_of(net, F.conv2d(x, net.conv.weight))

    net = nets.Forward(forward, conv=nn.Conv2d(4, 4, 1), norm=nets.bn())
    report = fxr.plan(net, "conv_bn", nets.X[0, :, :4, :4].float())
    assert "its input has no batch dimension" in report.missed[0].reason


def test_a_function_that_a_rule_names_is_left_to_it() -> None:
    """A rule on F.relu gets the function's call, also where another rule is on nn.ReLU."""
    Named = fxr.chain(act=fxr.call(F.relu))
    Typed = fxr.chain(act=nn.ReLU)
    named = fxr.rule(pattern=Named, name="named")(lambda m: fxr.Call(torch.sigmoid))
    typed = fxr.rule(pattern=Typed, name="typed")(lambda m: fxr.Replace(nn.Tanh()))
    net = nets.Forward(lambda net, x: net.act(F.relu(x)), act=nn.ReLU())
    made, _ = fxr.rewrite(net, [named, typed], expect={"named": 1, "typed": 1})
    assert called(made) == ["sigmoid", "Tanh"]
    made, _ = fxr.rewrite(net, typed, expect={"typed": 2})
    assert called(made) == ["tanh", "Tanh"]


def test_what_no_function_spells_is_called_as_a_module() -> None:
    """A replacement that has no functional form stands in the graph as itself."""
    Norm = fxr.chain(norm=nn.BatchNorm2d)

    def build(m: Any) -> fxr.Replace:
        return fxr.Replace(nn.Sequential(nn.ReLU(), m.norm))

    rule = fxr.rule(pattern=Norm, name="swap")(build)
    net = nets.Forward(lambda net, x: norm_of(net, net.conv(x)), conv=nets.conv(), norm=nets.bn())
    made, _ = fxr.rewrite(net, rule)
    assert called(made) == ["Conv2d", "Sequential"]


ACTS: dict[str, tuple[Any, nn.Module]] = {
    "x.relu()": (lambda x: x.relu(), nn.ReLU()),
    "x.relu_()": (lambda x: x.relu_(), nn.ReLU(inplace=True)),
    "torch.relu(x)": (torch.relu, nn.ReLU()),
    "torch.relu_(x)": (lambda x: torch.relu_(x), nn.ReLU(inplace=True)),
    "F.relu(x, True)": (lambda x: F.relu(x, True), nn.ReLU(inplace=True)),
    "x.sigmoid()": (lambda x: x.sigmoid(), nn.Sigmoid()),
    "x.sigmoid_()": (lambda x: x.sigmoid_(), nn.Sigmoid()),
    "torch.tanh_(x)": (lambda x: torch.tanh_(x), nn.Tanh()),
    "F.hardtanh_(x, -0.5, 0.25)": (
        lambda x: F.hardtanh_(x, -0.5, 0.25),
        nn.Hardtanh(-0.5, 0.25, inplace=True),
    ),
    "F.leaky_relu_(x, 0.3)": (lambda x: F.leaky_relu_(x, 0.3), nn.LeakyReLU(0.3, inplace=True)),
    "torch.celu_(x, 0.5)": (lambda x: torch.celu_(x, 0.5), nn.CELU(0.5, inplace=True)),
    "x.hardshrink(0.25)": (lambda x: x.hardshrink(0.25), nn.Hardshrink(0.25)),
}


@pytest.mark.parametrize("exported", [False, True])
@pytest.mark.parametrize("name", ACTS)
def test_an_activation_is_read_as_its_module_however_it_is_spelt(name: str, exported: bool) -> None:
    """As a function, a method, or in place; what is left as it was keeps its spelling."""
    call, module = ACTS[name]
    found: list[Any] = []

    def once(m: Any) -> str | None:
        return None if m.conv.bias is not None else "it has no bias any more"

    @fxr.rule(pattern=fxr.chain(conv=nn.Conv2d, act=type(module)), where=[once])
    def seen(m: Any) -> fxr.Revise:
        found.append(m.act)
        return fxr.Revise(conv=fxr.evolve(m.conv, bias=None))

    net: Any = nets.Forward(lambda net, x: call(net.conv(x)), conv=nets.conv()).double()
    net = torch.export.export(net, (nets.X,)) if exported else net
    before = (net if exported else fx.symbolic_trace(net)).graph
    made, _ = fxr.rewrite(net, seen, expect={"seen": 1})
    last, was = ([*graph.nodes][-2] for graph in (made.graph, before))
    assert (last.op, last.target, last.args[1:]) == (was.op, was.target, was.args[1:])
    assert repr(found[0]) == repr(module)
    assert getattr(found[0], "inplace", False) is ("_(" in name or "True" in name)


def test_an_activation_called_with_more_is_no_module() -> None:
    """ELU's further factors, and an output that is given, are no settings of the module."""
    act = fxr.rule(pattern=fxr.chain(act=nn.ELU | nn.Tanh), name="act")(lambda m: fxr.Bypass())
    for call, reason in (
        (lambda x: F.elu_(x, 1.0, 2.0), "it is called with a further argument: scale"),
        (lambda x: torch.tanh(x, out=x), "its out is conv (Conv2d), not a tensor of the model"),
    ):
        net = nets.Forward(lambda net, x, call=call: call(net.conv(x)), conv=nets.conv())
        assert [each.reason for each in fxr.plan(net, act).missed] == [reason]


# Random models.


def written_out(net: fx.GraphModule, choose: Any) -> fx.GraphModule:
    """The graph with some of its calls of layers written out as functions."""
    graph = copy.deepcopy(net.graph)
    for node in [*graph.nodes]:
        layer = net.get_submodule(node.target) if node.op == "call_module" else None
        if not isinstance(layer, (*CONV_OF, *nets.ANY_BATCH_NORM, nn.Dropout)) or not choose():
            continue
        (x,) = (*node.args, *node.kwargs.values())

        def read(name: str, node: fx.Node = node, layer: nn.Module = layer) -> Any:
            return None if getattr(layer, name) is None else graph.get_attr(f"{node.target}.{name}")

        with graph.inserting_before(node):
            if isinstance(layer, nn.Dropout):
                new = graph.call_function(F.dropout, (x, layer.p, layer.training))
            elif isinstance(layer, nets.ANY_BATCH_NORM):
                tensors = map(read, ("running_mean", "running_var", "weight", "bias"))
                by_batch = layer.training or layer.running_mean is None
                new = graph.call_function(F.batch_norm, (x, *tensors, by_batch, 0.1, layer.eps))
            else:
                tensors = map(read, ("weight", "bias"))
                new = graph.call_function(CONV_OF[type(layer)], (x, *tensors, layer.stride, 1))
        node.replace_all_uses_with(new)
        graph.erase_node(node)
    return fx.GraphModule(net, graph)


@pytest.mark.slow
@given(strategies.models(), st.randoms(use_true_random=False))
def test_any_model_written_out_folds_as_it_does_in_layers(model: Any, choice: Any) -> None:
    """Where layers are called as functions, as many are folded, and the outputs are the same."""
    net, x = model
    if not isinstance(net, fx.GraphModule):
        return
    spelt = written_out(net, lambda: choice.random() < 0.7)
    in_layers = fxr.plan(net, "conv_bn", x)
    expected = outputs(copy.deepcopy(spelt), x)
    made, report = fxr.rewrite(spelt, "conv_bn", x)
    assert len(report.applied) == len(in_layers.applied), (report, in_layers, spelt.code)
    assert len(report.findings) == len(in_layers.findings)
    assert largest_error(expected, outputs(made, x)) <= 1e-9
