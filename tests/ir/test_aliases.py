"""Writes in place and shared storage, as the engine sees them and as torch does them."""

import copy
import operator
from typing import Any

import nets
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import fxrewrite as fxr
from fxrewrite.ir.aliases import is_fresh, written_by
from fxrewrite.ir.graph_view import GraphView


class Model(nn.Module):
    def __init__(self, forward, **children):
        super().__init__()
        self.calls = forward
        for name, child in children.items():
            setattr(self, name, child)
        self.register_buffer("buffer", torch.ones(2, 4))

    def forward(self, x, y):
        return self.calls(self, x, y)


def view_of(model):
    tracer = fx.Tracer()
    tracer.proxy_buffer_attributes = True
    return GraphView(model, tracer.trace(model), {})


def node_named(view, name):
    return next(node for node in view.graph.nodes if node.name == name)


class Observer(fx.Interpreter):
    """Runs a graph; what a node really wrote to, and whether its output shares storage."""

    def run_node(self, node: fx.Node) -> Any:
        given = {
            id(each): (each, each._version)
            for each in pytree.tree_leaves(self.fetch_args_kwargs_from_env(node))
            if isinstance(each, torch.Tensor)
        }
        storages = {each.untyped_storage().data_ptr() for each, _ in given.values()}
        out = super().run_node(node)
        node.meta["wrote"] = [each for each, before in given.values() if each._version != before]
        node.meta["shares"] = any(
            each.untyped_storage().data_ptr() in storages
            for each in pytree.tree_leaves(out)
            if isinstance(each, torch.Tensor)
        )
        node.meta["inputs"] = {
            name: self.env[name] for name in node.all_input_nodes if name in self.env
        }
        return out


ACTIVATIONS = (
    "ReLU ReLU6 ELU SELU CELU GELU SiLU Mish Sigmoid Tanh Softplus Softsign Hardswish Hardtanh "
    "Hardsigmoid LeakyReLU LogSigmoid Tanhshrink Softshrink Hardshrink RReLU PReLU"
)
MAY_WRITE = "ReLU ReLU6 ELU SELU CELU SiLU Mish Hardswish Hardtanh Hardsigmoid LeakyReLU RReLU"
FUNCTIONAL = (
    "relu relu6 elu selu celu gelu silu mish sigmoid tanh softplus softsign hardswish hardtanh "
    "hardsigmoid leaky_relu logsigmoid tanhshrink softshrink hardshrink dropout alpha_dropout "
    "relu_ elu_ normalize"
)
WITH_INPLACE = "relu relu6 elu selu celu silu mish hardswish hardtanh leaky_relu"
METHODS = (
    "abs neg exp log sqrt rsqrt sin cos reciprocal clone contiguous detach t flatten squeeze conj "
    "resolve_conj float double ravel sum mean relu tanh sigmoid abs_ neg_ exp_ relu_ tanh_ "
    "sigmoid_ zero_ t_ squeeze_"
)
WRITTEN_OUT = """
x.type_as(x); x.mT; x.T; x.data; x.add_(1); x.mul_(2); x.clamp_(0, 1); x.fill_(1); x.copy_(x + 1)
x.__iadd__(1); x.__imul__(2); x.__setitem__(0, 1); F.dropout(x, training=False)
F.threshold_(x, 0.0, 1.0); torch.relu_(x); torch.neg_(x); torch.ops.aten.relu_.default(x)
torch.ops.aten.add_.Tensor(x, x); torch.ops.aten.add_(x, 1); torch.ops.aten.add.Tensor(x, x)
torch.ops.aten.view.default(x, [4, 2]); operator.iadd(x, 1); operator.imul(x, 2); x + 1; x * 1
x - 0; x / 1; x**1; x @ x.t(); -x; x[0]; torch.add(torch.ones(2, 4), 1, out=x); nn.init.zeros_(x)
torch._foreach_add_([x], 1); torch.cat([x]); torch.stack([x]); x.chunk(2)[0]; x.unbind(0)[1]
torch.split(x, 1)[0]; x.expand(2, 4); x.view(8); torch.reshape(x, (8,)); x.permute(1, 0)
x.to(torch.float32); F.pad(x, (0, 0)); F.softmax(x, -1); F.log_softmax(x, -1)
F.layer_norm(x, (4,)); F.avg_pool1d(x, 1); F.max_pool1d(x, 1); F.adaptive_avg_pool1d(x, 4)
x.sum(()); torch.atleast_2d(x); torch.broadcast_to(x, (2, 4)); torch.where(x > 0, x, x)
node_of(x, torch.Tensor.add_, x, 1); node_of(x, operator.setitem, x, 0, 1)
"""
CALLS = [
    *(f"F.{name}(x)" for name in FUNCTIONAL.split()),
    *(f"F.{name}(x, inplace=True)" for name in WITH_INPLACE.split()),
    *(f"x.{name}()" for name in METHODS.split()),
    *WRITTEN_OUT.strip().replace("\n", "; ").split("; "),
]


