"""Patterns with branches: what they match, what they say where they do not, soundness."""

import operator
import re

import nets
import pytest
import torch
from checks import Record, largest_error, outputs
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import fxrewrite as fxr

ADDS = (operator.add, operator.iadd, torch.add, "add", "add_")


@fxr.pattern
class Branch:
    """A convolution, with what may stand around it."""

    before: nn.ReLU | None
    conv: nn.Conv2d
    bn: nn.BatchNorm2d | None


@fxr.pattern
class Parallel:
    """Two branches that are summed; the second may be the shared value itself."""

    x: fxr.Value
    left: Branch
    right: Branch | None
    join: fxr.Call = fxr.call(*ADDS)
    after: nn.ReLU | None


def look(forward):
    """The matches of Parallel in a model of convolutions and batch norms, and the report."""
    members = {name: nets.conv() for name in "abcd"}
    members |= {"bn": nets.bn(), "relu": nn.ReLU(), "inplace": nn.ReLU(inplace=True)}
    found = []

    @fxr.rule(pattern=Parallel)
    def look(m):
        found.append(m)
        return fxr.Call(torch.sigmoid)

    model = nets.Forward(forward, **members)
    return model, found, fxr.plan(model, look)


def test_each_branch_is_a_match_of_its_own_pattern():
    model, (match,), report = look(lambda m, x: m.relu(m.bn(m.a(x)) + m.b(m.relu(x))))
    assert (match.left.conv, match.left.bn, match.left.before) == (model.a, model.bn, None)
    assert (match.right.conv, match.right.bn, match.right.before) == (model.b, None, model.relu)
    assert (match.x.name, match.join.function, match.after) == ("x", operator.add, model.relu)
    (finding,) = report.applied
    assert [step for step, _ in finding.steps] == [
        "left.conv", "left.bn", "right.before", "right.conv", "join", "after",
    ]  # fmt: skip
    assert str(finding) == (
        "add: applied by look: (a -> bn | relu -> b) -> add -> relu became sigmoid"
    )


SUMS = {
    "x + a": (lambda m, x: x + m.a(x), ("other", "input")),
    "a + x": (lambda m, x: m.a(x) + x, ("input", "other")),
    "torch.add": (lambda m, x: torch.add(x, other=m.a(x)), ("other", "input")),
    "a.add": (lambda m, x: m.a(x).add(x), ("input", "other")),
    "in place": (lambda m, x: operator.iadd(m.a(x), x), ("input", "other")),
    "add_": (lambda m, x: m.a(x).add_(x), ("input", "other")),
}


@pytest.mark.parametrize("spelling", SUMS)
def test_a_sum_takes_branches_in_any_order_and_an_empty_one_is_the_shared_value(spelling):
    forward, takes = SUMS[spelling]
    model, (match,), report = look(forward)
    assert (match.left.conv, match.right, match.join.takes) == (model.a, None, takes)
    assert match.join.kwargs == {}
    assert [step for step, _ in report.applied[0].steps] == ["left.conv", "join"]


def test_a_scaled_sum_shows_its_factor_and_is_not_turned_round():
    model, (match,), _ = look(lambda m, x: torch.add(m.b(x), m.a(x), alpha=2))
    assert (match.left.conv, match.right.conv) == (model.b, model.a)
    assert match.join.kwargs == {"alpha": 2}
    assert look(lambda m, x: torch.add(x, m.a(x), alpha=2))[1] == []


@fxr.pattern
class Difference:
    left: Branch
    right: Branch | None
    join: fxr.Call = fxr.call(operator.sub, torch.sub)


@fxr.pattern
class Reversed:
    left: Branch
    right: Branch | None
    join: fxr.Call = fxr.call(operator.sub, torch.sub, chain=("other", "input"))


@pytest.mark.parametrize(
    ("pattern", "forward", "matches"),
    [
        (Difference, lambda m, x: m.a(x) - x, True),
        (Difference, lambda m, x: x - m.a(x), False),
        (Reversed, lambda m, x: m.a(x) - x, False),
        (Reversed, lambda m, x: x - m.a(x), True),
        (Reversed, lambda m, x: 1 - m.a(x), False),
    ],
)
def test_a_difference_takes_branches_as_its_arguments_are_ordered_or_as_chain_says(
    pattern, forward, matches
):
    rule = fxr.rule(pattern=pattern, name="look")(lambda m: fxr.Call(torch.sigmoid))
    report = fxr.plan(nets.Forward(forward, a=nets.conv()), rule)
    assert len(report.applied) == matches


