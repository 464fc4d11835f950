"""Making a graph of a model: what stays whole, what is said when it can't be made, what is kept."""

import sys
import threading
import warnings
from typing import Any

import nets
import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

import fxrewrite as fxr
from fxrewrite.tracing.tracer import trace

Relu = fxr.chain(relu=nn.ReLU)
drop_relu = fxr.rule(pattern=Relu, name="drop_relu")(lambda m: fxr.Bypass())
X = torch.linspace(-2, 2, 6).view(2, 3)


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.act = nn.Linear(3, 3), nn.ReLU()

    def forward(self, x):
        return self.act(self.linear(x)) * 2


class Branching(Scale):
    def forward(self, x):
        if x.sum() > 0:
            return self.linear(x)
        return x


class Counting(Scale):
    def forward(self, x):
        for row in x:
            x = x + row
        return x


def calls(model, *args, **kwargs):
    graph, _ = trace(model, *args, **kwargs)
    return [str(getattr(n.target, "__name__", n.target)) for n in graph.nodes if n.op[:4] == "call"]


def test_module_types_named_in_rules_stay_whole():
    drop_scale = fxr.rule(pattern=fxr.chain(s=Scale))(lambda m: fxr.Replace(m.s.linear))
    model = nn.Sequential(Scale(), Scale()).eval()
    rewritten, _ = fxr.rewrite(model, drop_scale, expect={"<lambda>": 2})
    assert torch.equal(rewritten(X), model[1].linear(model[0].linear(X)))
    _, other = fxr.rewrite(model, drop_relu)
    assert [finding.anchor for finding in other.applied] == ["0.act", "1.act"]


def test_types_within_call_steps_stay_whole_too():
    pattern = fxr.chain(s=fxr.call(Scale, F.relu))
    report = fxr.plan(
        nn.Sequential(Scale()).eval(), fxr.rule(pattern=pattern)(lambda m: fxr.Bypass())
    )
    assert [finding.anchor for finding in report.findings] == ["0"]


def test_leaf_modules_are_named_by_type_or_qualified_name():
    model = nn.Sequential(Scale(), nn.Sequential(Scale(), nn.ReLU()))
    assert calls(model, [Scale]) == ["0", "1.0", "1.1"]
    assert calls(model, ["1.0"]) == ["0.linear", "0.act", "mul", "1.0", "1.1"]
    assert calls(model, ["0", nn.Sequential]) == ["0", "1"]


@pytest.mark.parametrize("wrong", ["0.nothing", "9", "linear"])
def test_a_leaf_module_of_an_unknown_name_is_an_error_that_repeats_it(wrong):
    with pytest.raises((AttributeError, fxr.errors.FxRewriteError), match=wrong.rpartition(".")[2]):
        fxr.Rewriter(drop_relu, leaf_modules=[wrong]).plan(nn.Sequential(Scale()).eval())


@pytest.mark.parametrize(
    "wrong", ["0", Scale, [Scale()], [3]], ids=["str", "type", "module", "int"]
)
def test_leaf_modules_is_a_list_of_types_and_names_and_nothing_else(wrong):
    with pytest.raises((TypeError, fxr.errors.FxRewriteError), match="leaf_modules"):
        fxr.Rewriter(drop_relu, leaf_modules=wrong).plan(nn.Sequential(Scale()).eval())


class Keeps(fx.Tracer):
    def __init__(self, kind=Scale):
        super().__init__()
        self.kind = kind

    def is_leaf_module(self, module, name):
        return isinstance(module, self.kind)


@pytest.mark.parametrize("tracer", [Keeps, Keeps()], ids=["class", "instance"])
def test_a_tracer_keeps_its_own_leaf_logic_and_gets_that_of_the_rules(tracer):
    model = nn.Sequential(Scale(), nn.Tanh(), nn.ReLU())
    assert calls(model, [nn.ReLU], tracer) == ["0", "tanh", "2"]
    assert calls(nn.Sequential(*model[1:]), (), Keeps(nn.Tanh)) == ["0", "relu"]


def test_a_tracer_instance_is_as_it_was_and_serves_again():
    tracer = Keeps()
    before = {k: v.copy() if isinstance(v, dict) else v for k, v in vars(tracer).items()}
    model = nn.Sequential(Scale(), nn.ReLU()).eval()
    first = fxr.Rewriter(drop_relu, tracer=tracer).plan(model).to_json()
    assert vars(tracer) == before
    assert fxr.Rewriter(drop_relu, tracer=tracer).plan(model).to_json() == first
    assert tracer.is_leaf_module(nn.ReLU(), "1") is False


def test_a_graph_module_is_taken_as_it_is_and_not_changed():
    traced = fx.symbolic_trace(nn.Sequential(Scale(), nn.ReLU()).eval())
    code, nodes = traced.code, list(traced.graph.nodes)
    metas = [dict(node.meta) for node in nodes]
    rewritten, _ = fxr.rewrite(traced, drop_relu, expect={"drop_relu": 2})
    assert (traced.code, list(traced.graph.nodes)) == (code, nodes)
    assert [dict(node.meta) for node in nodes] == metas
    assert rewritten.graph is not traced.graph
    assert rewritten.code != code
    again, _ = fxr.rewrite(rewritten, drop_relu, expect={"drop_relu": 0})
    assert again.code == rewritten.code