def node_of(proxy, function, *args):
    """A call that `symbolic_trace` does not write down, and a graph of other origin may hold."""
    return proxy.tracer.create_proxy("call_function", function, args, {})


def observed(model):
    view = view_of(model)
    x, y = torch.linspace(0.1, 2, 8).view(2, 4), torch.linspace(0.1, 1, 8).view(2, 4)
    Observer(fx.GraphModule(model, view.graph)).run(x, y)
    return view


def check(view):
    for node in view.graph.nodes:
        if node.op.startswith("call_"):
            claimed = [node.meta["inputs"].get(each) for each in written_by(node, view)]
            for wrote in node.meta["wrote"]:
                assert any(each is wrote for each in claimed), f"{node} writes to its input"
            if node.meta["shares"]:
                assert not is_fresh(node, view), f"{node} shares storage with its input"


@pytest.mark.parametrize("call", CALLS)
def test_no_write_and_no_sharing_of_a_call_is_overlooked(call):
    names = {"torch": torch, "F": F, "nn": nn, "operator": operator, "node_of": node_of}
    check(observed(Model(lambda m, x, y: eval(call, {**names, "x": x.clone()}))))


MODULES = [
    *(getattr(nn, name)() for name in ACTIVATIONS.split()),
    *(getattr(nn, name)(inplace=True) for name in MAY_WRITE.split()),
    *(nn.Threshold(0.0, 1.0), nn.Threshold(0.0, 1.0, inplace=True), nn.Softmax(-1), nn.GLU()),
    *(nn.Dropout(), nn.Dropout(inplace=True), nn.Identity(), nn.Flatten(0), nn.Flatten(1)),
    *(nn.Unflatten(0, (1, 2)), nn.Linear(4, 4), nn.LayerNorm(4), nn.RMSNorm(4)),
    *(nn.BatchNorm1d(4), nn.GroupNorm(2, 4), nn.Conv1d(2, 2, 1)),
    *(nn.MaxPool1d(1), nn.AvgPool1d(1), nn.AdaptiveAvgPool1d(4), nn.AdaptiveMaxPool1d(4)),
    *(nn.LPPool1d(1, 1), nn.ConvTranspose1d(2, 2, 1), nn.ReLU().train(), nn.Sequential()),
]


@pytest.mark.parametrize("module", MODULES, ids=repr)
def test_no_write_and_no_sharing_of_a_module_is_overlooked(module):
    check(observed(Model(lambda m, x, y: m.leaf(x.clone()), leaf=module).eval()))


def test_storage_is_a_value_and_all_that_it_may_be_a_view_of():
    def forward(m, x, y):
        a = torch.tanh(x).view(8)[1:]
        return a + y

    view = view_of(Model(forward))
    names = {node.name for node in view.storage(node_named(view, "getitem"))}
    assert names == {"getitem", "view", "tanh"}
    assert view.storage(node_named(view, "add")) == {node_named(view, "add")}


def test_writes_are_found_in_order_and_between_two_nodes():
    def forward(m, x, y):
        a = torch.tanh(x)
        a.add_(1)
        b = torch.sin(a)
        b.mul_(2)
        return torch.cos(b).neg_()

    view = view_of(Model(forward))

    def at(name):
        return node_named(view, name)

    def between(a, b):
        return [node.name for node in view.writes_between(at(a), at(b))]

    assert between("tanh", "sin") == ["add_"]
    assert between("x", "neg_") == ["add_", "mul_"]
    assert between("sin", "sin") == between("add_", "mul_") == []
    view.forget_write(at("mul_"))
    assert between("x", "neg_") == ["add_"]
    view.note_write(at("mul_"))
    assert between("cos", "neg_") == []
    assert "mul_" in between("x", "neg_")


def test_a_later_write_to_a_value_or_to_a_view_of_it_is_found():
    def forward(m, x, y):
        a, b = torch.tanh(x), torch.tanh(y)
        a.view(8)[1:].zero_()
        return a + b

    view = view_of(Model(forward))
    tanh, other, zero = (node_named(view, name) for name in ("tanh", "tanh_1", "zero_"))
    assert view.later_write(tanh, after=tanh) is zero
    assert view.later_write(tanh, after=zero) is None
    assert view.later_write(other, after=tanh) is None


