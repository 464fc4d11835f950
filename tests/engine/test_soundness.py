"""The ten invariants of the engine over random models, and tests that fail without each."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import checks
import nets
import pytest
import strategies
import torch
from hypothesis import given
from nets import Forward, X, bn, conv
from torch import fx, nn

import fxrewrite as fxr

Case = tuple[nn.Module, torch.Tensor]


@given(strategies.models())
def test_outputs_are_the_same_in_float64(case: Case) -> None:
    """The result computes what the model computes, to 1e-9 of its largest output."""
    model, x = case
    fused = fxr.fuse(model)
    expected = checks.outputs(copy.deepcopy(model), x)
    assert checks.largest_error(expected, checks.outputs(fused, x)) <= 1e-9


@given(strategies.models())
def test_a_second_rewrite_applies_nothing(case: Case) -> None:
    """What could be folded was folded: rewriting the result again applies nothing."""
    assert not fxr.plan(fxr.fuse(case[0]), "conv_bn").applied


@pytest.mark.slow
@given(strategies.models())
def test_the_model_is_untouched(case: Case) -> None:
    """Invariant 1: module tree, attributes, hooks, modes and tensors stay, object for object."""
    before = checks.Record(case[0])
    fxr.rewrite(case[0], "conv_bn")
    before.assert_unchanged()
    fxr.rewrite(case[0], "conv_bn", case[1])
    before.assert_unchanged(versions=False)  # a counter of calls really counts, and is put back


@given(strategies.models())
def test_only_folded_convolutions_hold_new_tensors(case: Case) -> None:
    """Invariant 1: the only tensors that are not the model's own are weight and bias of a fold."""
    fused, report = fxr.rewrite(case[0], "conv_bn")
    known = {id(each) for each in case[0].state_dict(keep_vars=True).values()}
    new = {k for k, v in fused.state_dict(keep_vars=True).items() if id(v) not in known}
    became = {finding.became for finding in report.applied}
    assert new <= {f"{name}.{tensor}" for name in became for tensor in ("weight", "bias")}


def test_a_second_reader_of_the_chain_refuses_it() -> None:
    """Invariant 2: a convolution whose output is read by more than the batch norm is not folded."""
    model = Forward(lambda m, x: (m.bn(y := m.conv(x)), y), conv=conv(), bn=bn())
    _, report = checks.folded(model, X, applied=0)
    assert "is also read by the model's output" in report.why("bn")


@fxr.rule(pattern=fxr.chain(same=nn.Identity, act=nn.ReLU))
def relu_alone(m: Any) -> fxr.Replace:
    return fxr.Replace(nn.ReLU(), slot="act")


@pytest.mark.parametrize(
    "write",
    [lambda y, x: x.mul_(-1.0), lambda y, x: x[:1].mul_(-1.0), lambda y, x: x.t().neg_()],
    ids=["itself", "a part", "a view"],
)
def test_a_write_to_what_the_chain_has_read(write: Any) -> None:
    """Invariant 2: where a chain's first step is a view, a write between its steps refuses it."""

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        z = x + 1.0
        y = m.same(z)
        write(y, z)
        return m.act(y)

    model = Forward(forward, same=nn.Identity(), act=nn.ReLU())
    result, report = fxr.rewrite(model, relu_alone)
    x = nets.random_input((3, 4))
    assert torch.equal(result(x), model(x))
    assert "in place to what the chain reads" in report.why("act")


def test_another_call_keeps_its_module() -> None:
    """Invariant 3: only the folded call moves, to a fresh name; the old module stays as it is."""
    model = Forward(lambda m, x: m.bn(m.conv(x)) + m.conv(x), conv=conv(), bn=bn())
    fused, report = checks.folded(model, X, applied=1)
    assert fused.get_submodule("conv") is model.conv
    assert report.applied[0].became == "conv_1"


def test_sites_of_the_same_modules_share_one_new_module() -> None:
    """Invariant 3: one convolution with one batch norm, called twice, becomes one module."""
    model = Forward(lambda m, x: m.bn(m.conv(x)) + m.bn(m.conv(x + 1)), conv=conv(), bn=bn())
    fused, report = checks.folded(model, X, applied=2)
    assert len({finding.became for finding in report.applied}) == 1
    assert len(list(fused.parameters())) == 2