def test_a_graph_module_may_read_a_tensor_and_an_attribute_of_it():
    graph, root = fx.Graph(), nn.Module()
    root.scale = nn.Parameter(torch.randn(3, 3))
    x = graph.placeholder("x")
    first = graph.call_function(torch.matmul, (x, graph.get_attr("scale")))
    graph.output(graph.call_function(torch.matmul, (first, graph.get_attr("scale.T"))))
    traced = fx.GraphModule(root, graph)
    rewritten, _ = fxr.rewrite(traced, drop_relu)
    assert torch.equal(rewritten(X), traced(X))


def test_what_can_not_be_traced_names_module_line_reason_and_what_to_do():
    model = nn.Sequential(nn.ReLU(), nn.Sequential(Scale(), Branching())).eval()
    with pytest.raises(fxr.errors.TraceError) as error:
        fxr.plan(model, drop_relu, into="graph")
    said = str(error.value)
    line = Branching.forward.__code__.co_firstlineno + 1
    assert "tracing Sequential stopped in 1.1 (Branching), at" in said
    assert f"{__file__}:{line}: if x.sum() > 0:" in said
    assert "it branches on a value that only a real run has" in said
    assert "leaf_modules=['1.1']" in said
    assert isinstance(error.value.__cause__, Exception)
    report = fxr.Rewriter(drop_relu, leaf_modules=["1.1"]).plan(model)
    assert [f.anchor for f in report.applied] == ["0", "1.0.act"]


@pytest.mark.parametrize(
    ("kind", "reason"),
    [(Branching, "it branches on a value"), (Counting, "it iterates over a value whose length")],
)
def test_a_root_that_can_not_be_traced_is_not_told_to_keep_itself_whole(kind, reason):
    with pytest.raises(fxr.errors.TraceError, match=reason) as error:
        fxr.plan(kind().eval(), drop_relu, into="graph")
    assert f"stopped in {kind.__name__}, at" in str(error.value)
    assert "leaf_modules" not in str(error.value)


def test_an_error_of_the_forward_itself_is_repeated():
    class Wrong(nn.Module):
        def forward(self, x):
            return self.nothing(x)

    with pytest.raises(fxr.errors.TraceError, match=r"no attribute 'nothing'") as error:
        fxr.plan(nn.Sequential(Wrong()), drop_relu, into="graph")
    assert "return self.nothing(x)" in str(error.value)


def test_a_model_that_is_scripted_or_compiled_is_refused_with_the_order_to_use():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(Scale().eval())
    for model, words in ((scripted, "before torch.jit"), (torch.compile(Scale()), "torch.compile")):
        with pytest.raises(
            fxr.errors.TraceError, match=f"already; rewrite the model before .*{words[-7:]}"
        ):
            fxr.plan(model, drop_relu)


def test_a_root_with_a_forward_of_its_own_is_refused():
    model = Scale().eval()
    model.forward = lambda x: x
    with pytest.raises(
        fxr.errors.TraceError, match="Scale because it has a forward set on the instance"
    ):
        fxr.plan(model, drop_relu, into="graph")


@pytest.mark.parametrize("model", [nn.ReLU, torch.relu, None, "resnet18", [nn.ReLU()]])
def test_what_is_no_model_is_a_type_error(model):
    with pytest.raises(TypeError, match=r"expected an nn\.Module, found"):
        fxr.plan(model, drop_relu)


def test_a_container_with_a_hook_stays_whole_and_its_hook_runs():
    model = nn.Sequential(Scale(), nn.ReLU(), nn.Tanh()).eval()
    model[0].register_forward_hook(lambda module, args, out: out - 1)
    rewritten, report = fxr.rewrite(model, drop_relu)
    assert [finding.anchor for finding in report.applied] == ["1"]
    assert torch.equal(rewritten(X), model[0](X).tanh())


def test_hooks_of_the_root_run_on_the_result_and_are_its_own():
    model, seen = nn.Sequential(nn.ReLU()).eval(), []
    model.register_forward_pre_hook(lambda module, args: seen.append("pre"))
    model.register_forward_hook(
        lambda module, args, kwargs, out: seen.append("post"), with_kwargs=True
    )
    rewritten, _ = fxr.rewrite(model, drop_relu)
    rewritten(X)
    assert seen == ["pre", "post"]
    rewritten._forward_hooks.clear()
    assert len(model._forward_hooks) == 1


class Stateful(nn.Module):
    """A forward that leaves something behind, where and as `how` says."""

    def __init__(self, how):
        super().__init__()
        self.how, self.cache, self.calls = how, None, 0
        self.register_buffer("steps", torch.zeros(1))
        self.plain, self.stack = torch.zeros(1), [0]

    def forward(self, x):
        STATE[self.how](self, x)
        return x.relu()