MISSES = {
    "in branch right, it reads relu (ReLU), not a Conv2d": lambda m, x: m.a(x) + m.relu(x),
    "in branch left, it reads the model's input 'x', not a Conv2d": lambda m, x: x + x.tanh(),
    "it joins branches of different values: the model's input 'x' and c (Conv2d)": (
        lambda m, x: m.a(x) + m.b(m.c(x))
    ),
    "it does not join 2 values of the graph": lambda m, x: m.a(x) + 1,
}


@pytest.mark.parametrize("reason", MISSES)
def test_a_miss_says_in_which_branch_the_chain_stopped(reason):
    assert look(MISSES[reason])[2].missed[0].reason == reason


def twice(m, x):
    y = m.a(x)
    return y + y


def read_elsewhere(m, x):
    y = m.a(x)
    return y + m.b(x), y


def written_by_one(m, y):
    return m.a(m.inplace(y)) + m.b(y)


REFUSALS = {
    "add (add()) reads the chain by more than one argument": twice,
    "the output of a (Conv2d) is also read by the model's output, which needs it as it is": (
        read_elsewhere
    ),
    "inplace (ReLU) writes in place to what its branches share": (
        lambda m, x: (
            m.a(m.inplace(m.relu(x))) + m.b(x)
            if x is None
            else (lambda y: m.a(m.inplace(y)) + m.b(y))(m.c(x))
        )
    ),
}


@pytest.mark.parametrize("reason", REFUSALS)
def test_what_would_show_in_any_branch_refuses_the_site(reason):
    assert look(REFUSALS[reason])[2].refused[0].reason == reason


@pytest.mark.parametrize(
    "spoil", [lambda m: setattr(m.b, "forward", m.b.forward), lambda m: nets.HOOKS[0](m.b)]
)
def test_modules_of_every_branch_are_looked_at(spoil):
    def forward(m, x):
        return m.a(x) + m.b(x)

    model = nets.Forward(forward, a=nets.conv(), b=nets.conv())
    spoil(model)
    rule = fxr.rule(pattern=Parallel, name="look")(lambda m: fxr.Call(torch.sigmoid))
    assert fxr.plan(model, rule).refused[0].reason.startswith("b ")


def test_a_new_module_can_take_the_name_of_a_step_in_a_branch():
    def forward(m, x):
        return m.a(x) + m.b(x)

    @fxr.rule(pattern=Parallel)
    def sum_of_both(m):
        left, right = m.left.conv, m.right.conv
        return fxr.Replace(
            fxr.evolve(left, weight=left.weight + right.weight, bias=left.bias + right.bias),
            slot="right.conv",
        )

    model = nets.Forward(forward, a=nets.conv(), b=nets.conv())
    expected = outputs(model, nets.X.float())
    made, report = fxr.rewrite(model, sum_of_both)
    assert (list(dict(made.named_children())), report.applied[0].became) == (["b"], "b")
    assert largest_error(expected, outputs(made, nets.X.float())) < 1e-5


def test_a_join_can_not_be_made_again_without_its_branches():
    rule = fxr.rule(pattern=Parallel, name="again")(lambda m: m.join)
    with pytest.raises(fxr.errors.RuleError, match="joins branches"):
        fxr.plan(nets.Forward(lambda m, x: m.a(x) + x, a=nets.conv()), rule)


def test_a_rule_may_not_change_a_module_in_a_branch():
    def change(m):
        m.right.conv.weight.data.add_(1)
        return fxr.Call(torch.sigmoid)

    model = nets.Forward(lambda m, x: m.a(x) + m.b(x), a=nets.conv(), b=nets.conv())
    before = Record(model)
    with pytest.raises(fxr.errors.RuleError, match="changed the tensor Conv2d"):
        fxr.rewrite(model, fxr.rule(pattern=Parallel)(change))
    before.assert_unchanged(versions=False)


def test_branches_nest_where_all_start_from_one_value():
    @fxr.pattern
    class Three:
        pair: Parallel
        third: Branch
        join: fxr.Call = fxr.call(operator.add)

    assert str(fxr.pattern_of(Three)) == (
        "(pair: (left: before? -> conv -> bn? | right: before? -> conv -> bn? ?) -> join -> after? "
        "| third: before? -> conv -> bn?) -> join"
    )
    rule = fxr.rule(pattern=Three, name="look")(lambda m: fxr.Call(torch.sigmoid))
    members = {name: nets.conv() for name in "abc"}
    model = nets.Forward(lambda m, x: m.c(x) + (m.a(x) + m.b(x)), **members)
    (finding,) = fxr.plan(model, rule).applied
    assert dict(finding.steps)["pair.right.conv"] in "ab"
    assert dict(finding.steps)["third.conv"] == "c"


