"""What a pattern matches: steps up and down the chain, however the graph spells them."""

import operator
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import fxrewrite as fxr

LETTERS = {"r": nn.ReLU, "i": nn.Identity, "t": nn.Tanh, "s": nn.Sigmoid, "g": nn.GELU}


def look(model, pattern):
    """The matches of a pattern and the report of a rule that only looks at them."""
    found = []

    def record(m):
        found.append(m)
        return "only looking"

    rule = fxr.rule(pattern=pattern, name="look", where=[record])(lambda m: fxr.Bypass())
    return found, fxr.plan(model.eval(), rule)


class Model(nn.Module):
    """Calls a function with itself and its inputs; has two layers and tensors to call it with."""

    def __init__(self, forward):
        super().__init__()
        self.calls = forward
        self.linear, self.other, self.relu = nn.Linear(3, 3), nn.Linear(3, 3), nn.ReLU()
        self.drop = nn.Dropout()
        self.weight, self.bias = nn.Parameter(torch.randn(3, 3)), nn.Parameter(torch.randn(3))
        self.register_buffer("scale", torch.randn(3))

    def forward(self, x, y):
        return self.calls(self, x, y)


def chain_model(word):
    return nn.Sequential(*[LETTERS[letter]() for letter in word])


# A pattern, the same as a regular expression over letters, and the group that is the anchor.
ORACLES = [
    (fxr.chain(a=nn.ReLU, b=nn.GELU), "(?P<a>r)(?P<b>g)", "b"),
    (
        fxr.chain(a=nn.ReLU, m=tuple[nn.Identity | nn.Tanh, ...], o=nn.Sigmoid | None, b=nn.GELU),
        "(?P<a>r)(?P<m>[it]*)(?P<o>s?)(?P<b>g)",
        "b",
    ),
    (
        fxr.chain("b", b=nn.GELU, m=tuple[nn.Identity | nn.Tanh, ...], a=nn.ReLU),
        "(?P<b>g)(?P<m>[it]*)(?P<a>r)",
        "b",
    ),
    (fxr.chain(b=nn.GELU, o=nn.Identity | None), "(?P<b>g)(?P<o>i?)", "b"),
    (fxr.chain(o=nn.Identity | None, b=nn.GELU), "(?P<o>i?)(?P<b>g)", "b"),
    (fxr.chain(b=nn.GELU, m=tuple[nn.Identity, ...]), "(?P<b>g)(?P<m>i*)", "b"),
    (
        fxr.chain("b", a=nn.Sigmoid | None, b=nn.GELU, c=nn.Identity | None, d=nn.ReLU),
        "(?P<a>s?)(?P<b>g)(?P<c>i?)(?P<d>r)",
        "b",
    ),
]


@settings(max_examples=60)
@given(
    st.text(alphabet="".join(LETTERS), min_size=1, max_size=12), st.integers(0, len(ORACLES) - 1)
)
def test_a_chain_of_modules_matches_as_a_regular_expression_matches_a_word(word, which):
    pattern, expression, anchor = ORACLES[which]
    found = {m.start(anchor): m.groupdict() for m in re.finditer(expression, word)}
    report = look(chain_model(word), pattern)[1]
    assert [int(each.anchor) for each in report.findings] == [
        at for at, letter in enumerate(word) if letter == "g"
    ]
    for finding in report.findings:
        groups = found.get(int(finding.anchor))
        assert finding.outcome == ("refused" if groups else "missed")
        if groups:
            called = [(step, word[int(name)]) for step, name in finding.steps]
            assert called == [(step, letter) for step in groups for letter in groups[step] or ""]
            names = [int(name) for _, name in finding.steps]
            assert names == list(range(names[0], names[0] + len(names)))


def test_captures_are_the_modules_themselves_and_absent_steps_are_empty():
    model = chain_model("ritg").eval()
    (match,) = look(model, ORACLES[1][0])[0]
    assert (match.a, match.m, match.o, match.b) == (model[0], (model[1], model[2]), None, model[3])


def test_a_repeated_step_has_no_limit():
    model = nn.Sequential(nn.ReLU(), *[nn.Identity() for _ in range(1500)], nn.GELU())
    pattern = fxr.chain(a=nn.ReLU, m=tuple[nn.Identity, ...], b=nn.GELU)
    assert len(look(model, pattern)[0][0].m) == 1500


@pytest.mark.parametrize("last", [nn.ReLU | None, tuple[nn.ReLU, ...]])
def test_a_last_step_that_may_be_absent_is_left_when_its_input_is_read_elsewhere(last):
    def forward(model, x, y):
        linear = model.linear(x)
        return model.relu(linear) + linear

    matches, report = look(Model(forward), fxr.chain(linear=nn.Linear, relu=last))
    assert [match.relu or None for match in matches] == [None]
    assert report.refused[0].reason == "only looking"


RELUS = {
    "module": lambda m, x: m.relu(x),
    "F.relu": lambda m, x: F.relu(x),
    "F.relu with an argument": lambda m, x: F.relu(x, inplace=False),
    "torch.relu": lambda m, x: torch.relu(x),
    "torch.relu by name": lambda m, x: torch.relu(input=x),
    "method": lambda m, x: x.relu(),
}


