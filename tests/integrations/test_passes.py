"""Rules as a pass: of torch.fx, of inductor, and around a backend of torch.compile."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from typing import Any

import nets
import pytest
import torch
from checks import Record, largest_error, outputs
from torch import fx, nn
from torch._inductor import config
from torch.fx.passes.infra.pass_base import PassResult
from torch.fx.passes.infra.pass_manager import PassManager
from torch.nn import functional as F

import fxrewrite as fxr
from fxrewrite.integrations.inductor import InductorPass

X = nets.random_input((2, 4, 5, 5))
aten = torch.ops.aten


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def blocks() -> nn.Module:
    layers = (nets.conv(), nets.bn(), nn.ReLU(), nets.conv(), nets.bn())
    return nets.randomise(nn.Sequential(*layers)).double()


TwoNegations = fxr.chain(
    first=fxr.call(torch.neg, aten.neg.default, "neg"),
    second=fxr.call(torch.neg, aten.neg.default, "neg"),
)


@fxr.rule(pattern=TwoNegations)
def drop_negations(m: Any) -> fxr.Bypass:
    """Twice minus is plus."""
    return fxr.Bypass()


# torch.fx


def test_a_rule_set_is_a_pass() -> None:
    """It gives torch's own result, with a new graph module, and leaves the old one as it was."""
    traced = fx.symbolic_trace(blocks())
    expected, before = outputs(traced, X), Record(traced)
    result = fxr.integrations.fx_pass("conv_bn")(traced)
    before.assert_unchanged()
    assert isinstance(result, PassResult)
    assert result.modified
    assert largest_error(expected, outputs(result.graph_module, X)) <= 1e-12


def test_a_pass_that_finds_nothing() -> None:
    """It says so, and gives back the graph module that it was given."""
    traced = fx.symbolic_trace(nn.Sequential(nn.ReLU()))
    result = fxr.integrations.fx_pass("conv_bn")(traced)
    assert not result.modified
    assert result.graph_module is traced


def test_a_pass_manager_takes_it() -> None:
    """A rule set runs among other passes until nothing changes."""
    negations = fxr.RuleSet("negations", [drop_negations])
    net = nets.Forward(lambda net, x: -(-net.body(x)).neg().neg().neg(), body=blocks())
    traced, expected = fx.symbolic_trace(net.double()), outputs(net, X)
    passes = [fxr.integrations.fx_pass(each) for each in ("conv_bn", negations)]
    manager = PassManager(passes, steps=3)
    result = manager(traced)
    assert result.modified
    calls = [node for node in result.graph_module.graph.nodes if node.op.startswith("call")]
    assert len(calls) == 6  # conv, relu, conv, and three negations, two of them by operators
    assert largest_error(expected, outputs(result.graph_module, X)) <= 1e-12


# Inductor


def graph_of(function: Any, *args: torch.Tensor) -> fx.GraphModule:
    """A graph of operators such as inductor's passes get."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.aot_autograd import make_boxed_func

    found: list[fx.GraphModule] = []

    def keep(graph_module: fx.GraphModule, _: Any) -> Any:
        found.append(graph_module)
        return make_boxed_func(graph_module.forward)

    with torch.no_grad():
        torch.compile(function, backend=aot_autograd(fw_compiler=keep))(*args)
    return found[0]


def test_inductors_pass_edits_the_graph_in_place() -> None:
    """The graph, and each node that no rule touched, is the very same object."""
    graph_module = graph_of(lambda x: x.sin().neg().neg().cos(), X)
    nodes = {node.name: node for node in graph_module.graph.nodes}
    graph = graph_module.graph
    fxr.integrations.inductor_pass(drop_negations)(graph)
    graph_module.recompile()
    assert graph_module.graph is graph
    assert [node.name for node in graph.nodes] == [n for n in nodes if "neg" not in n]
    assert all(node is nodes[node.name] for node in graph.nodes)
    torch.testing.assert_close(graph_module(X)[0], X.sin().cos())


def test_new_tensors_of_inductors_pass() -> None:
    """They are attributes of the graph's owner, and their values are known like all others."""
    net = blocks()
    graph_module = torch.export.export(net, (X,)).module()
    expected = outputs(net, X)
    fxr.integrations.inductor_pass("conv_bn")(graph_module.graph)
    graph_module.recompile()
    assert not [n for n in graph_module.graph.nodes if "batch_norm" in str(n.target)]
    assert largest_error(expected, outputs(graph_module, X)) <= 1e-12
    calls = graph_module.graph.find_nodes(op="call_function", target=aten.conv2d.default)
    assert [tuple(call.meta["val"].shape) for call in calls] == [(2, 4, 5, 5)] * 2
    assert {tuple(n.meta["val"].shape) for n in calls[0].all_input_nodes[1:]} == {
        (4, 4, 3, 3),
        (4,),
    }


