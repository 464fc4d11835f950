"""Written back into the module tree: the user's own model, with other modules in places."""

from __future__ import annotations

import copy
import functools
import io
import threading
import types
import weakref
from typing import Any

import checks
import nets
import pytest
import strategies
import torch
from hypothesis import given, settings
from nets import Forward, X, bn, conv
from torch import fx, nn
from torch.nn.utils import parametrizations

import fxrewrite as fxr
from fxrewrite.targets.module_copy import NotCopiedError, copied

Case = tuple[nn.Module, torch.Tensor]


def into_modules(model: nn.Module, x: torch.Tensor, applied: int) -> tuple[Any, fxr.Report]:
    """conv_bn into the tree, held to what holds for every model."""
    model, x = model.double(), x.double()
    expected = checks.outputs(model, x)
    before = checks.Record(model)
    made, report = fxr.rewrite(model, "conv_bn", into="modules")
    before.assert_unchanged()
    assert type(made) is type(model)
    assert report.into == "modules"
    assert len(report.applied) == applied, report
    assert checks.largest_error(expected, checks.outputs(made, x)) <= 1e-9
    return made, report


@pytest.mark.slow
@given(strategies.models())
def test_any_model_computes_the_same_and_stays_as_it_was(case: Case) -> None:
    """The copy equals the model to 1e-9 in float64; the model is untouched, object for object."""
    model, x = case
    before = checks.Record(model)
    made, report = fxr.rewrite(model, "conv_bn", into="modules")
    before.assert_unchanged()
    expected = checks.outputs(copy.deepcopy(model), x)
    assert checks.largest_error(expected, checks.outputs(made, x)) <= 1e-9
    assert type(made) is type(model) or isinstance(model, torch.fx.GraphModule)
    assert not fxr.plan(made, "conv_bn", into="modules").applied
    as_graph = fxr.plan(model, "conv_bn")
    assert len(report.findings) == len(as_graph.findings)
    assert {f.anchor for f in report.applied} <= {f.anchor for f in as_graph.applied}


@pytest.mark.slow
def test_of_these_models_many_are_rewritten() -> None:
    """Else the properties would hold of next to nothing, as where code can't be read."""
    rewritten: list[bool] = []

    @settings(max_examples=80, derandomize=True, database=None)
    @given(strategies.models())
    def draw(case: Case) -> None:
        rewritten.append(bool(fxr.plan(case[0], "conv_bn", into="modules").applied))

    draw()
    assert sum(rewritten) > len(rewritten) / 8


@given(strategies.models())
def test_what_is_not_rewritten_keeps_its_key_and_its_very_tensor(case: Case) -> None:
    """A key of the state dict is gone or holds another tensor only where a rule was applied."""
    made, report = fxr.rewrite(case[0], "conv_bn", into="modules")
    before = case[0].state_dict(keep_vars=True)
    after = made.state_dict(keep_vars=True)
    matched = {id(case[0].get_submodule(to)) for f in report.applied for _, to in f.steps}
    of_matched = {
        f"{name}.{key}"
        for name, module in case[0].named_modules(remove_duplicate=False)
        if id(module) in matched
        for key in module.state_dict()
    }
    for key, tensor in before.items():
        assert key in of_matched or after[key] is tensor
        fate = report.parameter_names[key]
        assert (fate.how == "same") == (after.get(key) is tensor)
        assert set(fate.keys) <= after.keys()


def test_the_folded_convolution_stands_where_it_was_and_identity_for_the_batch_norm() -> None:
    model = nets.randomise(nn.Sequential(conv(), bn(), nn.ReLU(), bn()))
    made, report = into_modules(model, X, applied=1)
    assert [type(each).__name__ for each in made] == ["Conv2d", "Identity", "ReLU", "BatchNorm2d"]
    assert made[2] is not model[2]
    assert made[3].weight is model[3].weight
    assert str(report.parameter_names["1.running_mean"]) == "folded into 0.weight, 0.bias"
    assert report.parameter_names["0.weight"].how == "changed"
    assert report.parameter_names["3.weight"].how == "same"