@pytest.mark.parametrize("spelling", RELUS)
def test_a_call_step_matches_each_of_its_spellings(spelling):
    pattern = fxr.chain(linear=nn.Linear, act=fxr.call(nn.ReLU, F.relu, torch.relu, "relu"))
    model = Model(lambda m, x, y: RELUS[spelling](m, m.linear(x)))
    (match,) = look(model, pattern)[0]
    assert match.linear is model.linear
    assert (match.act.takes, match.act.args) == ("input", ())
    assert not match.act.kwargs.get("inplace")
    if spelling == "module":
        assert match.act.function is model.relu


@pytest.mark.parametrize("spelling", RELUS)
def test_a_call_step_matches_only_what_it_names(spelling):
    pattern = fxr.chain(linear=nn.Linear, act=fxr.call(nn.GELU, F.gelu, torch.tanh, "tanh"))
    model = Model(lambda m, x, y: RELUS[spelling](m, m.linear(x)) * torch.tanh(y))
    matches, report = look(model, pattern)
    assert matches == []
    assert [finding.anchor for finding in report.missed] == ["tanh"]


ADDS = {
    "operator": lambda a, b: a + b,
    "torch.add": torch.add,
    "torch.add by name": lambda a, b: torch.add(other=b, input=a),
    "method": lambda a, b: a.add(b),
    "method by name": lambda a, b: a.add(other=b),
}
ADD = fxr.call(operator.add, torch.add, "add")


@pytest.mark.parametrize("spelling", ADDS)
@pytest.mark.parametrize("side", ["input", "other"])
def test_an_add_matches_on_either_side_and_captures_the_other_as_a_value(spelling, side):
    def forward(model, x, y):
        sides = (model.relu(x), y) if side == "input" else (y, model.relu(x))
        return ADDS[spelling](*sides)

    (match,) = look(Model(forward), fxr.chain(relu=nn.ReLU, add=ADD))[0]
    (other,) = match.add.kwargs.values()
    assert match.add.takes == side
    assert match.add.kwargs.keys() == {"input", "other"} - {side}
    assert isinstance(other, fxr.Value)
    assert other.name == "y"


SUB = fxr.call(operator.sub, torch.sub, "sub", chain="input")


@pytest.mark.parametrize("anchor", ["relu", "sub"])
def test_chain_pins_the_argument_by_which_the_chain_enters(anchor):
    pattern = fxr.chain(anchor, relu=nn.ReLU, sub=SUB)
    assert len(look(Model(lambda m, x, y: m.relu(x) - y), pattern)[0]) == 1
    matches, report = look(Model(lambda m, x, y: y - m.relu(x)), pattern)
    assert (matches, len(report.missed)) == ([], 1)


def test_a_chain_that_enters_by_another_argument_is_not_called_the_wrong_function():
    model = Model(lambda m, x, y: y - m.relu(x))
    reason = look(model, fxr.chain("relu", relu=nn.ReLU, sub=SUB))[1].missed[0].reason
    assert not re.search(r"feeds sub \(sub\(\)\), not a .*sub\(\)", reason)


SAME_ARGUMENTS = {
    "softmax": (torch.softmax, (-1,), {"dim": -1}),
    "clamp": (torch.clamp, (0, 1), {"min": 0, "max": 1}),
    "mean": (torch.mean, ((0, 1),), {"dim": (0, 1)}),
    "pow": (torch.pow, (2,), {"exponent": 2}),
    "transpose": (torch.transpose, (0, 1), {"dim0": 0, "dim1": 1}),
    "flatten": (torch.flatten, (0,), {"start_dim": 0}),
    "reshape": (torch.reshape, ((3, -1),), {"shape": (3, -1)}),
    "permute": (torch.permute, ((1, 0),), {"dims": (1, 0)}),
}


@pytest.mark.parametrize("name", SAME_ARGUMENTS)
@pytest.mark.parametrize("how", ["function", "method", "by name", "one by one"])
def test_arguments_have_the_same_names_however_they_are_given(name, how):
    function, given_args, expected = SAME_ARGUMENTS[name]

    def forward(model, x, y):
        if how == "function":
            return function(x, *given_args)
        if how == "method":
            return getattr(x, name)(*given_args)
        if how == "by name":
            return function(input=x, **expected)
        flat = given_args[0] if isinstance(given_args[0], tuple) and name != "mean" else given_args
        return getattr(x, name)(*flat)

    (match,) = look(Model(forward), fxr.chain(step=fxr.call(function, name, chain="input")))[0]
    assert {k: tuple(v) if k == "shape" else v for k, v in match.step.kwargs.items()} == expected


def test_functions_that_dispatch_on_a_flag_name_their_arguments_too():
    step = fxr.call(F.max_pool2d, torch.max_pool2d, chain="input")
    (match,) = look(Model(lambda m, x, y: F.max_pool2d(x, 2)), fxr.chain(pool=step))[0]
    assert match.pool.kwargs["kernel_size"] == 2


