"""A pattern is declared by a class or by `chain`; a wrong declaration says what is wrong."""

from __future__ import annotations

import operator
import pickle
import types
from typing import Optional, Union

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import fxrewrite as fxr

Activation = nn.ReLU | nn.GELU


@fxr.pattern
class LinearAct:
    """A linear layer and what follows it."""

    linear: nn.Linear
    drops: tuple[nn.Dropout | nn.Identity, ...]
    norm: nn.LayerNorm | None
    act: Activation

    @property
    def features(self) -> int:
        return self.linear.out_features


def steps_of(pattern: type) -> list[str]:
    return [str(step) for step in fxr.pattern_of(pattern).steps]


def declared(**annotations: object) -> type:
    return fxr.pattern(type("P", (), {"__annotations__": annotations}))


def test_fields_in_order_are_the_steps_and_their_annotations_what_they_may_be():
    assert str(fxr.pattern_of(LinearAct)) == "linear -> drops* -> norm? -> act"
    assert steps_of(LinearAct) == ["Linear", "Dropout or Identity", "LayerNorm", "ReLU or GELU"]


def test_a_pattern_keeps_its_name_docstring_and_methods():
    match = LinearAct(linear=nn.Linear(2, 7), act=nn.ReLU())
    assert LinearAct.__name__ == fxr.pattern_of(LinearAct).name == "LinearAct"
    assert LinearAct.__doc__ == "A linear layer and what follows it."
    assert match.features == 7


def test_what_may_be_absent_has_a_default_and_all_else_must_be_given_by_name():
    linear, act = nn.Linear(2, 2), nn.ReLU()
    match = LinearAct(linear=linear, act=act)
    assert (match.linear, match.drops, match.norm, match.act) == (linear, (), None, act)
    with pytest.raises(TypeError, match="act"):
        LinearAct(linear=linear)
    with pytest.raises(TypeError, match="positional"):
        LinearAct(linear, (), None, act)


def test_a_match_is_frozen_and_slotted():
    match = LinearAct(linear=nn.Linear(2, 2), act=nn.ReLU())
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        match.act = nn.GELU()
    assert not hasattr(match, "__dict__")
    assert attrs.has(LinearAct)


def test_the_anchor_is_the_last_step_that_is_always_there_unless_chosen():
    assert fxr.pattern_of(LinearAct).anchor == 3
    assert fxr.pattern_of(fxr.chain(a=nn.ReLU, b=nn.Linear, c=nn.GELU | None)).anchor == 1
    assert fxr.pattern_of(fxr.chain("a", a=nn.ReLU, b=nn.Linear)).anchor == 0

    @fxr.pattern(anchor="linear")
    class Chosen:
        linear: nn.Linear
        act: nn.ReLU

    assert fxr.pattern_of(Chosen).anchor == 0


KINDS = st.lists(st.sampled_from([nn.ReLU, nn.GELU, nn.Tanh]), min_size=1, max_size=3, unique=True)
SHAPES = st.lists(st.tuples(KINDS, st.sampled_from(["", "?", "*"])), min_size=1, max_size=5)


@given(SHAPES)
def test_chain_and_class_declare_the_same(shape):
    annotations = {}
    for i, (kinds, mark) in enumerate(shape):
        kind = Union[tuple(kinds)]  # noqa: UP007
        annotation = {"": kind, "?": Optional[kind], "*": tuple[kind, ...]}[mark]  # noqa: UP045
        annotations[f"s{i}"] = annotation
    required = [i for i, (_, mark) in enumerate(shape) if not mark]
    if not required:
        for declare in (declared, fxr.chain):
            with pytest.raises(
                fxr.errors.PatternError, match="at least one step must not be optional"
            ):
                declare(**annotations)
        return
    by_class, by_chain = declared(**annotations), fxr.chain(**annotations)
    assert fxr.pattern_of(by_class).steps == fxr.pattern_of(by_chain).steps
    assert fxr.pattern_of(by_class).anchor == fxr.pattern_of(by_chain).anchor == required[-1]
    marks = " -> ".join(f"s{i}{mark}" for i, (_, mark) in enumerate(shape))
    assert str(fxr.pattern_of(by_chain)) == marks


def test_call_takes_module_types_functions_and_method_names_in_any_order():
    step = fxr.pattern_of(
        fxr.chain(act=fxr.call("relu", nn.ReLU, F.relu, torch.relu, nn.ReLU6, chain="input"))
    ).steps[0]
    assert step.modules == (nn.ReLU, nn.ReLU6)
    assert step.functions == (F.relu, torch.relu)
    assert step.methods == ("relu",)
    assert step.chain == "input"
    assert str(step) == "ReLU, ReLU6 or relu()"