def test_a_rule_that_raises_leaves_the_graph() -> None:
    """Nothing is edited before all rules have answered."""

    def fails(m: Any) -> fxr.Bypass:
        raise ValueError("no")

    Sine = fxr.chain(sine=fxr.call(aten.sin.default))
    rules = [drop_negations, fxr.rule(pattern=Sine, name="fails")(fails)]
    graph_module = graph_of(lambda x: x.neg().neg().sin(), X)
    before = str(graph_module.graph)
    with pytest.raises(fxr.errors.RuleError, match="no"):
        fxr.integrations.inductor_pass(rules)(graph_module.graph)
    assert str(graph_module.graph) == before


@pytest.mark.slow
def test_inductor_compiles_what_a_pass_leaves() -> None:
    """As a post-grad pass, rules act on the graph that inductor compiles."""
    seen: list[str] = []

    class Watch(InductorPass):
        def __call__(self, graph: fx.Graph) -> None:
            super().__call__(graph)
            seen.extend(str(node.target) for node in graph.nodes)

    watching = Watch(fxr.integrations.inductor_pass(drop_negations)._rule_sets)
    # What inductor kept on disk of an earlier run would do without the pass.
    with config.patch(post_grad_custom_pre_pass=watching, force_disable_caches=True):
        made = torch.compile(lambda x: (x + 1).neg().neg() * 2)(X)
    torch.testing.assert_close(made, (X + 1) * 2)
    assert any("add" in each for each in seen)
    assert not any("neg" in each for each in seen)


def test_the_key_of_inductors_cache() -> None:
    """It is the same for the same rules, another for others, and none where source is not all."""

    def made_by(scale: float) -> Any:
        @fxr.rule(pattern=TwoNegations)
        def scaled(m: Any) -> fxr.Call:
            return fxr.Call(lambda x: x * scale)

        return scaled

    ids = [
        fxr.integrations.inductor_pass(each).uuid()
        for each in ("conv_bn", "conv_bn", drop_negations)
    ]
    assert ids[0] == ids[1] != ids[2]
    assert ids[0] is not None
    assert fxr.integrations.inductor_pass(made_by(2.0)).uuid() is None


# torch.compile


class Kept:
    """An inner backend that keeps the graphs it is given."""

    def __init__(self) -> None:
        self.graphs: list[fx.GraphModule] = []

    def __call__(self, graph_module: fx.GraphModule, example_inputs: Any) -> Any:
        self.graphs.append(graph_module)
        return graph_module.forward

    def called(self, at: int = -1) -> list[str]:
        nodes = self.graphs[at].graph.nodes
        return [getattr(n.target, "__name__", n.target) for n in nodes if n.op.startswith("call")]


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_a_backend_by_name(inner: str) -> None:
    """Rules go before any backend, for any batch size."""
    net = blocks()
    compiled = torch.compile(net, backend=fxr.integrations.backend("conv_bn", inner=inner))
    for batch in (2, 3, 5):
        x = nets.random_input((batch, 4, 5, 5))
        assert largest_error(outputs(net, x), outputs(compiled, x)) <= 1e-12


def test_rules_see_parameters_where_no_gradient_can_flow() -> None:
    """Under no_grad the batch norms are folded; with gradients the parameters are inputs."""
    net, inner = blocks(), Kept()
    compiled = torch.compile(net, backend=fxr.integrations.backend("conv_bn", inner=inner))
    outputs(compiled, X)
    assert inner.called() == ["conv2d", "relu", "conv2d"]
    compiled(X).sum().backward()
    found = [each.grad.clone() for each in net.parameters()]
    assert inner.called() == ["conv2d", "batch_norm", "relu", "conv2d", "batch_norm"]
    net.zero_grad()
    net(X).sum().backward()
    assert all(torch.equal(a, b.grad) for a, b in zip(found, net.parameters(), strict=True))


def test_frozen_parameters_are_constants() -> None:
    """Where they need no gradient they are folded, and one flows to the input all the same."""
    net, inner = blocks().requires_grad_(False), Kept()
    compiled = torch.compile(net, backend=fxr.integrations.backend("conv_bn", inner=inner))
    x = X.clone().requires_grad_()
    compiled(x).sum().backward()
    expected = X.clone().requires_grad_()
    net(expected).sum().backward()
    assert inner.called() == ["conv2d", "relu", "conv2d"]
    torch.testing.assert_close(x.grad, expected.grad, rtol=1e-12, atol=1e-12)


