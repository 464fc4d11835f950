"""Rules and their guards, rule sets and their order."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxrewrite as fxr


@fxr.pattern
class Relu:
    relu: nn.ReLU


Tanh = fxr.chain(tanh=nn.Tanh)
MODEL = nn.Sequential(nn.ReLU(), nn.Tanh(), nn.ReLU()).eval()


def replace_by(kind, pattern=Relu, name=None, **kwargs):
    decorate = fxr.rule(pattern=pattern, name=name or f"to_{kind.__name__.lower()}", **kwargs)
    return decorate(lambda m: fxr.Replace(kind()))


def test_a_bare_decorator_takes_name_pattern_and_doc_from_the_function():
    @fxr.rule
    def drop_relu(m: Relu) -> fxr.Bypass:
        """Drop it.

        With more to say."""
        return fxr.Bypass()

    assert (drop_relu.name, drop_relu.pattern.cls, drop_relu.doc) == ("drop_relu", Relu, "Drop it.")
    assert (drop_relu.guards, drop_relu.any_mode) == ((), False)
    assert isinstance(drop_relu(Relu(relu=nn.ReLU())), fxr.Bypass)
    path, _, line = drop_relu.source.rpartition(":")
    assert path.endswith("test_rules.py")
    assert int(line) == drop_relu.build.__code__.co_firstlineno


def test_a_decorator_with_arguments_overrides_what_the_function_says():
    def guard(m):
        return None

    @fxr.rule(where=(each for each in [guard]), pattern=Tanh, name="other", any_mode=True)
    def drop(m: Relu):
        return fxr.Bypass()

    assert (drop.name, drop.pattern.cls, drop.guards) == ("other", Tanh, (guard,))
    assert drop.any_mode
    assert fxr.rule()(drop.build).pattern.cls is Relu


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda m: m, r"<lambda>: annotate its one parameter with the pattern class, or give"),
        (lambda: None, "annotate its one parameter"),
        (lambda a, b: None, "annotate its one parameter"),
    ],
)
def test_a_rule_without_a_pattern_says_how_to_give_one(build, message):
    with pytest.raises(fxr.errors.PatternError, match=message):
        fxr.rule(build)


def test_a_rule_annotated_with_something_else_is_refused():
    def of_module(m: nn.ReLU):
        return fxr.Bypass()

    def of_nothing(m: Nowhere):  # noqa: F821
        return fxr.Bypass()

    with pytest.raises(fxr.errors.PatternError, match=r"ReLU'> is not a pattern; declare it with"):
        fxr.rule(of_module)
    with pytest.raises(fxr.errors.PatternError, match="'Nowhere', which is not defined"):
        fxr.rule(of_nothing)


@pytest.mark.parametrize("where", [len, [3], ["eval_mode"], None])
def test_guards_are_a_list_of_functions(where):
    with pytest.raises(fxr.errors.PatternError, match="where"):
        fxr.rule(pattern=Relu, where=where)(lambda m: fxr.Bypass())


def test_guards_are_asked_in_order_and_the_first_reason_refuses():
    asked = []

    def guard(name, answer):
        def ask(m):
            asked.append(name)
            return answer

        return ask

    guards = [guard("a", None), guard("b", "b says no"), guard("c", "c says no")]
    report = fxr.plan(nn.Sequential(nn.ReLU()).eval(), replace_by(nn.GELU, where=guards))
    assert asked == ["a", "b"]
    assert [finding.reason for finding in report.refused] == ["b says no"]


def test_an_empty_reason_is_a_reason():
    report = fxr.plan(MODEL, replace_by(nn.GELU, where=[lambda m: ""]))
    assert len(report.refused) == 2


@pytest.mark.parametrize("answer", [False, True, 0, ["no"], fxr.Bypass()])
def test_a_guard_that_answers_otherwise_is_an_error_that_names_it(answer):
    def is_wrong(m):
        return answer

    with pytest.raises(
        fxr.errors.RuleError, match=r"rule 'to_gelu' .* at 0: .*guard is_wrong returned"
    ):
        fxr.plan(MODEL, replace_by(nn.GELU, where=[is_wrong]))


def test_modules_in_training_mode_need_any_mode():
    model = nn.Sequential(nn.ReLU()).train()
    refused = fxr.plan(model, replace_by(nn.GELU)).refused
    assert "training mode" in refused[0].reason
    assert "model.eval()" in refused[0].reason
    changed, _ = fxr.rewrite(model, replace_by(nn.GELU, any_mode=True), expect={"to_gelu": 1})
    assert changed.get_submodule("0").training


def test_one_module_in_training_mode_is_refused_in_a_model_that_is_not():
    model = nn.Sequential(nn.ReLU(), nn.ReLU()).eval()
    model[1].train()
    report = fxr.plan(model, replace_by(nn.GELU))
    assert [[f.anchor for f in fs] for fs in (report.applied, report.refused)] == [["0"], ["1"]]


@pytest.mark.parametrize("training", [True, False])
def test_the_result_is_in_the_mode_of_the_model_and_so_is_each_container(training):
    model = nn.Sequential(nn.Sequential(nn.Tanh())).train(training)
    model[0].training = not training
    changed, _ = fxr.rewrite(model, [])
    assert (changed.training, changed.get_submodule("0").training) == (training, not training)


def test_the_earlier_of_two_rules_that_match_is_tried_first():
    to_gelu, to_tanh = replace_by(nn.GELU), replace_by(nn.Tanh)
    for order in ([to_gelu, to_tanh], [to_tanh, to_gelu]):
        for rules in (order, fxr.RuleSet("both", order)):
            counts = fxr.plan(MODEL, rules).counts
            assert [counts[each.name]["applied"] for each in order] == [2, 0]


def test_a_later_rule_gets_what_an_earlier_one_refuses_or_misses():
    never = replace_by(nn.GELU, where=[lambda m: "never"])
    longer = fxr.rule(pattern=fxr.chain(a=nn.Tanh, relu=nn.ReLU))(lambda m: fxr.Bypass())
    to_sigmoid = replace_by(nn.Sigmoid)
    report = fxr.plan(MODEL, [never, longer, to_sigmoid])
    assert [finding.rule for finding in report.applied] == ["to_sigmoid", "<lambda>"]


def test_what_a_rule_makes_is_matched_by_the_others_whatever_their_order():
    relu_to_tanh = replace_by(nn.Tanh)
    tanh_to_gelu = replace_by(nn.GELU, pattern=Tanh)
    for rules in ([relu_to_tanh, tanh_to_gelu], [tanh_to_gelu, relu_to_tanh]):
        changed, report = fxr.rewrite(MODEL, rules)
        assert [type(each) for each in changed.children()] == [nn.GELU] * 3
        assert {k: v["applied"] for k, v in report.counts.items()} == {"to_tanh": 2, "to_gelu": 3}


def test_a_rule_set_takes_only_rules_each_of_its_own_name():
    to_gelu = replace_by(nn.GELU)
    with pytest.raises(
        fxr.errors.PatternError, match="rule set 'a': expected rules, found <built-in"
    ):
        fxr.RuleSet("a", [to_gelu, len])
    with pytest.raises(
        fxr.errors.PatternError, match="rule set 'a': two of its rules share a name"
    ):
        fxr.RuleSet("a", [to_gelu, replace_by(nn.GELU)])
    with pytest.raises(fxr.errors.PatternError, match="rule set 'a'"):
        fxr.RuleSet("a", to_gelu)
    assert fxr.RuleSet("a", iter([to_gelu])).rules == (to_gelu,)


def test_the_same_rule_given_twice_is_one():
    to_gelu = replace_by(nn.GELU)
    a, b = fxr.RuleSet("a", [to_gelu]), fxr.RuleSet("b", [to_gelu])
    report = fxr.plan(MODEL, [a, b, to_gelu, a])
    assert report.counts["to_gelu"] == {"applied": 2, "refused": 0, "missed": 0}
    report.check({"a": 2, "b": 2, "to_gelu": 2})


def test_a_subclass_named_as_an_alternative_matches_though_its_base_is_named_first():
    class Twice(nn.ReLU):
        def forward(self, x):
            return 2 * super().forward(x)

    rule = fxr.rule(pattern=fxr.chain(act=nn.ReLU | Twice))(lambda m: fxr.Bypass())
    assert len(fxr.plan(nn.Sequential(Twice()).eval(), rule).applied) == 1


def test_a_rule_runs_without_gradients():
    seen = []
    fxr.plan(MODEL, replace_by(nn.GELU, where=[lambda m: seen.append(torch.is_grad_enabled())]))
    assert seen == [False, False]
