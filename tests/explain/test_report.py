"""The report: one finding for every anchor, counts for every rule, and words for both."""

import json
import re
from abc import ABC

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import fxrewrite as fxr


class Block(nn.Module):
    def __init__(self, bn=None):
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(3, 3, 1), bn or nn.BatchNorm2d(3), nn.ReLU()

    def forward(self, x):
        return self.act(self.bn(self.conv(x)))


class Model(nn.Module):
    """One site that is applied, one refused, one missed, and one that is never called."""

    def __init__(self):
        super().__init__()
        self.good, self.bad = Block(), Block(nn.BatchNorm2d(3, track_running_stats=False))
        self.pool, self.first = nn.MaxPool2d(1), nn.BatchNorm2d(3)
        self.unused = nn.ModuleDict({"bn": nn.BatchNorm2d(3)})
        self.alias = self.pool

    def forward(self, x):
        return F.relu(self.good(self.bad(self.pool(self.first(x)))))


@pytest.fixture
def model():
    return Model().eval()


@pytest.fixture
def report(model):
    return fxr.plan(model, "conv_bn")


def drop(kind, name):
    return fxr.rule(pattern=fxr.chain(step=kind), name=name)(lambda m: fxr.Bypass())


def test_every_anchor_has_one_finding_in_the_order_of_the_graph(report):
    found = [(each.anchor, each.outcome) for each in report.findings]
    assert found == [
        ("first", "missed"),
        ("bad.bn", "refused"),
        ("good.bn", "applied"),
        ("unused.bn", "missed"),
    ]
    by_outcome = (report.applied, report.refused, report.missed)
    assert [len(each) for each in by_outcome] == [1, 1, 2]
    assert report.counts["fold_conv_bn"] == {"applied": 1, "refused": 1, "missed": 2}


def test_a_finding_tells_steps_nodes_and_what_became_of_them(report):
    (applied,) = report.applied
    assert applied.steps == (("conv", "good.conv"), ("bn", "good.bn"))
    assert applied.nodes == ("good_conv", "good_bn")
    assert (applied.became, applied.reason) == ("good.conv", "")


def test_a_rewrite_and_a_plan_report_the_same_and_a_plan_changes_nothing(model, report):
    before = {name: id(each) for name, each in model.named_modules()}
    assert fxr.rewrite(model, "conv_bn")[1].to_json() == report.to_json()
    assert {name: id(each) for name, each in model.named_modules()} == before


def test_why_tells_of_an_anchor_applied(report):
    line = "good.bn: applied by fold_conv_bn: good.conv -> good.bn became good.conv"
    for name in ("good.bn", "good.conv", "good_bn", "good_conv"):
        assert report.why(name) == line


def test_why_gives_the_reason_of_what_was_not_applied(report):
    assert report.why("first") == (
        "first: missed by fold_conv_bn: "
        "it reads the model's input 'x', not a Conv1d, Conv2d or Conv3d"
    )
    assert report.why("bad.bn").startswith(
        "bad.bn: refused by fold_conv_bn: the batch norm keeps no"
    )
    assert report.why("unused.bn") == (
        "unused.bn: missed by fold_conv_bn: no call of it is in the traced graph"
    )


def test_why_of_a_container_tells_of_all_anchors_inside(report):
    assert report.why("good") == report.why("good.bn")
    assert report.why("unused") == report.why("unused.bn")
    assert report.why("").splitlines() == [str(each) for each in report.findings]


def test_why_of_a_module_that_no_rule_is_about_says_so(report):
    for name in ("good.act", "pool", "alias"):
        assert report.why(name) == (
            f"{name}: no rule looks for a module of this kind, and no match includes it"
        )


def test_why_knows_an_alias_of_an_anchor():
    model = nn.Sequential(nn.BatchNorm2d(3)).eval()
    model.again = model[0]
    report = fxr.plan(model, "conv_bn")
    assert "it reads the model's input" in report.why("again")


@pytest.mark.parametrize("name", ["nowhere", "good.nothing", "goo", "good.bn.x", "go.od"])
def test_why_of_an_unknown_name_is_an_error_that_repeats_it(report, name):
    with pytest.raises(LookupError, match=re.escape(repr(name))):
        report.why(name)


def test_why_knows_each_node_that_a_call_became():
    class Relu(nn.Module):
        def forward(self, x):
            return F.relu(x)

    spell = fxr.rule(pattern=fxr.chain(a=fxr.call(F.relu)), name="spell")
    _, report = fxr.rewrite(Relu(), spell(lambda m: fxr.Call(lambda x: torch.neg(torch.abs(x)))))
    line = "relu: applied by spell: relu became abs_1, neg"
    assert [report.why(name) for name in ("relu", "abs_1", "neg")] == [line] * 3