def write(net: Any) -> None:
    net[1].weight.mul_(-0.5)
    net[4].running_var.add_(1.0)


def load(net: Any) -> None:
    net.load_state_dict(nets.randomise(copy.deepcopy(net), seed=7).state_dict())


def give_data(net: Any) -> None:
    net[0].weight.data = torch.randn(4, 4, 3, 3).double()


def give_parameter(net: Any) -> None:
    net[3].weight = nn.Parameter(torch.randn(4, 4, 3, 3).double())


def optimise(net: Any) -> None:
    with torch.enable_grad():
        net(X).square().mean().backward()
    torch.optim.SGD(net.parameters(), lr=0.1).step()


def write_to_data(net: Any) -> None:
    net[1].weight.data.mul_(-0.5)


def write_by_numpy(net: Any) -> None:
    net[3].weight.detach().numpy()[...] *= 1.5


def average(net: Any) -> None:
    """As an exponential moving average of the weights does."""
    for each in net.parameters():
        each.data.lerp_(torch.randn_like(each), 0.1)


CHANGES = [write, load, give_data, give_parameter, optimise, write_to_data, write_by_numpy, average]


@pytest.mark.parametrize("change", CHANGES)
def test_changed_parameters_are_folded_anew(change: Any) -> None:
    """What was folded follows the model's parameters, without another compilation by `inner`."""
    net, inner = blocks(), Kept()
    compiled = torch.compile(net, backend=fxr.integrations.backend("conv_bn", inner=inner))
    before = outputs(compiled, X)
    for _ in range(2):
        with torch.no_grad():
            change(net)
        assert largest_error(outputs(net, X), outputs(compiled, X)) <= 1e-12
    assert largest_error(before, outputs(compiled, X)) > 1e-3
    assert inner.called() == ["conv2d", "relu", "conv2d"]


def test_where_rules_decide_otherwise_later(caplog: pytest.LogCaptureFixture) -> None:
    """The graph then runs as it was before the rules, and this is logged."""
    Norm = fxr.chain(norm=nn.BatchNorm2d)

    def is_idle(m: Any) -> str | None:
        return None if m.norm.weight.abs().max() == 0 else "it scales by something"

    @fxr.rule(pattern=Norm, where=[is_idle], name="nothing_left")
    def nothing_left(m: Any) -> fxr.Call:
        return fxr.Call(torch.zeros_like)

    net = nets.Forward(lambda net, x: net.norm(x), norm=nets.bn()).double()
    with torch.no_grad():
        net.norm.weight.zero_()
        net.norm.bias.zero_()
    inner = Kept()
    compiled = torch.compile(net, backend=fxr.integrations.backend(nothing_left, inner=inner))
    assert outputs(compiled, X)[0].abs().max() == 0
    assert inner.called() == ["zeros_like"]
    with torch.no_grad():
        net.norm.weight.fill_(2.0)
    with caplog.at_level(logging.WARNING, "fxrewrite"):
        for _ in range(2):
            assert largest_error(outputs(net, X), outputs(compiled, X)) <= 1e-12
    said = [each for each in caplog.records if each.name == "fxrewrite"]
    assert len(said) == 1


def test_a_layer_that_trains_keeps_doing_so() -> None:
    """A batch norm in training mode updates its statistics inside of a compiled graph."""
    net = blocks()
    net[1].train()
    plain = copy.deepcopy(net)
    compiled = torch.compile(net, backend=fxr.integrations.backend("conv_bn", inner="eager"))
    for seed in range(3):
        x = nets.random_input((2, 4, 5, 5), seed)
        assert largest_error(outputs(plain, x), outputs(compiled, x)) <= 1e-12
    torch.testing.assert_close(plain[1].running_mean, net[1].running_mean)


def test_a_graph_that_no_rule_touches_is_handed_on() -> None:
    """The inner backend gets the very graph that came from the compiler."""
    given: list[Any] = []
    rules = fxr.integrations.backend(
        drop_negations, inner=lambda gm, x: given.append(gm) or gm.forward
    )
    net = nn.Sequential(nn.ReLU())
    torch.testing.assert_close(torch.compile(net, backend=rules)(X), F.relu(X))
    assert "dynamo_compile_id" in given[0].meta


def test_names_that_are_none() -> None:
    """Unknown rule sets and backends are reported before anything is compiled."""
    with pytest.raises(fxr.errors.UnknownRuleSetError):
        fxr.integrations.backend("no_such_rules")
    with pytest.raises(Exception, match="no_such_backend"):
        fxr.integrations.backend("conv_bn", inner="no_such_backend")
