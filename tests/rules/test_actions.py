"""The action Revise: each step of a chain gets a new module, or goes."""

import checks
import nets
import pytest
import torch
from torch import nn

import fxrewrite as fxr

X = nets.random_input((2, 4, 5, 5))


@fxr.pattern(anchor="bn")
class ConvDropBn:
    conv: nn.Conv2d
    drop: nn.Dropout | None
    bn: nn.BatchNorm2d
    act: nn.ReLU | None


def revising(**steps):
    return fxr.rule(pattern=ConvDropBn, name="revising")(lambda m: fxr.Revise(**steps))


def net(*layers):
    return nets.randomise(nn.Sequential(*layers)).double()


def test_steps_get_new_modules_under_their_own_names_and_the_others_stay():
    model = net(nets.conv(), nn.Dropout(), nets.bn(), nn.ReLU())
    before = checks.Record(model)
    conv = nn.Conv2d(4, 4, 1).double()
    rewritten, report = fxr.rewrite(model, revising(conv=conv, bn=nn.Tanh(), drop=None))
    before.assert_unchanged()
    assert rewritten.get_submodule("0") is conv
    assert rewritten.get_submodule("3") is model[3]
    assert [name for name, _ in rewritten.named_children()] == ["0", "2", "3"]
    assert report.applied[0].became == "0 -> 2 -> 3"
    torch.testing.assert_close(rewritten(X), torch.relu(torch.tanh(conv(X))), rtol=0, atol=0)


def test_a_step_that_is_absent_may_be_named():
    model = net(nets.conv(), nets.bn())
    rewritten, _ = fxr.rewrite(model, revising(drop=None, bn=None), expect={"revising": 1})
    assert torch.equal(rewritten(X), model[0](X))


def test_leaving_out_all_steps_leaves_the_input():
    model = net(nn.Tanh(), nets.conv(), nn.Dropout(), nets.bn(), nn.ReLU())
    rule = revising(conv=None, drop=None, bn=None, act=None)
    assert torch.equal(fxr.rewrite(model, rule)[0](X), X.tanh())


def test_a_module_that_something_else_uses_keeps_its_name():
    """Where a name is in use, the new module gets a fresh one, each step by itself."""
    conv, bn = nets.conv(), nets.bn()
    model = nets.Forward(lambda m, x: m.bn(m.conv(x)) + m.conv(x), conv=conv, bn=bn).double()
    new = nn.Conv2d(4, 4, 1).double()
    rewritten, report = fxr.rewrite(model, revising(conv=new, bn=nn.Tanh()))
    assert report.applied[0].became == "conv_1 -> bn"
    torch.testing.assert_close(rewritten(X), torch.tanh(new(X)) + conv(X), rtol=0, atol=0)


def test_sites_that_share_their_modules_share_the_new_ones():
    model = nets.Forward(
        lambda m, x: m.bn(m.conv(m.bn(m.conv(x)))), conv=nets.conv(), bn=nets.bn()
    ).double()
    rewritten, _ = fxr.rewrite(
        model, revising(conv=nn.Conv2d(4, 4, 1).double(), bn=nn.Tanh()), expect={"revising": 2}
    )
    assert len(list(rewritten.children())) == 2


def test_sites_that_differ_in_shape_share_modules_that_come_out_alike():
    """A rule that sees shapes is asked at each site; equal results are one module."""

    @fxr.pattern
    class Seen:
        conv: nn.Conv2d
        x: fxr.Value
        bn: nn.BatchNorm2d

    @fxr.rule
    def halve(m: Seen) -> fxr.Replace:
        return fxr.Replace(fxr.evolve(m.conv, weight=m.conv.weight / 2), slot="conv")

    model = nets.Forward(
        lambda m, x: (m.bn(m.conv(x)), m.bn(m.conv(x[..., :4]))), conv=nets.conv(), bn=nets.bn()
    ).double()
    rewritten, _ = fxr.rewrite(model, halve, X, expect={"halve": 2})
    assert len(list(rewritten.children())) == 1


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ({"norm": None}, "it revised 'norm'; the pattern's steps are conv, drop, bn, act"),
        ({"bn": 3}, r"Revise\(bn=3\), and 3 is not a module"),
    ],
)
def test_what_is_no_revision_is_an_error(steps, words):
    with pytest.raises(fxr.errors.RuleError, match=words):
        fxr.rewrite(net(nets.conv(), nets.bn()), revising(**steps))


def test_a_new_weight_that_is_not_finite_is_refused():
    broken = nn.Conv2d(4, 4, 1)
    broken.weight.data.fill_(float("inf"))
    report = fxr.plan(net(nets.conv(), nets.bn()), revising(conv=broken))
    assert "would not be finite" in report.refused[0].reason


def test_a_write_in_place_must_not_reach_what_others_read():
    """A step that writes to its input may not be left with an input that is read elsewhere."""
    chain = fxr.chain(drop=nn.GELU, act=nn.ReLU)
    rule = fxr.rule(pattern=chain, name="leave_out")(lambda m: fxr.Revise(drop=None))
    model = nets.Forward(
        lambda m, x: m.act(m.drop(x)) + x, drop=nn.GELU(), act=nn.ReLU(inplace=True)
    )
    assert "may write in place to" in fxr.plan(model, rule).refused[0].reason


