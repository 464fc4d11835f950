"""Programs of torch.export are rewritten as models are, and are programs again."""

from __future__ import annotations

import copy
import functools
import io
import operator
from typing import Any

import nets
import pytest
import strategies
import torch
from checks import largest_error, outputs
from hypothesis import given, settings
from torch import fx, nn
from torch.export import Dim, ExportedProgram, export
from torch.nn import functional as F

import fxrewrite as fxr


class Net(nn.Module):
    """Two convolutions with batch norms, one pair of them called twice, and what else there is."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.inner = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Dropout(), nn.BatchNorm2d(4))
        self.linear = nn.Linear(4, 3)
        self.last = nn.BatchNorm1d(3)
        self.unused = nn.Parameter(torch.ones(2))
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("scale", torch.tensor(0.5), persistent=False)
        nets.randomise(self).double()

    def forward(self, x: torch.Tensor) -> Any:
        self.calls.add_(1)
        x = self.norm(self.conv(x)).relu()
        x = self.inner(x) + self.inner(x * self.scale) + torch.tensor(1.0)
        return self.last(self.linear(x.mean((2, 3)))), self.calls * 2


def exported(decomposed: bool, net: nn.Module, x: torch.Tensor = nets.X) -> ExportedProgram:
    """The net as a program for any batch size but 1."""
    made = export(net, (x,), dynamic_shapes=({0: Dim("batch", min=2, max=64)},))
    return made.run_decompositions() if decomposed else made


@functools.cache
def program(decomposed: bool) -> ExportedProgram:
    """The one program that most tests are about."""
    net = Net()
    if decomposed and LEAVES_COPIES:
        net.inner[1] = nn.Identity()
    return exported(decomposed, net)


# Before torch 2.14 a dropout decomposes into a copy, across which no rule folds.
LEAVES_COPIES = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 14)
both = pytest.mark.parametrize("decomposed", [False, True], ids=["training IR", "decomposed"])


class Snapshot:
    """All that a program is, to compare with later."""

    def __init__(self, program: ExportedProgram) -> None:
        self.program = program
        self.text = self.now()
        self.tensors = {**program.state_dict, **program.constants}
        self.copies = {k: v.detach().clone() for k, v in self.tensors.items()}

    def now(self) -> str:
        it = self.program
        return f"{it.graph} {it.graph_signature} {it.range_constraints} {it.module_call_graph}"

    def assert_unchanged(self) -> None:
        now = {**self.program.state_dict, **self.program.constants}
        assert self.now() == self.text
        assert list(now) == list(self.tensors)
        assert all(now[name] is tensor for name, tensor in self.tensors.items())
        assert all(torch.equal(now[name], tensor) for name, tensor in self.copies.items())


def run(program: ExportedProgram, x: torch.Tensor) -> list[torch.Tensor]:
    """What a program gives, without a trace in its buffers."""
    return outputs(copy.deepcopy(program).module(), x)


@pytest.mark.slow
@both
def test_a_program_is_folded(decomposed: bool) -> None:
    """The result is valid, gives what the program gave for any batch, and the program stays."""
    original = program(decomposed)
    before = Snapshot(original)
    made, report = fxr.rewrite(original, "conv_bn", expect={"conv_bn": 3})
    before.assert_unchanged()
    made.validate()
    assert [f.anchor for f in report.applied] == ["norm", "inner.2", "inner.2"]
    assert sum("batch_norm" in str(node.target) for node in made.graph.nodes) == 1
    assert made.verifiers == original.verifiers
    assert made.range_constraints == original.range_constraints
    for batch in (2, 7):
        x = nets.random_input((batch, 4, 5, 5))
        assert largest_error(run(original, x), run(made, x)) <= 1e-12


@both
def test_the_state_dict_of_the_result(decomposed: bool) -> None:
    """New tensors have the keys of a folded layer; all others stay, in place and by identity."""
    original = program(decomposed)
    made, report = fxr.rewrite(original, "conv_bn")
    gone = [k for k in original.state_dict if k.startswith(("norm.", "inner.2."))]
    keys = [k for k in original.state_dict if k not in gone]
    keys.insert(keys.index("conv.weight") + 1, "conv.bias")
    assert list(made.state_dict) == keys
    assert list(made.constants) == list(original.constants)
    changed = {"conv.weight", "conv.bias", "inner.0.weight", "inner.0.bias"}
    for key in made.state_dict.keys() - changed:
        assert made.state_dict[key] is original.state_dict[key]
    for key in changed:
        assert isinstance(made.state_dict[key], nn.Parameter)
        assert made.state_dict[key].requires_grad
    signature = made.graph_signature
    assert signature.inputs_to_parameters["p_conv_bias"] == "conv.bias"
    assert set(signature.parameters) == {name for name, _ in made.named_parameters()}
    assert signature.buffers_to_mutate == original.graph_signature.buffers_to_mutate
    became = report.parameter_names
    assert str(became["inner.2.running_var"]) == "folded into inner.0.weight, inner.0.bias"


@pytest.mark.slow
@both
def test_the_result_goes_wherever_a_program_goes(decomposed: bool) -> None:
    """It is saved and loaded, decomposed, unflattened, and rewritten once more."""
    original = program(decomposed)
    made, _ = fxr.rewrite(original, "conv_bn")
    expected = run(original, nets.X)
    file = io.BytesIO()
    torch.export.save(made, file)
    file.seek(0)
    for each in (torch.export.load(file), made.run_decompositions()):
        each.validate()
        assert largest_error(expected, run(each, nets.X)) <= 1e-12
    again, report = fxr.rewrite(made, "conv_bn")
    assert not report.applied
    assert str(again) == str(made)
    unflat = torch.export.unflatten(copy.deepcopy(made))
    assert largest_error(expected, outputs(unflat, nets.X)) <= 1e-12


@both
def test_all_values_are_known(decomposed: bool) -> None:
    """Each node's recorded value has the shape, type and strides that a run gives it."""
    made, _ = fxr.rewrite(program(decomposed), "conv_bn")
    seen: dict[str, Any] = {}

    class Watch(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            seen[n.name] = super().run_node(n)
            return seen[n.name]

    tensors = {**made.state_dict, **made.constants}
    specs = made.graph_signature.input_specs
    Watch(made.graph_module).run(*(tensors.get(s.target, nets.X.clone()) for s in specs))
    for node in made.graph.nodes:
        if node.op != "output" and isinstance(seen[node.name], torch.Tensor):
            known, found = node.meta["val"], seen[node.name]
            assert [n if isinstance(n, int) else len(nets.X) for n in known.shape] == [*found.shape]
            assert known.dtype == found.dtype
            assert [n for n in known.stride() if isinstance(n, int)] == [
                m for n, m in zip(known.stride(), found.stride(), strict=True) if isinstance(n, int)
            ]


@both
def test_a_batch_norm_in_training_mode(decomposed: bool) -> None:
    """It stays, updates its statistics as before, and the report says why."""
    net = nn.Sequential(nets.conv(), nets.bn(), nets.conv(), nets.bn()).double()
    nets.randomise(net)[1].train()
    original = exported(decomposed, net)
    made, report = fxr.rewrite(original, "conv_bn", expect={"conv_bn": 1})
    (missed,) = report.missed if report.missed else (None,)
    if not decomposed:
        assert "training=True" in missed.reason
    pair = [copy.deepcopy(each).module() for each in (original, made)]
    results = [outputs(each, nets.X) for each in pair]
    assert largest_error(*results) <= 1e-12
    stats = [dict(each.named_buffers())["1.running_mean"] for each in pair]
    assert not torch.equal(stats[0], net[1].running_mean)
    torch.testing.assert_close(*stats)


# What no operator spells by itself.

Relu = fxr.chain(relu=nn.ReLU)


@fxr.rule(pattern=Relu)
def to_modules(m: Any) -> fxr.Replace:
    """A module of several operators, with a parameter and a buffer."""
    layers = nn.Sequential(nn.BatchNorm2d(4, affine=False), nn.ReLU(), nn.Conv2d(4, 4, 1))
    return fxr.Replace(nets.randomise(layers).double())


@fxr.rule(pattern=Relu)
def to_functions(m: Any) -> fxr.Call:
    """Functions of torch, methods and operators, a constant, and a function of several values."""

    def function(x: Any, scale: Any) -> Any:
        first, second = torch.split(x.clamp(min=0.1), [1, 3], dim=1)
        return torch.cat((second * scale, first + 1), dim=1)

    return fxr.Call(function, torch.full((3, 1, 1), 2.0, dtype=torch.float64))


@pytest.mark.slow
@both
@pytest.mark.parametrize("rule", [to_modules, to_functions], ids=lambda rule: rule.name)
def test_what_a_rule_makes_is_spelt_in_operators(rule: Any, decomposed: bool) -> None:
    """Modules and calls of any kind become operators, their tensors inputs of the program."""
    net = nets.Forward(lambda net, x: net.conv(F.relu(net.conv(x))), conv=nets.conv()).double()
    made, _ = fxr.rewrite(exported(decomposed, net), rule, expect={rule.name: 1})
    expected, _ = fxr.rewrite(net, rule)
    made.validate()
    x = nets.random_input((3, 4, 5, 5))
    assert largest_error(outputs(expected, x), run(made, x)) <= 1e-12
    made.run_decompositions()
    calls = [node.target for node in made.graph.nodes if node.op.startswith("call_")]
    assert all(
        each is operator.getitem or isinstance(each, torch._ops.OpOverload) for each in calls
    )


@pytest.mark.parametrize(
    ("action", "reason"),
    [
        (fxr.Call(lambda x: x.float()), "gives a tensor of float32"),
        (fxr.Call(torch.flatten, start_dim=2), "and the chain gave a tensor of float64 and shape"),
        (fxr.Call(lambda x: x.numpy()), "can't be part of an exported program"),
    ],
    ids=["type", "shape", "no form without data"],
)
def test_what_does_not_fit_is_refused(action: fxr.Call, reason: str) -> None:
    """A replacement has to be a tensor like the chain's, or the signature would not hold."""
    rule = fxr.rule(pattern=Relu, name="misfit")(lambda m: action)
    original = exported(False, nn.Sequential(nn.ReLU()).eval())
    made, report = fxr.rewrite(original, rule)
    assert reason in report.refused[0].reason
    assert str(made) == str(original)


@both
def test_linear_layers(decomposed: bool) -> None:
    """A linear layer is matched as `linear` and as the matrix product that it decomposes into."""
    Two = fxr.chain(first=nn.Linear, second=nn.Linear)

    def product(m: Any) -> fxr.Replace:
        weight = m.second.weight @ m.first.weight
        bias = m.second.bias @ torch.eye(3).double() + m.second.weight @ m.first.bias
        return fxr.Replace(fxr.evolve(m.second, weight=weight, bias=bias), slot="second")

    rule = fxr.rule(pattern=Two, name="product")(product)
    net = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3), nn.ReLU()).double().eval()
    original = exported(decomposed, net, nets.random_input((2, 4)))
    x = nets.random_input((3, 4))
    expected = run(original, x)
    made, _ = fxr.rewrite(original, rule, expect={"product": 1})
    assert list(made.state_dict) == ["1.weight", "1.bias"]
    assert [len(each.graph.find_nodes(op="placeholder")) for each in (original, made)] == [5, 3]
    assert largest_error(expected, run(made, x)) <= 1e-12
    made.validate()


