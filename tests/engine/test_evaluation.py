"""A rule that breaks its contract fails the rewrite, is named, and leaves the model as it was."""

import copy
import inspect
import re

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import fxrewrite as fxr


class Scale(nn.Module):
    """A module that keeps state in every place where a module may keep it."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.weight = nn.Parameter(torch.randn(3, 3))
        self.register_buffer("shift", torch.randn(3))
        self.register_buffer("unsaved", torch.randn(3), persistent=False)
        self.frozen = nn.Parameter(torch.zeros(3), requires_grad=False)
        self.constant = torch.randn(3)
        self.sizes, self.options, self.tags = [1, 2], {"deep": [1], "flat": 1}, {"a"}
        self.tensors = [torch.randn(3)]
        self.absent = None

    def forward(self, x):
        return self.linear(x) @ self.weight + self.shift


def model():
    return nn.Sequential(nn.Tanh(), Scale(), nn.Tanh()).eval()


def state(value):
    """All that there is to know of a module, down to the identity of what it holds."""
    if isinstance(value, nn.Module):
        return type(value), {k: state(v) for k, v in vars(value).items()}
    if isinstance(value, torch.Tensor):
        at = (id(value), value.data_ptr(), value.shape, value.stride(), value.dtype)
        more = (value.requires_grad, value.grad, value._backward_hooks, vars(value).copy())
        return at, more, value.detach().numpy().tobytes()
    if isinstance(value, dict):
        return id(value), {k: state(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set):
        return type(value), list(map(state, value))
    return value


Pattern = fxr.chain(scale=Scale)


def rule(build, **kwargs):
    return fxr.rule(pattern=Pattern, name="misbehaving", **kwargs)(build)


def fails(rules, message, of=None):
    """The error of a rewrite that fails, once it is sure that nothing of the model has changed."""
    given = of or model()
    before, reference = state(given), copy.deepcopy(given)
    with pytest.raises(fxr.errors.RuleError, match=message) as error:
        fxr.rewrite(given, rules)
    assert state(given) == before
    x = torch.randn(2, 3)
    assert torch.equal(given(x), reference(x))
    return error.value


MUTATIONS = {
    "a parameter in place": lambda m: m.weight.mul_(2),
    "a parameter's data": lambda m: m.weight.data.add_(1),
    "one element": lambda m: m.weight.data[0, 0].neg_(),
    "the sign of a zero": lambda m: m.frozen.neg_(),
    "data swapped for equal data": lambda m: setattr(m.weight, "data", m.weight.data.clone()),
    "data of another dtype": lambda m: m.double(),
    "data transposed": lambda m: m.weight.t_(),
    "data through the storage": lambda m: m.weight.untyped_storage().fill_(0),
    "a buffer": lambda m: m.shift.zero_(),
    "a buffer that is not saved": lambda m: m.unsaved.zero_(),
    "what is not finite": lambda m: m.weight.fill_(float("nan")),
    "a tensor that is no buffer": lambda m: m.constant.zero_(),
    "a tensor in a list": lambda m: m.tensors[0].zero_(),
    "a child's parameter": lambda m: m.linear.bias.zero_(),
    "the whole state": lambda m: m.load_state_dict(Scale().state_dict()),
    "a gradient": lambda m: setattr(m.weight, "grad", torch.ones(3, 3)),
    "an attribute of a tensor": lambda m: setattr(m.weight, "tag", 1),
    "a hook of a tensor": lambda m: m.weight.register_hook(lambda g: g),
    "requires_grad": lambda m: m.weight.requires_grad_(False),
    "mode": lambda m: m.train(),
    "a child's mode": lambda m: m.linear.train(),
    "an attribute": lambda m: setattr(m, "absent", 1),
    "a new attribute": lambda m: setattr(m, "new", 1),
    "an attribute less": lambda m: delattr(m, "absent"),
    "a child's attribute": lambda m: setattr(m.linear, "in_features", 7),
    "a list": lambda m: m.sizes.append(3),
    "a dict": lambda m: m.options.update(flat=2),
    "a nested list": lambda m: m.options["deep"].append(2),
    "a set": lambda m: m.tags.add("b"),
    "a parameter less": lambda m: delattr(m, "weight"),
    "a parameter more": lambda m: m.register_parameter("more", nn.Parameter(torch.zeros(1))),
    "another parameter": lambda m: setattr(m, "weight", nn.Parameter(m.weight.clone())),
    "parameters in another order": lambda m: m._parameters.update(
        weight=m._parameters.pop("weight")
    ),
    "a buffer less": lambda m: delattr(m, "shift"),
    "a buffer more": lambda m: m.register_buffer("more", torch.zeros(1)),
    "a child less": lambda m: delattr(m, "linear"),
    "another child": lambda m: setattr(m, "linear", nn.Linear(3, 3)),
    "a hook": lambda m: m.register_forward_hook(lambda *a: None),
    "a child's hook": lambda m: m.linear.register_forward_pre_hook(lambda *a: None),
    "a hook of the state dict": lambda m: m.register_state_dict_pre_hook(lambda *a: None),
    "a forward of its own": lambda m: setattr(m, "forward", lambda x: x),
    "the class": lambda m: setattr(m, "__class__", nn.Identity),
    "a parametrization": lambda m: parametrizations.weight_norm(m.linear),
    "pruning": lambda m: prune.random_unstructured(m.linear, "weight", 0.5),
    "the device": lambda m: m.to("meta"),
    "a compiled call": lambda m: m.compile(),
    "two tensors swapped": lambda m: torch.utils.swap_tensors(
        m.linear.bias, nn.Parameter(torch.zeros(3))
    ),
}


@pytest.mark.parametrize("how", MUTATIONS)
@pytest.mark.parametrize("where", ["rule", "guard", "raising"])
def test_what_a_rule_changes_is_noticed_and_put_back(how, where):
    def mutate(m):
        MUTATIONS[how](m.scale)
        if where == "raising":
            raise ValueError("and then it fails")

    if where == "guard":
        fails(rule(lambda m: fxr.Bypass(), where=[mutate]), r"misbehaving.* at 1: it changed")
    elif where == "rule":
        fails(rule(lambda m: mutate(m) or fxr.Bypass()), r"misbehaving.* at 1: it changed")
    else:
        fails(rule(mutate), r"misbehaving.* at 1: it raised ValueError\('and then it fails'\)")


def zeroed(scale):
    scale.weight.zero_()
    return fxr.Bypass()


def test_what_a_rule_changes_is_noticed_when_a_guard_then_refuses():
    def refuse(m):
        m.scale.weight.zero_()
        return "no"

    fails(rule(lambda m: fxr.Bypass(), where=[refuse]), "changed")


def test_a_step_that_a_pattern_inherits_is_watched_too():
    @fxr.pattern
    class Base:
        scale: Scale

    @fxr.pattern
    class Longer(Base):
        tanh: nn.Tanh

    fails(fxr.rule(pattern=Longer)(lambda m: zeroed(m.scale)), "changed")


def test_tensors_captured_by_a_call_are_watched_too():
    class Mul(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.randn(3))

        def forward(self, x):
            return torch.mul(x, self.scale)

    def zero(m):
        m.mul.kwargs["other"].zero_()
        return fxr.Bypass()

    pattern = fxr.chain(mul=fxr.call(torch.mul))
    fails(fxr.rule(pattern=pattern)(zero), r"'zero'.* at mul: it changed", of=Mul().eval())


def test_a_repeated_step_is_watched_too():
    many = fxr.chain(many=tuple[Scale, ...], tanh=nn.Tanh)
    fails(
        fxr.rule(pattern=many)(lambda m: zeroed(m.many[-1])),
        "changed",
        of=nn.Sequential(Scale(), Scale(), nn.Tanh()).eval(),
    )


@pytest.mark.parametrize("answer", [None, 3, "no", nn.ReLU(), nn.ReLU, (fxr.Bypass(),), fxr.Bypass])
def test_a_rule_returns_an_action_and_nothing_else(answer):
    message = re.escape(
        f"returned {answer!r}, not a Replace or Revise or Call or Bypass; to decline"
    )
    if isinstance(answer, str):
        message = "returned 'no'"
    fails(rule(lambda m: answer), message)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda m: fxr.Replace(3), r"returned Replace\(.*\), and 3 is not a module"),
        (lambda m: fxr.Replace(nn.ReLU), r"returned Replace\(.*\), and <class .* is not a module"),
        (lambda m: fxr.Replace(nn.ReLU(), slot="tahn"), "slot 'tahn'; this match has scale"),
        (
            lambda m: fxr.Replace(nn.ReLU(), inputs=(3,)),
            "expected a Value that this match captured",
        ),
        (lambda m: fxr.Replace(nn.ReLU(), inputs=(fxr.Value("x"),)), "expected a Value that this"),
        (lambda m: fxr.Call(3), "not callable"),
        (lambda m: fxr.Call(lambda x: 1 / 0), "division by zero"),
        (lambda m: fxr.Call(lambda x: bool(x)), "control flow"),
        (lambda m: fxr.Call(lambda: 3), "positional argument"),
    ],
)
def test_an_action_that_can_not_be_carried_out_is_an_error(answer, message):
    fails(rule(answer), rf"rule 'misbehaving' .* at 1: .*{message}")


def test_a_value_that_another_rewrite_captured_is_refused():
    class Sum(nn.Module):
        def forward(self, x):
            return torch.add(torch.tanh(x), torch.sin(x))

    values = []

    def use_the_first(m):
        values.append(m.add.kwargs["other"])
        return fxr.Call(torch.sub, values[0])

    pattern = fxr.chain(tanh=fxr.call(torch.tanh), add=fxr.call(torch.add))
    rule = fxr.rule(pattern=pattern)(use_the_first)
    fxr.plan(Sum(), rule)
    fails(rule, "'use_the_first'.* Value that this match captured", of=Sum())


def test_the_error_names_the_rule_where_it_is_declared_and_the_site():
    def raising(m):
        raise KeyError("missing")

    error = fails(fxr.rule(pattern=Pattern)(raising), "raised KeyError")
    line = inspect.getsourcelines(raising)[1]
    assert str(error).startswith(f"rule 'raising' ({__file__}:{line}) at 1: it raised KeyError")
    assert isinstance(error.__cause__, KeyError)


def test_a_guard_that_raises_is_named():
    def is_small(m):
        return m.scale.nothing

    assert "is_small" in str(fails(rule(lambda m: fxr.Bypass(), where=[is_small]), "raised"))


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_an_interruption_goes_through_and_the_model_is_as_it_was(interruption):
    def interrupted(m):
        m.scale.weight.zero_()
        m.scale.train()
        raise interruption

    given = model()
    before = state(given)
    with pytest.raises(interruption):
        fxr.rewrite(given, rule(interrupted))
    assert state(given) == before


class Counted:
    """Lets a test fail where an engine would go on forever."""

    def __init__(self):
        self.calls = 0

    def __call__(self, m):
        self.calls += 1
        if self.calls > 2000:
            raise SystemError("it went on for 2000 calls")


@pytest.mark.parametrize("answer", [lambda m: fxr.Replace(Scale()), lambda m: fxr.Replace(m.scale)])
def test_a_rule_that_feeds_itself_is_stopped_and_named(answer):
    error = fails(rule(answer, where=[Counted()]), "never comes to an end")
    assert "feed each other: misbehaving" in str(error)


Relu, Gelu = fxr.chain(a=fxr.call(torch.relu)), fxr.chain(a=fxr.call(nn.functional.gelu))


class Relus(nn.Module):
    def forward(self, x):
        return torch.relu(x)


@pytest.mark.parametrize("copies", [1, 2, 3])
def test_a_rule_whose_call_makes_more_of_what_it_matches_is_stopped(copies):
    def more(x):
        for _ in range(copies):
            x = torch.relu(x)
        return x

    grow = fxr.rule(pattern=Relu, name="grow", where=[Counted()])(lambda m: fxr.Call(more))
    fails(grow, "rule 'grow'.* never comes to an end", of=Relus())


def test_two_rules_that_feed_each_other_are_both_named():
    count = Counted()
    a = fxr.rule(pattern=Relu, name="a", where=[count])(lambda m: fxr.Call(nn.functional.gelu))
    b = fxr.rule(pattern=Gelu, name="b", where=[count])(lambda m: fxr.Call(torch.relu))
    fails([a, b], "these rules feed each other: a, b", of=Relus())


def test_many_sites_of_one_rule_do_not_feed_each_other():
    deep = nn.Sequential(*[nn.ReLU() for _ in range(300)]).eval()
    pair = fxr.rule(pattern=fxr.chain(a=nn.ReLU, b=nn.ReLU), name="pair")
    once, _ = fxr.rewrite(deep, pair(lambda m: fxr.Replace(m.a)), expect={"pair": 299})
    assert len(list(once.children())) == 1
