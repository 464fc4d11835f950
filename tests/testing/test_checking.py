"""The toolkit for rule authors: it passes rules that are right, and catches those that are not."""

from __future__ import annotations

import contextlib
import itertools
import operator
from collections.abc import Callable, Iterator
from typing import Any

import attrs
import nets
import pytest
import torch
from hypothesis import Phase, settings
from torch import nn

import fxrewrite as fxr
from fxrewrite.testing import Case, UnsoundError, check_rule, properties, written

LinearNorm = fxr.chain(linear=nn.Linear, norm=nn.BatchNorm1d)
counter = itertools.count(2)


def two_dimensional(m: Any) -> str | None:
    return None if m.linear.out_features == m.norm.num_features else "it normalises no features"


def keeps_statistics(m: Any) -> str | None:
    return None if m.norm.running_var is not None else "it keeps no statistics"


def folded(m: Any, eps: float, weight: bool = True, bias: bool = True, axis: int = 0) -> Any:
    norm, linear = m.norm, m.linear
    scale = (norm.running_var + eps).rsqrt()
    if weight and norm.weight is not None:
        scale = scale * norm.weight
    shift = -norm.running_mean * scale
    if norm.bias is not None:
        shift = shift + norm.bias
    if bias and linear.bias is not None:
        shift = shift + linear.bias * scale
    sizes = (-1, 1) if axis == 0 else (1, -1)
    if axis == 1 and linear.in_features != linear.out_features:
        sizes = (-1, 1)
    return fxr.evolve(linear, weight=linear.weight * scale.view(*sizes), bias=shift)


def replace(m: Any, **options: Any) -> fxr.Replace:
    return fxr.Replace(folded(m, m.norm.eps, **options), slot="linear")


def mutating(m: Any) -> fxr.Replace:
    made = folded(m, m.norm.eps)
    m.norm.running_mean.data.add_(1)
    return fxr.Replace(made, slot="linear")


def counting(m: Any) -> fxr.Replace:
    made = folded(m, m.norm.eps)
    made.bias.data.add_(1e-12 * next(counter))
    return fxr.Replace(made, slot="linear")


def raising(m: Any) -> fxr.Replace:
    assert m.linear.bias is not None
    return replace(m)


def returning_a_module(m: Any) -> Any:
    return folded(m, m.norm.eps)


SAME, DOES = "the outputs stay the same", "a rule does what rules may do"
WRONG: dict[str, tuple[Callable[[Any], Any], str, str]] = {
    "wrong axis": (lambda m: replace(m, axis=1), SAME, "is off by"),
    "forgets eps": (lambda m: fxr.Replace(folded(m, 0.0), slot="linear"), SAME, "is off by"),
    "ignores the bias": (lambda m: replace(m, bias=False), SAME, "is off by"),
    "ignores the weight": (lambda m: replace(m, weight=False), SAME, "is off by"),
    "drops the norm": (lambda m: fxr.Replace(m.linear), SAME, "is off by"),
    "mutates": (mutating, DOES, "it changed the tensor BatchNorm1d.running_mean"),
    "raises": (raising, DOES, "it raised AssertionError"),
    "returns no action": (returning_a_module, DOES, "it returned Linear("),
    "depends on global state": (
        counting,
        "the same rewrite gives the same result",
        "depends on more than its match",
    ),
}


@pytest.fixture
def _first_found() -> Iterator[None]:
    """The first model that shows the fault will do, however large."""
    name = settings.get_current_profile_name()
    settings.register_profile("first", settings(), phases=[Phase.generate])
    settings.load_profile("first")
    yield
    settings.load_profile(name)


@pytest.mark.usefixtures("_first_found")
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_rule_is_caught(name: str) -> None:
    """The failure names the property, the rule, the site and the model."""
    build, broken, found = WRONG[name]
    wrong = fxr.rule(
        pattern=LinearNorm, name="fold_wrongly", where=[two_dimensional, keeps_statistics]
    )(build)
    with pytest.raises(UnsoundError) as caught:
        check_rule(wrong)
    said = str(caught.value)
    assert said.startswith(f"{broken}: ")
    assert found in said
    assert "fold_wrongly (" in said
    assert "def forward(self, x0):" in said
    assert "(norm): BatchNorm1d(" in said