def test_a_product_that_is_matched_again_stands_in_the_same_place() -> None:
    made, _ = into_modules(nets.randomise(nn.Sequential(conv(), bn(), bn())), X, applied=2)
    assert list(made.state_dict()) == ["0.weight", "0.bias"]


class Tagged(nn.Module):
    """A model with attributes, a method, and references to its modules outside of the tree."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.act = conv(), bn(), nn.ReLU()
        self.layers = [self.conv, self.bn]
        self.by_name = {"act": self.act}
        self.config: Any = types.SimpleNamespace(size=3, first=self.conv)
        self.register_buffer("unsaved", torch.ones(1), persistent=False)
        self.plain = torch.arange(3.0)
        self.run = self.body
        self.closure = lambda x: self.act(x)
        self.part = functools.partial(self.body)
        self.me = [self]
        self.lock = threading.Lock()
        nets.randomise(self)

    def body(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.closure(self.run(x)) + self.by_name["act"](x)


def test_whatever_refers_to_a_module_of_the_model_refers_to_the_copys() -> None:
    """Lists, dicts, objects, bound methods, partials, closures and cycles lead into the copy."""
    made, _ = into_modules(model := Tagged(), X, applied=1)
    assert made.layers == [made.conv, made.bn]
    assert isinstance(made.bn, nn.Identity)
    assert made.config.first is made.conv is not model.conv
    assert made.by_name["act"] is made.act is not model.act
    assert made.run.__self__ is made.part.func.__self__ is made.me[0] is made
    assert made.closure.__closure__[0].cell_contents is made
    assert model.closure.__closure__[0].cell_contents is model


def test_tensors_are_shared_and_so_is_what_can_not_be_copied() -> None:
    made, _ = into_modules(model := Tagged(), X, applied=1)
    assert made.unsaved is model.unsaved
    assert made.plain is model.plain
    assert made.lock is model.lock
    made.config.size = 4
    assert model.config.size == 3


def test_modes_of_the_copy_are_its_own() -> None:
    made, _ = into_modules(model := Tagged(), X, applied=1)
    made.train()
    assert not any(each.training for each in model.modules())
    assert all(each.training for each in made.modules())


def test_hooks_that_are_bound_to_the_model_are_bound_to_the_copy() -> None:
    model = Tagged()
    model.seen = []
    model.note = types.MethodType(lambda self, module, args: self.seen.append(len(args)), model)
    model.register_forward_pre_hook(model.note)
    made, _ = into_modules(model, X, applied=1)
    model.seen.clear()
    made.seen.clear()
    made(X)
    assert made.seen == [1]
    assert model.seen == []


def test_a_weak_reference_into_the_model_is_refused_by_name() -> None:
    model = nets.randomise(nn.Sequential(conv(), bn()))
    model[1].parent = weakref.ref(model)
    with pytest.raises(NotCopiedError, match=r"1\.parent is a weak reference"):
        fxr.rewrite(model, "conv_bn", into="modules")


def test_parametrizations_that_stay_stay_parametrized() -> None:
    model = nets.randomise(nn.Sequential(conv(), bn(), nn.ReLU(), conv()))
    parametrizations.weight_norm(model[3])
    made, _ = into_modules(model, X, applied=1)
    assert made[3].parametrizations.weight.original0 is model[3].parametrizations.weight.original0


def test_an_alias_is_an_alias_of_the_new_module() -> None:
    model = nets.randomise(nn.Sequential(conv(), bn()))
    model.add_module("again", nn.ModuleList([model[0]]))
    model.forward = types.MethodType(lambda self, x: self[1](self[0](x)), model)
    made = copied(model, {id(model[0]): (new := conv()), id(model[1]): nn.Identity()})
    assert made[0] is made.again[0] is not model[0]
    assert made[0].weight is new.weight
    assert torch.equal(made(X.float()), new(X.float()))


SHARED_CONV = Forward(lambda m, x: m.bn(m.conv(x)) + m.conv(x), conv=conv(), bn=bn())
READ = Forward(lambda m, x: m.bn(m.conv(x)) * m.conv.weight.mean(), conv=conv(), bn=bn())


@pytest.mark.parametrize("model", [SHARED_CONV, READ], ids=["called twice", "read"])
def test_a_module_with_another_use_is_refused_and_the_graph_is_recommended(model: Any) -> None:
    _, report = into_modules(model, X, applied=0)
    assert "conv is used elsewhere too" in report.why("bn")
    assert "into='graph' can rewrite it" in report.why("bn")


def test_a_dropout_that_is_used_in_many_places_stays_and_does_not_hinder() -> None:
    model = Forward(
        lambda m, x: m.drop(m.bn(m.drop(m.conv(x)))), conv=conv(), bn=bn(), drop=nn.Dropout()
    )
    made, _ = into_modules(model, X, applied=1)
    assert isinstance(made.drop, nn.Dropout)


@fxr.rule(pattern=fxr.chain(first=nn.ReLU, second=nn.ReLU))
def one_relu(m: Any) -> fxr.Replace:
    return fxr.Replace(nn.ReLU(), slot="second")


@pytest.mark.parametrize("writes", [True, False])
def test_a_slot_that_is_reached_late_is_refused_where_something_writes_meanwhile(
    writes: bool,
) -> None:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = m.first(x)
        if m.writes:
            x.mul_(-1.0)
        return m.second(y) + x

    model = Forward(forward, first=nn.ReLU(), second=nn.ReLU(), writes=writes)
    made, report = fxr.rewrite(model, one_relu, into="modules", expect={"one_relu": not writes})
    assert torch.equal(made(X.clone()), model(X.clone()))
    assert ("writes in place to what the chain reads" in report.why("second")) == writes
    assert isinstance(made.first, nn.ReLU if writes else nn.Identity)
    assert len(fxr.plan(model, one_relu).applied) == 1


@pytest.mark.parametrize(
    ("pattern", "action", "reason"),
    [
        (
            fxr.chain(a=fxr.call(torch.relu)),
            lambda m: fxr.Bypass(),
            "is written out in the forward",
        ),
        (fxr.chain(a=nn.ReLU), lambda m: fxr.Call(torch.tanh), "would have to spell"),
    ],
)
def test_what_needs_another_graph_is_refused(pattern: Any, action: Any, reason: str) -> None:
    rule = fxr.rule(pattern=pattern, name="other")(action)
    model = Forward(lambda m, x: torch.relu(m.act(x)), act=nn.ReLU())
    assert reason in str(fxr.plan(model, rule, into="modules"))
    assert fxr.plan(model, rule).applied


def test_a_bypass_leaves_identity() -> None:
    drop = fxr.rule(pattern=fxr.chain(a=nn.ReLU), name="drop")(lambda m: fxr.Bypass())
    model = nn.Sequential(nn.ReLU(), nn.Tanh()).eval()
    made, report = fxr.rewrite(model, drop, into="modules", expect={"drop": 1})
    assert isinstance(made[0], nn.Identity)
    assert report.why("0") == "0: applied by drop: 0 became nothing"


def test_the_copy_pickles_and_scripts_where_the_model_does() -> None:
    made, _ = into_modules(nets.randomise(nn.Sequential(conv(), bn(), nn.ReLU())), X, applied=1)
    file = io.BytesIO()
    torch.save(made, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(loaded(X), made(X))
    assert torch.equal(copy.deepcopy(made)(X), made(X))
    scripted = torch.jit.script(made)
    torch.testing.assert_close(scripted(X), made(X))


def test_a_destination_of_another_name_is_an_error() -> None:
    with pytest.raises(ValueError, match="into is 'graph', 'modules' or None, not 'tree'"):
        fxr.rewrite(nn.ReLU(), "conv_bn", into="tree")  # type: ignore[arg-type]


@pytest.mark.parametrize("inner", [False, True], ids=["the model", "inside"])
def test_the_hooks_of_a_graph_module_are_copied(inner: bool) -> None:
    """A GraphModule, by itself or inside a model, keeps its hooks in the copy."""
    model: nn.Module = fx.symbolic_trace(nn.Sequential(nets.conv(), nets.bn()))
    model.register_forward_hook(nets.halve_output)
    model = nets.randomise(nn.Sequential(model, nets.conv(), nets.bn()) if inner else model)
    made, report = fxr.rewrite(model.double(), "conv_bn", into="modules")
    assert report.applied
    torch.testing.assert_close(made(nets.X), model(nets.X))