class ActFirst(nn.Sequential):
    """A Sequential with an order of its own."""

    def forward(self, x):
        return self[0](self[1](x))


class Both(nn.Module):
    """A module whose code nobody looks at."""

    def __init__(self, conv, act):
        super().__init__()
        self.conv, self.act = conv, act

    def forward(self, x):
        return self.act(self.conv(x))


def hooked(conv, act):
    conv = fxr.evolve(conv)
    conv.register_forward_hook(lambda module, args, output: args[0])
    return nn.Sequential(conv, act)


def kept(make):
    chain = fxr.chain(conv=nn.Conv2d, act=nn.ReLU)
    return fxr.rule(pattern=chain, name="kept")(lambda m: fxr.Replace(make(m.conv, m.act)))


@pytest.mark.parametrize(
    "make",
    [
        nn.Sequential,
        lambda conv, act: nn.Sequential(nn.Sequential(nn.Identity(), conv), act),
        lambda conv, act: nn.Sequential(conv, nn.Sequential(nn.Dropout(), act)),
        torch.ao.nn.intrinsic.ConvReLU2d,
    ],
)
def test_what_a_replacement_writes_to_may_be_its_own(make):
    """An activation in place behind a layer writes to what the layer made."""
    model = net(nets.conv(), nn.ReLU(inplace=True))
    made, _ = fxr.rewrite(model, kept(make), expect={"kept": 1})
    x = X.clone()
    torch.testing.assert_close(made(x), model(X.clone()), rtol=0, atol=0)
    assert torch.equal(x, X)


@pytest.mark.parametrize("make", [lambda c, a: nn.Sequential(a, c), ActFirst, Both, hooked])
def test_what_may_write_to_the_input_is_refused(make):
    """Where nothing is sure to be made before, the write may reach what others read."""
    model = net(nets.conv(), nn.ReLU(inplace=True))
    reason = fxr.plan(model, kept(make)).refused[0].reason
    assert reason == "what replaces the chain may write in place to the model's input 'input'"
    behind = net(nets.conv(), nets.conv(), nn.ReLU(inplace=True))
    made, _ = fxr.rewrite(behind, kept(make), expect={"kept": 1})  # what alone reads its input
    assert made(X.clone()).shape == X.shape


def test_an_anchor_that_stays_is_accounted_for():
    """A step that a revision keeps is still an anchor of the model."""
    twice = fxr.chain(first=nn.ReLU, second=nn.ReLU)
    rule = fxr.rule(pattern=twice, name="once")(lambda m: fxr.Revise(second=None))
    report = fxr.plan(net(nets.conv(), nn.ReLU(), nn.ReLU()), rule)
    assert [(each.anchor, each.outcome) for each in report.findings] == [
        ("1", "missed"),
        ("2", "applied"),
    ]


# Into a module tree.


def test_revised_steps_take_their_places_in_a_module_tree():
    model = net(nets.conv(), nn.Dropout(), nets.bn(), nn.ReLU())
    conv = nn.Conv2d(4, 4, 1).double()
    rule = revising(conv=conv, bn=nn.Tanh(), drop=None)
    rewritten, _ = fxr.rewrite(model, rule, into="modules", expect={"revising": 1})
    kinds = [nn.Conv2d, nn.Identity, nn.Tanh, nn.ReLU]
    assert [type(each) for each in rewritten.children()] == kinds
    torch.testing.assert_close(rewritten(X), torch.relu(torch.tanh(conv(X))), rtol=0, atol=0)


def test_a_new_module_may_hold_those_that_it_replaces_in_a_module_tree():
    """The activation in place goes into the convolution's place; another call stops that."""
    keep = kept(nn.Sequential)
    members = {"conv": nets.conv(), "act": nn.ReLU(inplace=True)}
    for forward in (
        lambda m, x: m.act(m.conv(x)),
        lambda m, x: m.act(m.conv(x)) if x.sum() < 1e9 else x,
    ):
        model = nets.Forward(forward, **members).double()
        made, _ = fxr.rewrite(model, keep, X, into="modules", expect={"kept": 1})
        assert isinstance(made.conv, nn.Sequential)
        torch.testing.assert_close(made(X.clone()), model(X.clone()), rtol=0, atol=0)
    both = nets.Forward(lambda m, x: m.act(m.conv(x)) + m.conv(x), **members)
    assert "used elsewhere too" in fxr.plan(both, keep, into="modules").refused[0].reason


def test_a_step_that_reads_its_input_later_than_before_must_not_meet_a_write():
    chain = fxr.chain(bn=nn.BatchNorm2d, act=nn.ReLU)
    rule = fxr.rule(pattern=chain, name="late")(lambda m: fxr.Revise(bn=None, act=nn.Tanh()))

    def forward(m, x):
        x = x + 1
        y = m.bn(x)
        x.mul_(2)
        return m.act(y)

    report = fxr.plan(nets.Forward(forward, bn=nets.bn(), act=nn.ReLU()), rule)
    assert report.refused[0].reason.endswith("writes in place to what the chain reads")