def test_a_call_step_may_be_optional_or_repeated():
    @fxr.pattern
    class Calls:
        first: fxr.Call | None = fxr.call("relu")
        many: tuple[fxr.Call, ...] = fxr.call(torch.tanh)
        last: fxr.Call = fxr.call(operator.add)

    assert str(fxr.pattern_of(Calls)) == "first? -> many* -> last"
    match = Calls(last=fxr.Call.captured(operator.add, {"other": 1}, "input"))
    assert (match.first, match.many, match.last.kwargs) == (None, (), {"other": 1})


def test_a_value_field_is_no_step():
    pattern = fxr.pattern_of(fxr.chain(before=fxr.Value, relu=nn.ReLU, after=fxr.Value))
    assert [step.name for step in pattern.steps] == ["relu"]
    with pytest.raises(fxr.errors.PatternError, match="at least one step"):
        fxr.chain(before=fxr.Value)


def test_string_annotations_may_name_classes_of_the_enclosing_function():
    class Local(nn.Module):
        pass

    @fxr.pattern
    class OfLocal:
        local: Local

    @fxr.pattern(anchor="local")
    class OfLocalWithAnchor:
        local: Local

    assert steps_of(OfLocal) == steps_of(OfLocalWithAnchor) == ["Local"]


def test_a_rule_may_be_annotated_with_a_local_pattern():
    @fxr.pattern
    class Local:
        relu: nn.ReLU

    @fxr.rule
    def drop(m: Local) -> fxr.Bypass:
        return fxr.Bypass()

    assert drop.pattern.cls is Local


def test_an_annotation_that_names_nothing_says_which_name_and_what_to_do():
    with pytest.raises(
        fxr.errors.PatternError, match=r"names 'Nowhere', which is not defined.*import it"
    ):

        @fxr.pattern
        class P:
            step: Nowhere  # noqa: F821


def test_a_pattern_may_add_steps_to_another():
    @fxr.pattern
    class Base:
        linear: nn.Linear

    @fxr.pattern
    class Longer(Base):
        relu: nn.ReLU

    assert str(fxr.pattern_of(Longer)) == "linear -> relu"
    assert str(fxr.pattern_of(Base)) == "linear"


def test_a_pattern_may_add_steps_to_another_that_has_call_steps():
    @fxr.pattern
    class Base:
        act: fxr.Call = fxr.call("relu")

    @fxr.pattern
    class Longer(Base):
        linear: nn.Linear

    assert steps_of(Longer) == [".relu()", "Linear"]