def test_an_operator_with_a_number_on_the_left_enters_by_the_other_argument():
    (match,) = look(Model(lambda m, x, y: 1 - x), fxr.chain(sub=fxr.call(operator.sub)))[0]
    assert (match.sub.takes, match.sub.kwargs) == ("other", {"input": 1})


def test_parameters_and_buffers_of_the_model_are_captured_as_tensors():
    model = Model(lambda m, x, y: F.linear(x, m.weight, bias=m.bias) * m.scale)
    pattern = fxr.chain(linear=fxr.call(F.linear), mul=fxr.call(operator.mul))
    (match,) = look(model, pattern)[0]
    assert match.linear.kwargs["weight"] is model.weight
    assert match.linear.kwargs["bias"] is model.bias
    assert match.mul.kwargs["other"] is model.scale


@pytest.mark.parametrize("left", [True, False])
def test_a_chain_starts_from_a_value_and_not_from_a_parameter(left):
    model = Model(lambda m, x, y: m.scale * x if left else x * m.scale)
    (match,) = look(model, fxr.chain(mul=fxr.call(operator.mul)))[0]
    assert match.mul.takes == ("other" if left else "input")
    assert list(match.mul.kwargs.values()) == [model.scale]


def test_nested_arguments_are_resolved_too():
    model = Model(lambda m, x, y: torch.einsum("ij,jk->ik", x, m.weight)[0, :2])
    pattern = fxr.chain(item=fxr.call(operator.getitem))
    (match,) = look(model, pattern)[0]
    assert tuple(match.item.kwargs.values()) == ((0, slice(None, 2, None)),)


def test_a_value_read_twice_by_the_next_step_is_refused():
    def forward(model, x, y):
        relu = model.relu(x)
        return relu + relu

    matches, report = look(Model(forward), fxr.chain(relu=nn.ReLU, add=ADD))
    assert matches == []
    assert report.refused[0].reason == "add (add()) reads the chain by more than one argument"


def test_a_value_read_twice_by_the_first_step_is_a_side_input_too():
    (match,) = look(Model(lambda m, x, y: x + x), fxr.chain(add=ADD))[0]
    assert match.add.kwargs["other"].name == "x"


def test_a_module_that_is_called_with_more_than_the_chain_is_refused():
    class Gate(nn.Module):
        def forward(self, x, gate=None):
            return x if gate is None else x * gate

    model = Model(lambda m, x, y: m.drop(x, gate=y) + m.drop(x))
    model.drop = Gate()
    matches, report = look(model, fxr.chain(gate=Gate))
    assert len(matches) == 1
    assert report.refused[0].reason == "drop (Gate) is called with a further argument: gate"


MISSES = {
    "upstream": (lambda m, x, y: m.relu(m.drop(x)), "it reads drop (Dropout), not a Linear"),
    "the model's input": (
        lambda m, x, y: m.relu(x),
        "it reads the model's input 'x', not a Linear",
    ),
    "a function": (lambda m, x, y: m.relu(torch.tanh(x)), "it reads tanh (tanh()), not a Linear"),
    "a method": (lambda m, x, y: m.relu(x.tanh()), "it reads tanh (.tanh()), not a Linear"),
    "a parameter": (
        lambda m, x, y: m.relu(m.weight) + x,
        "it reads the model's attribute weight, not a Linear",
    ),
}


@pytest.mark.parametrize("case", MISSES)
def test_a_miss_says_what_stood_where_a_step_was_wanted(case):
    forward, reason = MISSES[case]
    assert look(Model(forward), fxr.chain(a=nn.Linear, b=nn.ReLU))[1].missed[0].reason == reason


def test_a_miss_downstream_says_what_reads_the_value():
    pattern = fxr.chain("a", a=nn.Linear, b=nn.ReLU)
    model = Model(lambda m, x, y: m.drop(m.linear(x)) + torch.tanh(m.other(x)))
    first, second = look(model, pattern)[1].missed
    assert first.reason == "it feeds drop (Dropout), not a ReLU"
    assert second.reason == "it feeds tanh (tanh()), not a ReLU"
    unused = Model(lambda m, x, y: [x, m.linear(x)][0])
    reason = look(unused, pattern)[1].missed[0].reason
    assert reason == "nothing reads its output, where a ReLU is wanted"


def test_the_miss_that_came_closest_is_reported():
    far = fxr.rule(pattern=fxr.chain(a=nn.Tanh, b=nn.ReLU), name="far")(lambda m: fxr.Bypass())
    near = fxr.rule(pattern=fxr.chain(a=nn.Tanh, b=nn.Linear, c=nn.ReLU), name="near")(far.build)
    for rules in ([far, near], [near, far]):
        report = fxr.plan(nn.Sequential(nn.GELU(), nn.Linear(3, 3), nn.ReLU()).eval(), rules)
        (missed,) = report.missed
        assert (missed.rule, missed.anchor) == ("near", "2")
        assert missed.reason == "1 (Linear) reads 0 (GELU), not a Tanh"