def test_tensors_of_the_model_that_its_forward_writes_to_are_known():
    def forward(m, x, y):
        m.buffer.view(8).add_(1)
        return x + m.buffer

    model = Model(forward)
    assert view_of(model).written_tensors == {id(model.buffer)}


class Copy(nn.Module):
    """What this package can't know to return new storage."""

    def forward(self, x):
        return x * 1


class Zero(nn.Module):
    def forward(self, x):
        return x * 0


class Second(nn.Module):
    def forward(self, x, y):
        return y


def other(m):
    return m.add.kwargs["other" if m.add.takes == "input" else "input"]


def spelt(function):
    return lambda m: fxr.Call(function, other(m)) if hasattr(m, "add") else fxr.Call(function)


def put(make):
    return lambda m: fxr.Replace(make(), inputs=(other(m),) if hasattr(m, "add") else ())


def writer():
    return nn.LeakyReLU(1.0, inplace=True)


BYPASS = lambda m: fxr.Bypass()  # noqa: E731
SAME = [BYPASS, spelt(lambda x: x), spelt(lambda x: x.view(2, 4)), put(nn.Identity)]
NEW = [spelt(lambda x: x * 1), spelt(lambda x: x.clone().mul_(1)), put(lambda: nn.LeakyReLU(1.0))]
WRITE = [spelt(lambda x: x.mul_(2) / 2), spelt(lambda x: x.mul_(1)), put(writer)]
SECOND = [spelt(lambda x, y: y), spelt(lambda x, y: y.view(2, 4)), put(Second)]
WRITE_SECOND = [spelt(lambda x, y: y.mul_(2) / 2), spelt(lambda x, y: y.mul_(1))]
ADD = fxr.call(operator.add)
# Chains, how a model spells them, and what may take their place as far as values go.
CHAINS: dict[str, Any] = {
    "copy": (fxr.chain(c=Copy), lambda m, a, b: m.copy(a), [*SAME, *NEW, *WRITE]),
    "identity": (fxr.chain(i=nn.Identity), lambda m, a, b: m.same(a), [*SAME[:3], *NEW, *WRITE]),
    "view": (fxr.chain(v=fxr.call("view")), lambda m, a, b: a.view(2, 4), [BYPASS, SAME[1], *NEW]),
    "negs": (
        fxr.chain(a=fxr.call("neg"), b=fxr.call("neg")),
        lambda m, a, b: a.neg().neg(),
        [*SAME, *NEW, *WRITE],
    ),
    "abs relu": (
        fxr.chain(a=fxr.call("abs"), r=nn.ReLU),
        lambda m, a, b: m.relu_(a.abs()),
        [spelt(torch.abs), spelt(lambda x: x.abs_())],
    ),
    "nothing and": (
        fxr.chain(z=Zero, add=ADD),
        lambda m, a, b: b + m.zero(a),
        [*SECOND, *WRITE_SECOND, spelt(lambda x, y: y * 1)],
    ),
    "copy and": (
        fxr.chain(c=Copy, add=ADD),
        lambda m, a, b: m.copy(a) + b,
        [lambda m: m.add, spelt(torch.add), spelt(lambda x, y: y.add(x))],
    ),
}
STEPS = {
    **{name: spelling for name, (_, spelling, _) in CHAINS.items()},
    "relu in place": lambda m, a, b: m.relu_(a),
    "abs": lambda m, a, b: a.abs(),
    "sub": lambda m, a, b: a - b,
    "add in place": lambda m, a, b: a.add_(b),
    "double in place": lambda m, a, b: a.mul_(2),
    "zero a row": lambda m, a, b: (a[0].zero_(), a)[1],
}
PROGRAMS = st.lists(
    st.tuples(st.sampled_from(sorted(STEPS)), st.integers(0, 3), st.integers(0, 3)),
    min_size=2,
    max_size=8,
)


def check_program(chain, answer, program):
    """That a rule changes nothing of what a program computes, or writes to."""

    def forward(m, x, y):
        values = [x, y.abs()]
        for name, a, b in program:
            a, b = values[-1 - a % len(values)], values[-1 - b % len(values)]
            values.append(STEPS[name](m, a, b))
        return values[-3:]

    children = {"copy": Copy(), "same": nn.Identity(), "zero": Zero(), "relu_": nn.ReLU(True)}
    model = Model(forward, **children).eval()
    rule = fxr.rule(pattern=CHAINS[chain][0], name="r")(CHAINS[chain][2][answer])
    result, _ = fxr.rewrite(model, rule)
    inputs = [torch.linspace(-1, 1, 8).view(2, 4), torch.linspace(2, -1, 8).view(2, 4)]
    given = [[each.clone() for each in inputs] for _ in range(2)]
    torch.testing.assert_close(result(*given[0]), model(*given[1]), rtol=0, atol=0)
    torch.testing.assert_close(given[0], given[1], rtol=0, atol=0)


