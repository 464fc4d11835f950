"""Where a rewritten model differs, the sites to blame are found, and no others are named."""

from __future__ import annotations

import operator
from typing import Any

import nets
import pytest
import strategies
import torch
from fxrewrite.patterns.conv_bn import ConvBn, fold_conv_bn
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.fx._symbolic_trace import is_fx_symbolic_tracing
from torch.nn import functional as F

import fxrewrite as fxr
from fxrewrite.pipeline.rewriting import Options, rewrite
from fxrewrite.verification.bisect import upto


def chain(count: int) -> nn.Sequential:
    """Convolutions of 1, 2, 3, ... channels, each with a batch norm behind it."""
    layers: list[nn.Module] = []
    for i in range(count):
        layers += [nn.Conv2d(i + 1, i + 2, 3, padding=1), nn.BatchNorm2d(i + 2)]
    model = nets.randomise(nn.Sequential(*layers))
    assert isinstance(model, nn.Sequential)
    return model


X = torch.randn(2, 1, 5, 5, generator=torch.Generator().manual_seed(0))


def in_float32_only(body: nn.Module) -> nn.Module:
    """A constant of the forward keeps the model from running in float64."""
    return nets.Forward(lambda net, x: net.body(x @ torch.eye(5)), body=body)


def spoilt(*channels: int, by: float = 1.01) -> fxr.Rule[Any]:
    """Folds convolutions of that many channels, and scales the weight by mistake."""

    def wanted(m: ConvBn) -> str | None:
        return None if m.conv.out_channels in channels else "it is not one of these"

    @fxr.rule(where=[wanted])
    def spoil(m: ConvBn) -> fxr.Replace:
        made = fold_conv_bn(m).module
        return fxr.Replace(fxr.evolve(made, weight=made.weight * by), slot="conv")

    return spoil


def blamed(found: fxr.verification.Localisation) -> list[tuple[str, str]]:
    return [(each.rule.name, each.finding.anchor) for each in found.guilty]


@pytest.mark.slow
@settings(max_examples=12)
@given(at=st.sets(st.integers(2, 8), min_size=1, max_size=2), wide=st.booleans())
def test_the_wrong_sites_are_named_and_no_others(at: set[int], wide: bool) -> None:
    """Of seven folds one or two are wrong, anywhere: these are found, by name of rule and site."""
    model, x = (chain(7).double(), X.double()) if wide else (chain(7), X)
    found = fxr.Rewriter([spoilt(*at), "conv_bn"]).localise(model, x)
    assert blamed(found) == [("spoil", str(2 * channels - 3)) for channels in sorted(at)]
    assert not found.may_be_more
    assert not any(each.adds_up for each in found.guilty)


def test_the_error_names_rule_source_and_site() -> None:
    """`rewrite(..., verify=...)` raises with all that it takes to find the mistake."""
    with pytest.raises(fxr.errors.VerificationError) as error:
        fxr.rewrite(chain(4), [spoilt(3), "conv_bn"], verify=X)
    assert "differs from the original: relative error" in str(error.value)
    assert "to blame is rule 'spoil'" in str(error.value)
    assert f"({__file__}:" in str(error.value)
    assert " at 2 -> 3, which became 2" in str(error.value)
    assert "conv_bn" not in str(error.value)
    found = error.value.localisation
    assert found is not None
    assert not found.verification.same
    assert blamed(found) == [("spoil", "3")]


def test_a_right_rewrite_is_returned() -> None:
    """Where nothing differs, `verify` changes nothing in what `rewrite` gives."""
    model = chain(3)
    plain, report = fxr.rewrite(model, "conv_bn")
    for inputs in ({"verify": X}, {"verify": {"input": X}}, {"example_inputs": X, "verify": True}):
        made, again = fxr.rewrite(model, "conv_bn", **inputs)
        assert made.code == plain.code
        assert again.to_json() == report.to_json()
    with pytest.raises(fxr.errors.InputError, match="example inputs"):
        fxr.rewrite(model, "conv_bn", verify=True)