@pytest.mark.slow
def test_a_failure_is_small_and_can_be_run_again() -> None:
    """What is reported is the smallest model found, and how to check it alone."""
    wrong = fxr.rule(pattern=fxr.chain(act=nn.Tanh), name="wrong")(lambda m: fxr.Bypass())
    with pytest.raises(UnsoundError) as caught:
        check_rule(wrong)
    assert len(list(caught.value.case.model.modules())) == 2
    (said,) = caught.value.__notes__
    again = eval(said.partition("reproduce=")[2].removesuffix(")"))
    with pytest.raises(UnsoundError) as repeated:
        check_rule(wrong, reproduce=again)
    assert str(repeated.value) == str(caught.value)


def test_a_rule_that_never_applies_proves_nothing() -> None:
    """A rule that is refused everywhere fails the check, with the most common reasons."""
    never = fxr.rule(pattern=fxr.chain(act=nn.ReLU), name="never", where=[lambda m: "not today"])
    with pytest.raises(
        AssertionError, match=r"never applied in no model.*\n  \d+ times: not today"
    ):
        check_rule(never(lambda m: fxr.Bypass()), max_examples=5)


@pytest.mark.usefixtures("_first_found")
def test_a_rule_that_undoes_another_does_not_come_to_an_end() -> None:
    """Rules that feed each other are caught as what they are."""
    there = fxr.rule(pattern=fxr.chain(act=nn.ReLU), name="there")
    back = fxr.rule(pattern=fxr.chain(act=nn.GELU), name="back")
    rules = [there(lambda m: fxr.Replace(nn.GELU())), back(lambda m: fxr.Replace(nn.ReLU()))]
    with pytest.raises(UnsoundError, match="never comes to an end"):
        check_rule(rules, max_examples=5)


def rules_at_relu(*, quiet: bool) -> list[fxr.Rule[Any]]:
    """Two rules that look for a ReLU, the first quiet or not: it is refused, the other missed."""
    refused = fxr.rule(
        pattern=fxr.chain(b=nn.ReLU), name="one", where=[lambda m: "no"], quiet=quiet
    )
    missed = fxr.rule(pattern=fxr.chain(a=nn.GELU, b=nn.ReLU), name="two", quiet=quiet)
    return [make(lambda m: fxr.Bypass()) for make in (refused, missed)]


def losing(report: fxr.Report, *lost: str) -> fxr.Report:
    """The report without what these rules said."""
    findings = []
    for finding in report.findings:
        said = [e for e in (finding, *finding.others) if e.rule not in lost]
        findings += [attrs.evolve(each, others=tuple(said[1:])) for each in said[:1]]
    return attrs.evolve(report, findings=tuple(findings))