WRONG = {
    "no class of module": (
        {"a": int},
        "P.a: expected a subclass of nn.Module, found <class 'int'>",
    ),
    "an instance": ({"a": nn.ReLU()}, r"P.a: expected a subclass of nn.Module, found ReLU\(\)"),
    "a function": ({"a": F.relu}, "P.a: expected a subclass of nn.Module, found <function relu"),
    "one wrong alternative": ({"a": nn.ReLU | int}, "P.a: expected a subclass.*<class 'int'>"),
    "a tuple of one": ({"a": tuple[nn.ReLU]}, r"P.a: write tuple\[A, ...\]"),
    "a pair": ({"a": tuple[nn.ReLU, nn.GELU]}, r"P.a: write tuple\[A, ...\]"),
    "a bare tuple": ({"a": tuple}, "P.a: expected a subclass of nn.Module"),
    "a list": ({"a": list[nn.ReLU]}, "P.a: expected a subclass of nn.Module"),
    "an optional tuple": ({"a": tuple[nn.ReLU, ...] | None}, "P.a: expected a subclass"),
    "a Call without call()": ({"a": fxr.Call}, r"P.a: a Call step is declared as `a: Call = call"),
    "only optional steps": ({"a": nn.ReLU | None}, "P: at least one step must not be optional"),
    "no steps": ({}, "P: at least one step must not be optional"),
    "only None": ({"a": None}, "P.a: expected a subclass of nn.Module"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_annotation_is_refused_with_the_field_and_what_was_expected(case):
    annotations, message = WRONG[case]
    with pytest.raises(fxr.errors.PatternError, match=message):
        declared(**annotations)


def test_a_default_that_is_no_call_is_refused():
    namespace = {"__annotations__": {"a": nn.ReLU}, "a": 3}
    with pytest.raises(fxr.errors.PatternError, match=r"P\.a"):
        fxr.pattern(type("P", (), namespace))


def test_a_call_default_needs_the_annotation_call():
    with pytest.raises(
        fxr.errors.PatternError, match="a Call step is declared as `act: Call = call"
    ):

        @fxr.pattern
        class P:
            act: nn.ReLU = fxr.call("relu")


@pytest.mark.parametrize("anchor", ["b", "nowhere", ""])
def test_the_anchor_must_be_a_step_that_is_always_there(anchor):
    with pytest.raises(
        fxr.errors.PatternError, match=f"anchor={anchor!r} is none of its steps a, c"
    ):
        fxr.chain(anchor, a=nn.ReLU, b=nn.GELU | None, c=nn.Linear)


@pytest.mark.parametrize(
    "target",
    [3, None, [F.relu], float, torch.Tensor, nn.ReLU()],
    ids=["number", "None", "list", "type", "tensor type", "module instance"],
)
def test_call_refuses_what_no_node_can_call(target):
    with pytest.raises(fxr.errors.PatternError, match="module types, functions and method names"):
        fxr.chain(act=fxr.call(target))


def test_call_needs_a_target():
    with pytest.raises(
        fxr.errors.PatternError, match="at least one module type, function or method name"
    ):
        fxr.call()


@pytest.mark.parametrize("name", ["my-step", "class", "self", "1"])
def test_a_step_name_that_no_field_can_have_is_a_pattern_error(name):
    with pytest.raises(fxr.errors.PatternError, match=name):
        fxr.chain(**{name: nn.ReLU})


def test_a_step_may_have_a_private_name():
    model = nn.Sequential(nn.Dropout(), nn.Linear(2, 2)).eval()

    @fxr.rule(pattern=fxr.chain(_skipped=nn.Dropout, linear=nn.Linear))
    def drop_dropout(m):
        return fxr.Replace(m.linear, slot="linear")

    rewritten, _ = fxr.rewrite(model, drop_dropout, expect={"drop_dropout": 1})
    assert [name for name, _ in rewritten.named_children()] == ["1"]


@pytest.mark.parametrize("thing", [nn.ReLU, object, 3, types.SimpleNamespace()])
def test_pattern_of_refuses_what_is_no_pattern(thing):
    with pytest.raises(fxr.errors.PatternError, match="is not a pattern; declare it with"):
        fxr.pattern_of(thing)


def test_rules_and_guards_are_tested_without_any_graph():
    def small(m: LinearAct) -> str | None:
        return None if m.features < 10 else "it is large"

    @fxr.rule(where=[small])
    def keep_linear(m: LinearAct) -> fxr.Replace:
        return fxr.Replace(m.linear, slot="linear")

    match = LinearAct(linear=nn.Linear(2, 20), act=nn.ReLU())
    assert keep_linear(match).module is match.linear
    assert keep_linear.guards[0](match) == "it is large"


def test_what_a_step_may_be_is_listed_once_and_briefly():
    """Forms in place, operators and overloads are what the function is called; a few will do."""
    aten = torch.ops.aten
    sums = fxr.call(
        operator.add, operator.iadd, torch.add, aten.add.Tensor, aten.add_.Tensor, "add_"
    )
    pattern = fxr.pattern_of(fxr.chain(sums=sums, relu=fxr.call(nn.ReLU, F.relu, "relu", "clamp_")))
    assert list(map(str, pattern.steps)) == ["add()", "ReLU, relu() or .clamp()"]
    many = fxr.call(
        *(getattr(torch, name) for name in "sin cos tan sinh cosh tanh asin acos exp".split())
    )
    (step,) = fxr.pattern_of(fxr.chain(many=many)).steps
    assert str(step) == "sin(), cos(), tan(), sinh(), cosh(), tanh(), asin() or the like"


def test_a_captured_call_reads_as_it_would_be_written():
    assert repr(fxr.Call.captured(F.leaky_relu, {"negative_slope": 0.1}, "input")) == (
        "Call(leaky_relu, negative_slope=0.1)"
    )
    assert repr(fxr.Call("relu", 1)) == "Call('relu', 1)"


def test_a_match_can_be_pickled():
    match = LinearAct(linear=nn.Linear(2, 2), act=nn.ReLU())
    again = pickle.loads(pickle.dumps(match))
    assert torch.equal(again.linear.weight, match.linear.weight)
    assert type(again.act) is nn.ReLU