def test_a_mistake_that_the_given_inputs_do_not_show() -> None:
    """Random inputs like those given show it, and the search goes on with those that did."""

    @fxr.rule(pattern=fxr.chain(act=nn.Hardtanh))
    def no_upper_bound(m: Any) -> fxr.Replace:
        return fxr.Replace(nn.ReLU())

    model = nn.Sequential(nn.Identity(), nn.Hardtanh(0.0, 1.5)).eval()
    calm = torch.linspace(-1.0, 1.0, 999)
    fxr.rewrite(model, no_upper_bound, verify=calm)
    with pytest.raises(
        fxr.errors.VerificationError, match=r"to blame is .* at 1, which became 1"
    ) as error:
        fxr.rewrite(model, no_upper_bound, verify=calm, trials=3)
    assert error.value.localisation.verification.trial == 2
    found = fxr.Rewriter(no_upper_bound).localise(model, calm, trials=3)
    assert blamed(found) == [("no_upper_bound", "1")]
    assert not found.may_be_more


@pytest.mark.slow
def test_more_than_can_be_named() -> None:
    """A rule that is wrong everywhere is named for its first sites, and that there may be more."""
    found = fxr.Rewriter(spoilt(*range(8))).localise(chain(6), X, most=2)
    assert blamed(found) == [("spoil", "1"), ("spoil", "3")]
    assert found.may_be_more
    assert "there may be more" in str(found)


def test_a_mistake_too_small_for_float32_is_found_in_float64() -> None:
    """What float32 can't tell from rounding is found if the model is given in float64."""
    rules = [spoilt(3, by=1 + 1e-8), "conv_bn"]
    assert fxr.Rewriter(rules).localise(chain(4), X).guilty == ()
    found = fxr.Rewriter(rules).localise(chain(4).double(), X.double())
    assert blamed(found) == [("spoil", "3")]


@pytest.mark.slow
def test_what_rounds_by_itself_is_not_blamed() -> None:
    """A rule that computes in float32 is as right as a float32 model can show, and goes free."""

    def of_even(m: ConvBn) -> str | None:
        return None if m.conv.out_channels % 2 == 0 else "odd"

    @fxr.rule(where=[of_even])
    def rounds(m: ConvBn) -> fxr.Replace:
        made = fold_conv_bn(m).module
        return fxr.Replace(fxr.evolve(made, weight=made.weight.float().to(made.weight.dtype)))

    found = fxr.Rewriter([rounds, spoilt(7, by=1.001), "conv_bn"]).localise(chain(7), X)
    assert blamed(found) == [("spoil", "11")]
    assert found.exact is not None
    assert not found.exact.same


@pytest.mark.slow
def test_a_rule_that_is_wrong_in_one_dtype_only() -> None:
    """What is right in float64 and wrong in float32 is found in float32, and that is said."""

    @fxr.rule
    def coarse(m: ConvBn) -> fxr.Replace:
        made = fold_conv_bn(m).module
        if made.weight.dtype == torch.float32 and made.out_channels == 4:
            return fxr.Replace(fxr.evolve(made, weight=made.weight.bfloat16().float()))
        return fxr.Replace(made)

    found = fxr.Rewriter(coarse).localise(chain(5), X)
    assert blamed(found) == [("coarse", "5")]
    assert found.exact is not None
    assert found.exact.same
    assert "right on a float64 copy" in str(found)


def test_a_model_that_cannot_run_in_float64_is_searched_as_it_is() -> None:
    """Where a float32 constant keeps a model from running in float64, the site is found anyway."""
    found = fxr.Rewriter([spoilt(4), "conv_bn"]).localise(in_float32_only(chain(4)), X)
    assert found.exact is None
    assert blamed(found) == [("spoil", "body.5")]