def test_why_says_that_an_anchor_is_inside_a_module_kept_whole(model):
    report = fxr.Rewriter("conv_bn", leaf_modules=["good"]).plan(model)
    assert "it is inside good (Block), which is kept whole" in report.why("good.bn")
    model.bad.register_forward_hook(lambda *a: None)
    reason = fxr.plan(model, "conv_bn").why("bad.bn")
    assert (
        "it is inside bad (Block), which is kept whole, since it carries a forward hook" in reason
    )


def test_what_became_of_nothing_reads_so():
    report = fxr.plan(nn.Sequential(nn.Dropout()).eval(), drop(nn.Dropout, "drop"))
    assert report.why("0") == "0: applied by drop: 0 became nothing"


def test_a_parametrized_weight_is_noted():
    conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 3, 1))
    report = fxr.plan(nn.Sequential(conv, nn.BatchNorm2d(3)).eval(), "conv_bn")
    assert report.applied[0].notes == (
        "the parametrized tensors of 0 are baked in as they are now",
    )
    assert "\nnoted:\n  1  the parametrized tensors of 0 are baked in" in str(report)
    assert report.why("1").endswith(
        "became 0; the parametrized tensors of 0 are baked in as they are now"
    )


def test_printed_it_is_a_table_and_a_line_for_each_refusal_and_miss(report):
    lines = str(report).splitlines()
    assert lines[0].split() == ["rule", "applied", "refused", "missed"]
    assert lines[1].split() == ["fold_conv_bn", "1", "1", "2"]
    assert len({len(line) for line in lines[:2]}) == 1
    refused, missed = lines.index("refused:"), lines.index("missed:")
    assert lines[refused + 1].startswith("  bad.bn  the batch norm keeps no running statistics")
    assert lines[missed + 1].startswith("  first      it reads the model's input 'x'")
    assert lines[missed + 2].startswith("  unused.bn  no call of it")
    assert max(map(len, lines)) < 110


def test_a_long_list_is_cut_and_says_so():
    model = nn.Sequential(*[nn.BatchNorm2d(3) for _ in range(30)]).eval()
    report = fxr.plan(model, "conv_bn")
    assert len(report.missed) == 30
    assert len(str(report).splitlines()) < 30
    assert "... and 10 more, in `findings`" in str(report)


def test_without_rules_or_findings_it_still_prints():
    assert str(fxr.plan(nn.ReLU(), [])).split() == ["rule", "applied", "refused", "missed"]
    assert str(fxr.plan(nn.ReLU(), "conv_bn")).split()[4:8] == ["fold_conv_bn", "0", "0", "0"]


def test_json_is_stable_and_complete(model, report):
    data = json.loads(report.to_json())
    keys = ["version", "rule_sets", "counts", "into", "stops", "assumptions", "parameter_names"]
    keys += ["unknown_shapes"]
    keys.append("findings")
    assert list(data) == keys
    assert (data["version"], data["counts"]) == (1, report.counts)
    assert data["rule_sets"] == {"conv_bn": ["fold_conv_bn", "fold_held_norm"]}
    keys = ["anchor", "outcome", "rule", "steps", "nodes", "became", "notes", "assurance"]
    keys += ["reason", "others"]
    assert [list(each) for each in data["findings"]] == [keys] * 4
    assert [each["reason"] for each in data["findings"]] == [f.reason for f in report.findings]
    assert fxr.plan(Model().eval(), "conv_bn").to_json() == report.to_json()


KINDS = {"a": nn.ReLU, "b": nn.Tanh, "c": nn.Sigmoid}


@given(st.text(alphabet="abcx", max_size=8), st.permutations("abc"), st.integers(0, 3))
def test_counts_and_findings_agree_for_any_rules_in_any_order(word, order, used):
    layers = [KINDS.get(letter, nn.GELU)() for letter in word]
    model = nn.Sequential(*layers, nn.GELU()).eval()
    rules = [drop(KINDS[letter], letter) for letter in order[:used]]
    sets = [fxr.RuleSet(f"set-{i}", [rule]) for i, rule in enumerate(rules)]
    report = fxr.plan(model, sets)
    expected = {letter: word.count(letter) for letter in order[:used]}
    assert {rule: each["applied"] for rule, each in report.counts.items()} == expected
    assert list(report.counts) == order[:used]
    assert len(report.findings) == sum(expected.values())
    report.check({f"set-{i}": expected[rule.name] for i, rule in enumerate(rules)})