WRONG = {
    "joins them": lambda: fxr.chain(left=Branch, right=Branch),
    "branches come before all steps": (
        lambda: fxr.chain(left=Branch, right=Branch, between=fxr.Value, join=fxr.call(torch.add))
    ),
    "the step 'join' right after": (
        lambda: fxr.chain(left=Branch, join=fxr.call(torch.add), right=Branch)
    ),
    "two branches to join": lambda: fxr.chain(left=Branch, join=fxr.call(torch.add)),
    "one that is not empty": (
        lambda: fxr.chain(left=Branch | None, right=Branch | None, join=fxr.call(torch.add))
    ),
    "one argument for each branch": (
        lambda: fxr.chain(left=Branch, right=Branch, join=fxr.call(torch.sub, chain="input"))
    ),
    "it joins nothing": (
        lambda: fxr.chain(conv=nn.Conv2d, sub=fxr.call(torch.sub, chain=("input", "other")))
    ),
}


@pytest.mark.parametrize("reason", WRONG)
def test_a_declaration_that_can_not_match_is_an_error(reason):
    with pytest.raises(fxr.errors.PatternError, match=re.escape(reason)):
        WRONG[reason]()


def conv_sum(x, *, before, weights, biases, after):
    """What the branches compute, without any write in place."""
    sides = [x, x] if len(weights) == 2 else [x]
    made = [
        F.conv2d(torch.relu(side) if relu else side, weight, bias, padding=1)
        for side, relu, weight, bias in zip(sides, before, weights, biases, strict=True)
    ]
    total = torch.add(made[0], made[1] if len(made) == 2 else x)
    return torch.relu(total) if after else total


@fxr.rule(pattern=Parallel)
def spelt_out(m):
    branches = [m.left] if m.right is None else [m.left, m.right]
    return fxr.Call(
        conv_sum,
        before=[branch.before is not None for branch in branches],
        weights=[branch.conv.weight for branch in branches],
        biases=[branch.conv.bias for branch in branches],
        after=m.after is not None,
    )


def add_in_place(net, values, at, other):
    return values[at].add_(values[other])


WRITES = (nets.relu_in_place, nets.scale_in_place, nets.write_through_view, nets.view)


@st.composite
def programs(draw):
    """Blocks that fork and join, with writes in place and views between their steps."""
    made = []

    def add_step(step, *args):
        made.append((step, *args))
        return len(made)

    def conv(at):
        return add_step(nets.call, draw(st.sampled_from("abcd")), at)

    def maybe_relu(at):
        kind = draw(st.sampled_from([None, None, "relu", "inplace"]))
        return at if kind is None else add_step(nets.call, kind, at)

    def maybe_write(at):
        if draw(st.integers(0, 2)) == 0:
            add_step(draw(st.sampled_from(WRITES)), at)

    value = draw(st.sampled_from([0, conv(0)]))
    for _ in range(draw(st.integers(1, 2))):
        fork = value
        left = conv(maybe_relu(fork))
        maybe_write(draw(st.sampled_from([fork, left])))
        right = draw(st.sampled_from([fork, None]))
        right = conv(maybe_relu(fork)) if right is None else right
        maybe_write(draw(st.sampled_from([fork, left, right])))
        sides = draw(st.permutations([left, right]))
        value = maybe_relu(add_step(draw(st.sampled_from([nets.add, add_in_place])), *sides))
        maybe_write(value)
    outputs = [value, *draw(st.lists(st.integers(0, len(made)), max_size=1))]
    members = {name: nets.conv() for name in "abcd"}
    members |= {"relu": nn.ReLU(), "inplace": nn.ReLU(inplace=True)}
    return nets.randomise(nets.Net(members, made, outputs), draw(st.integers(0, 99))).double()


@pytest.mark.slow
@settings(max_examples=120, deadline=None)
@given(programs())
def test_replacing_branches_changes_no_result(model):
    expected = outputs(model, nets.X)
    before = Record(model)
    made, report = fxr.rewrite(model, spelt_out)
    before.assert_unchanged()
    assert largest_error(expected, outputs(made, nets.X)) <= 1e-9, report