def test_an_exported_program_is_searched_too() -> None:
    """The site is found where model and result are programs of `torch.export`."""
    program = torch.export.export(chain(3), (X,))
    with pytest.raises(fxr.errors.VerificationError) as error:
        fxr.rewrite(program, [spoilt(4), "conv_bn"], verify=X)
    assert blamed(error.value.localisation) == [("spoil", "5")]


def test_a_model_rewritten_in_parts_is_searched_too() -> None:
    """The site is found in a module tree, where no graph of the whole is to be had."""

    def forward(net: Any, x: torch.Tensor) -> Any:
        return net.second(net.first(x)) if x.sum() > 99 else net.first(net.first(x))

    parts = nets.Forward(
        forward,
        first=nn.Sequential(nn.Conv2d(1, 1, 1), *chain(2), nn.Conv2d(3, 1, 1)),
        second=chain(2),
    )
    found = fxr.Rewriter([spoilt(3), "conv_bn"]).localise(parts, X)
    assert blamed(found) == [("spoil", "first.4")]


@pytest.mark.slow
def test_many_small_differences() -> None:
    """Where no site is off by much and all together are, the last one is named as that."""
    rules = spoilt(*range(20), by=1 + 4e-6)
    found = fxr.Rewriter(rules).localise(in_float32_only(chain(14)), X, most=1)
    assert len(found.guilty) == 1
    assert found.guilty[0].adds_up
    assert "many sites add to it, the last is rule 'spoil'" in str(found)


def test_a_difference_that_no_rule_made() -> None:
    """A forward that does something else when traced is not blamed on a rule."""

    def forward(net: Any, x: Any) -> Any:
        return net.body(x if is_fx_symbolic_tracing() else 2 * x)

    found = fxr.Rewriter("conv_bn").localise(nets.Forward(forward, body=chain(2)), X)
    assert found.guilty == ()
    assert "no rule is to blame; the traced graph differs" in str(found)