class Branching(nn.Module):
    """A model with a branch that data decides."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.other = nets.conv(), nets.bn(), nets.bn()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.conv(x))
        return torch.cond(x.sum() > 0, lambda y: self.other(y), lambda y: y * 2, (x,))


class Tied(nn.Module):
    """A decoder whose weight is the encoder's, transposed; and a convolution of such a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.weight = nn.Linear(6, 3), nn.Parameter(torch.randn(3, 4, 1, 1))
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        decoded = F.linear(torch.relu(self.linear(x)), self.linear.weight.t())
        return decoded, self.bn(F.conv2d(y, self.weight.transpose(0, 1)))


@pytest.mark.parametrize("rules", ["conv_bn", "affine"])
def test_a_weight_that_is_read_transposed_stays_as_it_is(rules: str) -> None:
    model, given = Tied().eval(), (torch.randn(2, 6), torch.randn(1, 3, 2, 2))
    made, report = fxr.rewrite(torch.export.export(model, given), rules)
    for one, other in zip(made.module()(*given), model(*given), strict=True):
        torch.testing.assert_close(one, other)
    assert "its weight is a tensor of the model that is read transposed" in str(report)


def test_subgraphs_stay() -> None:
    """What is around a branch is folded, and the branch is as it was."""
    net = nets.randomise(Branching()).double()
    original = export(net, (nets.X,))
    inputs = (nets.X, nets.X * 100, -nets.X)
    expected = [run(original, x) for x in inputs]
    made, _ = fxr.rewrite(original, "conv_bn", expect={"conv_bn": 1})
    for x, each in zip(inputs, expected, strict=True):
        assert largest_error(each, run(made, x)) <= 1e-12


def test_a_program_has_no_modules_to_write_into() -> None:
    """Writing into the module tree is for models."""
    with pytest.raises(ValueError, match="no modules"):
        fxr.rewrite(program(False), "conv_bn", into="modules")


def test_verify_runs_both_programs() -> None:
    """A rewrite of a program can be verified at once."""
    made, _ = fxr.rewrite(program(False), "conv_bn", verify=(nets.X,))
    assert isinstance(made, ExportedProgram)


@pytest.mark.slow
@settings(max_examples=5)
@given(strategies.models())
def test_any_model_exported_folds_as_it_does_in_layers(model: Any) -> None:
    """As many batch norms are folded as in the model's own graph, if not more."""
    net, x = model
    if any(isinstance(m, fx.GraphModule) for m in net.modules()):
        return
    original = export(net, (x,))
    in_layers = fxr.plan(net, "conv_bn", x)
    for each in (original, original.run_decompositions()):
        expected = run(each, x)
        made, report = fxr.rewrite(each, "conv_bn")
        assert len(report.applied) >= len(in_layers.applied), (report, in_layers)
        assert largest_error(expected, run(made, x)) <= 1e-9