def test_a_hook_that_changes_a_value_still_does() -> None:
    """Invariant 4: a convolution with a hook is refused, with the hook as the reason."""
    model = Forward(lambda m, x: m.bn(m.conv(x)), conv=conv(), bn=bn())
    model.conv.register_forward_hook(nets.halve_output)
    _, report = checks.folded(model, X, applied=0)
    assert "forward hook" in report.why("bn")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_folded_weight_is_rounded_once(dtype: torch.dtype) -> None:
    """Invariant 5: weight and bias are computed in float64, and then half an ulp off at most."""
    model = nets.randomise(nn.Sequential(nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16))).to(dtype)
    nn.init.uniform_(model[1].weight, 0.5, 2.0)
    conv, bn = copy.deepcopy(model).double()
    scale = bn.weight / (bn.running_var + bn.eps).sqrt()
    bias = (conv.bias - bn.running_mean) * scale + bn.bias
    fused, kind = fxr.fuse(model), torch.finfo(dtype)
    for found, exact in (
        (fused.get_parameter("0.weight"), conv.weight * scale.view(-1, 1, 1, 1)),
        (fused.get_parameter("0.bias"), bias),
    ):
        error = (found - exact).abs() / exact.abs().clamp(min=kind.tiny)
        assert error.max() <= kind.eps / 2 * (1 + 1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_what_overflows_is_refused(dtype: torch.dtype) -> None:
    """Invariant 5: a new weight beyond the range of its type refuses the fold."""
    model = nets.randomise(nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1))).to(dtype)
    with torch.no_grad():
        model[0].weight.fill_(torch.finfo(dtype).max / 2)
        model[1].weight.fill_(4.0)
        model[1].running_var.fill_(1.0)
    report = fxr.plan(model, "conv_bn")
    name = str(dtype).removeprefix("torch.")
    assert f"the new weight would not be finite in {name}" in report.why("1")


@pytest.mark.slow
@given(strategies.models())
def test_twice_the_same(case: Case) -> None:
    """Invariant 6: two rewrites give the same code, state and report, to the byte."""
    (one, report), (two, again) = (fxr.rewrite(case[0], "conv_bn") for _ in range(2))
    assert report.to_json() == again.to_json()
    assert one.code == two.code
    assert list(one.state_dict()) == list(two.state_dict())


_PRINT_A_REWRITE = """
import nets, torch, fxrewrite as fxr
from torch import nn
torch.manual_seed(0)
shared = nn.Conv2d(4, 4, 1)
parts = [nn.Sequential(shared, nn.BatchNorm2d(4)) for _ in range(5)]
fused, report = fxr.rewrite(nets.randomise(nn.Sequential(*parts, shared)), "conv_bn")
print(report.to_json(), fused.code, list(fused.state_dict()))
"""


@pytest.mark.slow
def test_the_same_in_every_process() -> None:
    """Invariant 6: nothing depends on the order of a set, which differs between processes."""

    def printed(hash_seed: str) -> bytes:
        environment = os.environ | {"PYTHONHASHSEED": hash_seed}
        folder = Path(nets.__file__).parent
        command = [sys.executable, "-c", _PRINT_A_REWRITE]
        return subprocess.run(
            command, env=environment, cwd=folder, check=True, capture_output=True
        ).stdout

    first = printed("1")
    assert b'"applied": 5' in first
    assert printed("2") == first


def test_cost_is_linear() -> None:
    """Invariant 7: the second hundred blocks cost what the first hundred did."""
    start, half, whole = map(checks.executed, (1, 51, 101))
    assert (whole - half) == pytest.approx(half - start, rel=0.01)