STATE = {
    "a new attribute": lambda m, x: setattr(m, "last", x),
    "an attribute": lambda m, x: setattr(m, "cache", x),
    "a count": lambda m, x: setattr(m, "calls", m.calls + 1),
    "a buffer in place": lambda m, x: m.steps.add_(1),
    "a buffer": lambda m, x: setattr(m, "steps", m.steps + 1),
    "a tensor": lambda m, x: m.plain.add_(1),
    "a list": lambda m, x: m.stack.append(x),
}


@pytest.mark.parametrize("how", STATE)
@pytest.mark.parametrize("inside", [True, False])
def test_tracing_leaves_the_model_as_it_was_whatever_its_forward_does(how, inside):
    model = Stateful(how).eval()
    root = nn.Sequential(nn.ReLU(), model) if inside else model
    before = dict(vars(model))
    if how == "a buffer in place":
        rewritten, _ = fxr.rewrite(root, drop_relu)
        rewritten(X)
        assert model.steps.item() == 1
        model.steps.zero_()
    else:
        with pytest.raises(fxr.errors.TraceError, match="which a graph can't do for it"):
            fxr.rewrite(root, drop_relu, into="graph")
    assert {**vars(model), "_buffers": 0} == {**before, "_buffers": 0}
    assert (model.steps.item(), model.plain.item(), model.stack) == (0, 0, [0])


def test_constants_made_in_the_forward_are_kept_with_the_result_and_not_with_the_model():
    class Constant(nn.Module):
        def forward(self, x):
            return x + torch.tensor([1.0, 2.0, 3.0])

    model = Constant()
    rewritten, _ = fxr.rewrite(model, drop_relu)
    assert torch.equal(rewritten(X), model(X))
    assert [name for name in vars(model) if name.startswith("_tensor")] == []
    assert list(rewritten.state_dict()) == []


def test_arguments_with_a_default_may_be_given_or_left_out():
    class Scaled(nn.Module):
        def forward(self, x, scale: float = 2.0, *, shift: float = 1.0):
            return x * scale + shift

    model = Scaled()
    rewritten, _ = fxr.rewrite(model, drop_relu)
    assert torch.equal(rewritten(X), model(X))
    assert torch.equal(rewritten(X, 3.0, shift=2.0), model(X, 3.0, shift=2.0))


@pytest.mark.parametrize("pack", [tuple, list, lambda v: {"a": v[0], "b": [v[1]]}])
def test_outputs_keep_their_structure(pack):
    class Many(nn.Module):
        def __init__(self):
            super().__init__()
            self.relu = nn.ReLU()

        def forward(self, x):
            return pack([self.relu(x), x * 2])

    model = Many().eval()
    rewritten, _ = fxr.rewrite(model, [fxr.rule(pattern=Relu)(lambda m: fxr.Replace(nn.ReLU6()))])
    assert repr(rewritten(X)) == repr(model(X))


@pytest.fixture
def impatient_threads():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("impatient_threads")
def test_many_threads_may_trace_at_once():
    models = [nn.Sequential(*[Scale() for _ in range(20)]).eval() for _ in range(8)]
    results = {}

    def run(i):
        results[i] = fxr.rewrite(models[i], drop_relu)[1].counts["drop_relu"]["applied"]

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(models))]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert results == dict.fromkeys(range(8), 20)


@pytest.mark.parametrize("into", ["graph", "modules"])
def test_an_augmented_assignment_is_a_write_in_place(into: Any) -> None:
    """`x += 1` writes to the argument and to what is a view of it, as it does in the model."""

    def forward(m: Any, x: torch.Tensor) -> Any:
        y = x
        part = x[:1]
        x += 1
        part *= 2
        return m.bn(m.conv(y)), part

    model = nets.Forward(forward, conv=nets.conv(), bn=nets.bn()).double()
    fused, report = fxr.rewrite(model, "conv_bn", into=into)
    assert len(report.applied) == 1
    one, two = nets.X.clone(), nets.X.clone()
    torch.testing.assert_close(fused(one), model(two))
    assert torch.equal(one, two)
    assert not torch.equal(one, nets.X)


def test_a_write_of_what_is_there_already_is_a_write() -> None:
    """A forward that sets a buffer is not traced as if it did not, though the buffer is so now."""

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        m.bn.running_mean[0] = 0.5
        return m.bn(m.conv(x))

    model = nets.Forward(forward, conv=nets.conv(), bn=nets.bn()).double()
    model(nets.X)
    with pytest.raises(fxr.errors.TraceError, match=r"changes bn\.running_mean"):
        fxr.fuse(model, into="graph")


def test_an_error_of_the_trace_that_a_forward_catches_stops_it() -> None:
    """What the forward does then is not what it does in a real run."""

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        try:
            if x.sum() > 0:
                return m.conv(x)
        except ValueError:  # of which FX's own error is one
            return x * 2
        return m.bn(m.conv(x))

    model = nets.Forward(forward, conv=nn.Conv2d(4, 4, 1), bn=nn.BatchNorm2d(4))
    with pytest.raises(fxr.errors.TraceError, match="branches on a value"):
        fxr.rewrite(model, "conv_bn", into="graph")