@pytest.mark.parametrize(
    ("quiet", "lost", "caught"),
    [
        (False, (), None),
        (False, ("one",), "nothing is said of 0 by one"),
        (False, ("two",), "nothing is said of 0 by two"),
        (False, ("one", "two"), "nothing is said of 0 by one"),
        (True, ("one", "two"), None),
    ],
)
def test_an_anchor_that_the_report_loses_is_caught(
    quiet: bool, lost: tuple[str, ...], caught: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each rule must be heard at each of its anchors, unless it is a quiet one."""
    rules, model = rules_at_relu(quiet=quiet), nn.Sequential(nn.ReLU()).eval()

    def rewrite(*args: Any, **options: Any) -> tuple[Any, fxr.Report]:
        made, report = fxr.rewrite(*args, **options)
        return made, losing(report, *lost)

    monkeypatch.setattr(properties, "rewrite", rewrite)
    with contextlib.nullcontext() if caught is None else pytest.raises(UnsoundError) as error:
        properties.check_model(rules, model, (torch.ones(2, 3),))
    assert caught is None or error.value.found == caught


def test_models_of_ones_own() -> None:
    """Given a model and inputs, that model alone is checked."""
    idle = fxr.rule(pattern=fxr.chain(idle=nn.Identity), name="idle")(lambda m: fxr.Bypass())
    check_rule(idle, nn.Sequential(nn.Identity(), nn.Linear(3, 2)).eval(), torch.ones(2, 3))
    case = Case(written({"same": nn.Identity()}, ["return self.same(x) + y"], "x, y"), (1.0, 2.0))
    check_rule(idle, [case])
    wrong = fxr.rule(pattern=fxr.chain(act=nn.Tanh), name="wrong")(lambda m: fxr.Bypass())
    with pytest.raises(UnsoundError, match="output is off by"):
        check_rule(
            wrong, nn.Sequential(nn.Tanh(), nn.Sigmoid()).eval(), torch.ones(2, 3), must_apply=False
        )


@fxr.pattern
class OneLinear:
    linear: nn.Linear


@fxr.pattern
class SumOfTwo:
    left: OneLinear
    right: OneLinear
    join: fxr.Call = fxr.call(operator.add, torch.add, "add")


def adds_alike(m: SumOfTwo) -> str | None:
    one, two = m.left.linear, m.right.linear
    return "they differ" if m.join.kwargs or one.weight.shape != two.weight.shape else None


@pytest.mark.slow
@pytest.mark.parametrize("wrong", [False, True])
@pytest.mark.usefixtures("_first_found")
def test_a_pattern_with_branches(wrong: bool) -> None:
    """Models are drawn around branches, too, and tell a right rule from a wrong one."""

    @fxr.rule(where=[adds_alike])
    def merge(m: SumOfTwo) -> fxr.Replace:
        one, two = m.left.linear, m.right.linear
        biases = [each.bias for each in (one, two) if each.bias is not None]
        bias = None if not biases else biases[0] if wrong else sum(biases)
        return fxr.Replace(fxr.evolve(one, weight=one.weight + two.weight, bias=bias))

    if not wrong:
        check_rule(merge)
        return
    with pytest.raises(UnsoundError, match="the outputs stay the same"):
        check_rule(merge)


def test_what_is_traced_by_itself_is_told_of_by_itself() -> None:
    """A batch norm in a container with a hook is accounted for at each call there, by each name."""
    bn = nn.BatchNorm2d(4)
    seq = nn.Sequential(nn.ConvTranspose2d(4, 4, 3, padding=1), bn, nn.Identity(), bn)
    seq.register_forward_hook(lambda *_: None)
    lines = ["z = self.bn(y) if y is not None else x", "return self.bn(self.seq(z))"]
    model = nets.randomise(written({"bn": bn, "seq": seq}, lines, "x, y")).double()
    report = properties.check_model("conv_bn", model, (nets.X, nets.X))
    assert [each.anchor for each in report.findings] == ["bn", "bn", "seq.1", "seq.1"]


def model_of_parts() -> nn.Module:
    """A model that can't be traced, around one that is a part."""
    children = {"bn": nn.BatchNorm2d(4), "other": nn.Tanh()}
    given = "self.bn.running_mean, self.bn.running_var"
    lines = ["y = self.bn(self.other(self.bn(x)))", f"return F.batch_norm(y, {given})"]
    inner = written(children, lines, "x")
    lines = ["z = self.inner(x)", "return z if z.sum() > 0 else -z"]
    return nets.randomise(written({"inner": inner}, lines, "x")).double()


def test_in_a_model_of_parts_a_batch_norm_is_told_of_at_each_call() -> None:
    """By its own name, or by that of the function's call."""
    report = properties.check_model("conv_bn", model_of_parts(), (nets.X,))
    anchors = ["inner.bn", "inner.bn", "batch_norm"]
    assert [each.anchor for each in report.findings] == anchors


@pytest.mark.parametrize(
    ("kept", "caught"),
    [
        ([0, 1], "nothing is said of batch_norm"),
        ([2], "nothing is said of inner.bn by fold_conv_bn"),
        ([0, 0, 1, 2], "inner.bn is declined 3 times"),
        ([0, 1, 2, 2], "batch_norm is declined 2 times"),
    ],
)
def test_what_a_report_of_parts_loses_or_tells_twice_is_caught(
    kept: list[int], caught: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts are held to as much as a model that is traced as a whole."""

    def rewrite(*args: Any, **options: Any) -> tuple[Any, fxr.Report]:
        made, report = fxr.rewrite(*args, **options)
        return made, attrs.evolve(report, findings=tuple(report.findings[i] for i in kept))

    monkeypatch.setattr(properties, "rewrite", rewrite)
    with pytest.raises(UnsoundError) as error:
        properties.check_model("conv_bn", model_of_parts(), (nets.X,))
    assert error.value.found == caught