class _Raises(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("out of order")


BREAKAGES = {
    "raises": lambda m: _Raises(1, 1, 1),
    "gives NaN": lambda m: nn.Threshold(1e9, float("nan")),
    "gives another shape": lambda m: fxr.evolve(m.conv, padding=(0, 0)),
}


@pytest.mark.slow
@pytest.mark.parametrize("how", BREAKAGES)
def test_a_site_that_breaks_the_model_is_named(how: str) -> None:
    """Whatever goes wrong after a site, it is that site; what follows NaN can't be told."""

    def second(m: ConvBn) -> str | None:
        return None if m.conv.out_channels == 3 else "it is another one"

    @fxr.rule(where=[second])
    def breaks(m: ConvBn) -> fxr.Replace:
        return fxr.Replace(BREAKAGES[how](m))

    found = fxr.Rewriter([breaks, "conv_bn"]).localise(chain(4), X)
    assert blamed(found) == [("breaks", "3")]
    assert found.may_be_more == (how != "gives another shape")


# Doing a rewrite again in part


@fxr.pattern
class AddRelu:
    """A sum, then a ReLU."""

    add: fxr.Call = fxr.call(operator.add, torch.add, "add")
    relu: fxr.Call = fxr.call(nn.ReLU, F.relu)


class FusedAddRelu(nn.Module):
    def forward(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return torch.relu(x + other)


@fxr.pattern
class Twice:
    """A ReLU of a ReLU."""

    first: nn.ReLU
    second: nn.ReLU


asked: list[str] = []


def counted(m: Any) -> None:
    asked.append(type(m).__name__)


@fxr.rule(where=[counted])
def to_module(m: AddRelu) -> fxr.Replace:
    """Reads a value of the graph beside the chain's own."""
    return fxr.Replace(FusedAddRelu(), inputs=tuple(m.add.kwargs.values()))


@fxr.rule(where=[counted])
def to_calls(m: AddRelu) -> fxr.Call:
    """Spells calls that read a value of the graph."""
    return fxr.Call(lambda x, other: torch.add(x, other).clamp(min=0), *m.add.kwargs.values())


@fxr.rule(where=[counted])
def add_again(m: AddRelu) -> fxr.Call:
    """Makes a captured call once more: wrong, as the ReLU goes."""
    return m.add


@fxr.rule(where=[counted])
def first_only(m: Twice) -> fxr.Revise:
    """Leaves a step out."""
    return fxr.Revise(second=None)


class Residual(nn.Module):
    """Sums with a ReLU after them, of a value and its image under a linear layer."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(3, 3) for _ in range(blocks))
        self.relus = nn.Sequential(nn.ReLU(), nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for linear in self.linears:
            x = F.relu(x + linear(x))
        return self.relus(x)


@pytest.mark.parametrize("rule", [to_module, to_calls, add_again], ids=lambda rule: rule.name)
def test_a_rewrite_is_done_again_as_far_as_a_site(rule: fxr.Rule[Any]) -> None:
    """Each prefix of a rewrite can be had, whatever kind of action the rules decided on."""
    asked.clear()
    model, x = Residual(6).eval(), torch.randn(2, 3)
    done = rewrite(model, None, Options(fxr.RuleSet("both", [rule, first_only])))
    count = len(asked)
    assert len(done.applied) == len(done.report.applied) == count >= 7
    prefixes: list[Any] = [upto(done, sites) for sites in range(count + 1)]
    assert len(asked) == count + sum(range(count + 1))  # none is asked beyond the last site
    assert prefixes[count].code == done.made.code
    same = [fxr.verify(model, each, x).same for each in prefixes]
    assert same == [True] + [rule is not add_again] * count
    assert len({each.code for each in prefixes}) == count + 1


@pytest.mark.slow
@settings(max_examples=25)
@given(strategies.models())
def test_a_rewrite_is_done_again_site_by_site(case: tuple[nn.Module, torch.Tensor]) -> None:
    """Of any model each part of a rewrite is sound, and all of it is the very same rewrite."""
    model, x = case
    done = rewrite(model, None, Options("conv_bn"))
    for sites in range(len(done.applied) + 1):
        part = done.again(model, None, sites)
        assert len(part.report.applied) == len(part.applied) == sites
        assert fxr.verify(model, part.made, x).same
    assert part.made.code == done.made.code
    assert {**part.made.state_dict()}.keys() == {**done.made.state_dict()}.keys()


def test_a_model_that_traces_differently_each_time_is_an_error() -> None:
    """A rewrite can't be done again on another graph, and that is said."""
    calls: list[int] = []

    def forward(net: Any, x: torch.Tensor) -> Any:
        calls.append(0)
        # A rewrite traces it twice, and does not see what only a third trace would show.
        return net.bn(net.conv(x)) if len(calls) < 3 else net.bn(net.conv(x.relu()).relu())

    model = nets.Forward(forward, conv=nets.conv(), bn=nets.bn())
    done = rewrite(model, None, Options("conv_bn"))
    with pytest.raises(fxr.errors.FxRewriteError, match="not traced the same way twice"):
        upto(done, 1)


def test_progress_is_told() -> None:
    """Of each stage it is told how far it is, and the last step is the end of it."""
    told: list[tuple[str, int, int]] = []
    found = fxr.Rewriter([spoilt(3), "conv_bn"]).localise(
        chain(6), X, progress=lambda *of: told.append(of)
    )
    assert blamed(found) == [("spoil", "3")]
    stages = dict.fromkeys(what for what, _, _ in told)
    assert list(stages) == ["verifying", "searching for the site to blame"]
    for stage in stages:
        steps = [(done, total) for what, done, total in told if what == stage]
        assert steps == sorted(steps)
        assert all(done <= total == steps[0][1] for done, total in steps)
        assert steps[0][0] == 0
    assert steps[-1][0] == steps[-1][1]