def test_one_compilation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant 7: however many sites are rewritten, the graph is checked and compiled once."""
    model, calls = nets.chain_of_blocks(3), Counter[str]()
    for name in ("lint", "python_code"):
        method = getattr(fx.Graph, name)

        def counted(self: fx.Graph, *args: Any, _of: Any = method, **kwargs: Any) -> Any:
            calls[_of.__name__] += len(self.nodes) > 0
            return _of(self, *args, **kwargs)

        monkeypatch.setattr(fx.Graph, name, counted)
    fxr.rewrite(model, "conv_bn", expect={"conv_bn": 3})
    assert calls == {"lint": 1, "python_code": 1}


def test_what_a_rule_made_is_looked_at_again_at_once() -> None:
    """Invariant 7: a site is rewritten again at once, and no anchor is asked twice for nothing."""
    asked: list[float] = []

    def is_large(m: Any) -> str | None:
        asked.append(m.drop.p)
        return None if m.drop.p > 0.1 else "small enough"

    @fxr.rule(pattern=fxr.chain(drop=nn.Dropout), where=[is_large])
    def halve(m: Any) -> fxr.Replace:
        return fxr.Replace(nn.Dropout(m.drop.p / 2))

    fxr.rewrite(nn.Sequential(nn.Dropout(0.8), nn.Dropout(0.05)).eval(), halve)
    assert asked == [0.8, 0.4, 0.2, 0.1, 0.05]


def test_rewriting_goes_on_until_nothing_changes() -> None:
    """Invariant 7: a site that matches only after a later one was rewritten is found, too."""

    @fxr.rule(pattern=fxr.chain("act", act=nn.ReLU, last=nn.GELU))
    def drop_both(m: Any) -> fxr.Bypass:
        return fxr.Bypass()

    @fxr.rule(pattern=fxr.chain(act=nn.Tanh))
    def tanh_to_gelu(m: Any) -> fxr.Replace:
        return fxr.Replace(nn.GELU())

    model = nn.Sequential(nn.Sigmoid(), nn.ReLU(), nn.Tanh()).eval()
    fxr.rewrite(model, [drop_both, tanh_to_gelu], expect={"drop_both": 1, "tanh_to_gelu": 1})


def test_rules_that_feed_each_other() -> None:
    """Invariant 7: rules that undo each other raise, and the error names both."""

    @fxr.rule(pattern=fxr.chain(act=nn.ReLU))
    def relu_to_gelu(m: Any) -> fxr.Replace:
        return fxr.Replace(nn.GELU())

    @fxr.rule(pattern=fxr.chain(act=nn.GELU))
    def gelu_to_relu(m: Any) -> fxr.Replace:
        return fxr.Replace(nn.ReLU())

    model = nn.Sequential(nn.ReLU()).eval()
    with pytest.raises(fxr.errors.RuleError, match=r"feed each other: gelu_to_relu, relu_to_gelu"):
        fxr.rewrite(model, [relu_to_gelu, gelu_to_relu])


def raise_an_error(m: Any) -> None:
    raise ZeroDivisionError("by the rule")


@pytest.mark.parametrize(
    "misdeed",
    [
        lambda m: m.conv.weight.data.mul_(2.0),
        lambda m: m.conv.weight.mul_(2.0),
        lambda m: setattr(m.conv, "stride", (2, 2)),
        lambda m: setattr(m.conv, "bias", None),
        lambda m: m.bn.register_forward_hook(nets.halve_output),
        raise_an_error,
    ],
    ids=[
        "hides a write",
        "writes",
        "sets an attribute",
        "sets a parameter",
        "adds a hook",
        "raises",
    ],
)
@pytest.mark.parametrize("at", [5, 4], ids=["first match", "later match"])
def test_a_rule_that_misbehaves(misdeed: Any, at: int, request: pytest.FixtureRequest) -> None:
    """Invariant 8: a rule that changes something is stopped, and what it did is put back.

    At later matches of a rule a write is noticed by torch's count of writes: one that is hidden
    from that is not noticed, and the numbers that were there are gone.
    """
    deed = request.node.callspec.id
    if deed == "later match-hides a write":
        return

    @fxr.rule(pattern=fxr.chain(conv=nn.Conv2d, bn=nn.BatchNorm2d))
    def bad(m: Any) -> fxr.Replace:
        if m.conv.out_channels == at:
            misdeed(m)
        return fxr.Replace(nn.Conv2d(4, m.conv.out_channels, 1), slot="conv")

    first = [nn.Conv2d(4, 5, 1), nn.BatchNorm2d(5), nn.Conv2d(5, 4, 1), nn.BatchNorm2d(4)]
    model = nets.randomise(nn.Sequential(*first))
    before = checks.Record(model)
    where = "0 -> 1" if at == 5 else "2 -> 3"
    message = rf"rule 'bad' .*test_soundness.* at {where}: it "
    with pytest.raises(fxr.errors.RuleError, match=message) as raised:
        fxr.rewrite(model, bad)
    if deed == "later match-writes":
        assert "can't be put back" in str(raised.value)
    else:
        before.assert_unchanged(versions=False)  # putting a tensor back is a write, too


@given(strategies.models())
def test_every_batch_norm_is_accounted_for(case: Case) -> None:
    """Invariant 9: one finding for each call of a batch norm, one for each that is not called."""
    model, x = case
    report = fxr.plan(model, "conv_bn")
    found = Counter(id(model.get_submodule(each.anchor)) for each in report.findings)
    assert found == {at: max(1, n) for at, n in checks.calls_of_batch_norms(model, x).items()}
    outcomes = (report.applied, report.refused, report.missed)
    assert sum(map(len, outcomes)) == len(report.findings)
    assert all(each.reason for each in (*report.refused, *report.missed))


@pytest.mark.parametrize(
    ("guard_says", "rule_says"),
    [(True, None), (["why"], None), (None, None), (None, "not today"), (None, nn.GELU())],
)
def test_only_a_guard_declines_and_only_by_a_string(guard_says: Any, rule_says: Any) -> None:
    """Invariant 10: any other answer of a guard or a rule is an error that names the rule."""

    @fxr.rule(pattern=fxr.chain(act=nn.ReLU), where=[lambda m: guard_says])
    def odd(m: Any) -> Any:
        return rule_says

    with pytest.raises(fxr.errors.RuleError, match="rule 'odd'"):
        fxr.rewrite(nn.Sequential(nn.ReLU()).eval(), odd)


def test_what_a_guard_says_is_the_reason() -> None:
    """Invariant 10: a string from a guard refuses the site, and stands in the report as it is."""

    @fxr.rule(pattern=fxr.chain(act=nn.ReLU), where=[lambda m: "not today"])
    def guarded(m: Any) -> fxr.Replace:
        return fxr.Replace(nn.GELU())

    report = fxr.plan(nn.Sequential(nn.ReLU()).eval(), guarded)
    assert [each.reason for each in report.refused] == ["not today"]