ANSWERS = [(name, i) for name, (_, _, answers) in CHAINS.items() for i in range(len(answers))]


@pytest.mark.parametrize(("chain", "answer"), ANSWERS)
@settings(max_examples=12)
@given(program=PROGRAMS)
def test_a_rewrite_changes_no_value_whatever_is_written_in_place(chain, answer, program):
    check_program(chain, answer, program)


@pytest.mark.parametrize("write", [0, 1, 2])
@pytest.mark.parametrize(("chain", "answer"), ANSWERS)
def test_values_do_not_become_one_that_is_written_to(chain, answer, write):
    program = [("abs", 0, 0), ("abs", 1, 0), (chain, 0, 1), ("double in place", write, 0)]
    check_program(chain, answer, program)


class Returned(nn.Module):
    """The last of two activations is returned, be it as a view; the first may be an identity."""

    def __init__(self, first, shape):
        super().__init__()
        self.first, self.act, self.shape = first, nn.ReLU(), shape

    def forward(self, x):
        return self.act(self.first(x)).view(self.shape)


@pytest.mark.parametrize("first", [nn.Identity(), nn.Tanh()])
@pytest.mark.parametrize("shape", [(2, 4), (8,)])
def test_a_caller_gets_back_what_it_gave_only_if_it_did_before(first, shape):
    """Writing to what a model returns, a caller would otherwise write to what it gave as well."""
    drop = fxr.rule(pattern=fxr.chain(act=nn.ReLU), name="drop")(lambda m: fxr.Bypass())
    result, report = fxr.rewrite(Returned(first, shape).eval(), drop)
    x = torch.ones(2, 4)
    result(x).zero_()
    assert torch.equal(x, torch.ones(2, 4))
    is_new = isinstance(first, nn.Tanh)
    assert len(report.applied) == is_new
    assert is_new or "shares storage with what it is given" in report.refused[0].reason


def test_a_constant_that_the_forward_writes_to_is_no_constant():
    """A rule is given a buffer as a tensor, so one that changes from call to call is refused."""

    class Decaying(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.register_buffer("gain", torch.ones(4))

        def forward(self, x):
            self.gain.mul_(0.5)
            return self.linear(x) * self.gain

    pattern = fxr.chain(linear=nn.Linear, scaled=fxr.call(operator.mul))
    rule = fxr.rule(pattern=pattern, name="r")(lambda m: fxr.Replace(m.linear))
    report = fxr.plan(Decaying().eval(), rule)
    assert [each.reason for each in report.refused] == [
        "mul (mul()) reads gain, which the model writes to"
    ]


@pytest.mark.parametrize("into", ["graph", "modules"])
@pytest.mark.parametrize("by", ["a function", "a layer"])
def test_statistics_that_something_else_updates_are_no_constants(by, into):
    """Running statistics that a call in training mode updates are not folded where others read."""

    def forward(m, x):
        if by == "a function":
            F.batch_norm(x, m.bn.running_mean, m.bn.running_var, training=True)
        else:
            m.other(x)
        return m.bn(m.conv(x))

    model = nets.Forward(forward, conv=nets.conv(), bn=nets.bn(), other=nets.bn()).double()
    model.other.running_mean = model.bn.running_mean
    model.other.train(by == "a layer")
    made, report = fxr.rewrite(model, "conv_bn", into=into)
    assert "holds running_mean, which the model writes to" in report.why("bn")
    expected = copy.deepcopy(model)
    for _ in range(2):
        torch.testing.assert_close(made(nets.X), expected(nets.X))


def test_the_first_of_several_that_see_a_write_is_named_by_no_chance() -> None:
    """Of values that share storage the same one is named in each run, though sets have no order."""
    reasons = set()
    for _ in range(8):
        model = nets.Forward(
            lambda m, x: (lambda y: (m.second(y), y))(m.first(x.contiguous().view(2, -1))),
            first=nn.Identity(), second=nn.Dropout(inplace=True),
        )  # fmt: skip
        reasons.add(str(fxr.plan(model, "cleanup", nets.X).to_json()))
    assert len(reasons) == 1