def test_expectations_name_rules_or_rule_sets(model, report):
    report.check({"conv_bn": 1, "fold_conv_bn": 1})
    report.check({})
    with pytest.raises(fxr.errors.ExpectationError) as error:
        fxr.rewrite(model, "conv_bn", expect={"conv_bn": 2, "fold_conv_bn": 1})
    assert str(error.value).startswith("conv_bn should apply 2 times and applied 1 times\nrule")
    assert "bad.bn" in str(error.value)
    with pytest.raises(
        fxr.errors.ExpectationError, match="no rule or rule set 'conv' ran; there are conv"
    ):
        fxr.rewrite(model, "conv_bn", expect={"conv": 1})
    assert issubclass(fxr.errors.ExpectationError, AssertionError)


TWO = nn.Sequential(nn.ReLU(), nn.Tanh(), nn.Tanh(), nn.GELU()).eval()


def test_two_rules_of_one_name_are_counted_apart():
    sets = [fxr.RuleSet("a", [drop(nn.ReLU, "r")]), fxr.RuleSet("b", [drop(nn.Tanh, "r")])]
    report = fxr.plan(TWO, sets)
    report.check({"a": 1, "b": 2})


def test_two_rule_sets_of_one_name_are_both_in_the_report():
    sets = [fxr.RuleSet("a", [drop(nn.ReLU, "x")]), fxr.RuleSet("a", [drop(nn.Tanh, "y")])]
    report = fxr.plan(TWO, sets)
    assert [report.counts[name]["applied"] for name in ("x", "y")] == [1, 2]
    assert "y" in str(report)


def test_a_rule_may_have_the_name_of_a_rule_set():
    rules = [drop(nn.Tanh, "conv_bn"), fxr.get_rule_set("conv_bn")]
    report = fxr.plan(TWO, rules)
    assert report.counts["conv_bn"]["applied"] == 2
    assert report.counts["fold_conv_bn"]["applied"] == 0


@pytest.mark.parametrize("slot", ["a", "b"])
def test_an_anchor_that_a_chain_takes_in_is_not_reported_again(slot):
    pair = fxr.rule(pattern=fxr.chain(a=nn.ReLU, b=nn.ReLU), name="pair")
    model = nn.Sequential(nn.ReLU(), nn.ReLU(), nn.ReLU()).eval()
    report = fxr.plan(model, pair(lambda m: fxr.Replace(nn.ReLU(), slot=slot)))
    assert report.counts == {"pair": {"applied": 2, "refused": 0, "missed": 0}}
    assert [finding.anchor for finding in report.findings if finding.is_about("0")]


def test_of_rules_that_decline_the_first_that_refused_is_reported_and_else_a_miss():
    def declines(name, pattern):
        return fxr.rule(pattern=pattern, name=name, where=[lambda m: f"{name} says no"])

    far = declines("far", fxr.chain(a=nn.Tanh, b=nn.ReLU))(lambda m: fxr.Bypass())
    one, two = (declines(name, fxr.chain(b=nn.ReLU))(far.build) for name in ("one", "two"))
    model = nn.Sequential(nn.ReLU()).eval()
    for rules, first in (([far, one, two], "one"), ([two, far, one], "two"), ([far], "far")):
        (finding,) = fxr.plan(model, rules).findings
        assert finding.rule == first
        assert finding.outcome == ("missed" if first == "far" else "refused")


def test_a_model_that_is_itself_of_the_kind_looked_for_is_named():
    report = fxr.plan(nn.Tanh(), drop(nn.Tanh, "drop"))
    assert len(report.missed) == 1
    assert "Tanh" in str(report)


class WithConstant(nn.ReLU):
    expansion = 4


class Abstract(nn.ReLU, ABC):
    pass


class WithFactory(nn.ReLU):
    @classmethod
    def make(cls):
        return cls()


class WithHelper(nn.ReLU):
    def helper(self):
        return 3


@pytest.mark.parametrize("kind", [WithConstant, Abstract, WithFactory, WithHelper])
def test_a_subclass_that_only_adds_to_its_base_is_not_refused(kind):
    report = fxr.plan(nn.Sequential(kind(), nn.GELU()).eval(), drop(nn.ReLU, "drop"))
    assert report.why("0") == "0: applied by drop: 0 became nothing"


def test_a_node_that_a_rule_made_is_no_anchor_of_the_model():
    class Twice(nn.Module):
        def forward(self, x):
            return F.relu(torch.tanh(x))

    pattern = fxr.chain(tanh=fxr.call(torch.tanh), relu=fxr.call(F.relu))
    positive = fxr.rule(pattern=pattern, name="positive")
    report = fxr.plan(Twice(), positive(lambda m: fxr.Call(lambda x: torch.tanh(F.relu(x)))))
    assert report.counts == {"positive": {"applied": 1, "refused": 0, "missed": 0}}
