"""What a rule may return, and what becomes of the chain: its place, its name, its sharing."""

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import Forward
from torch import nn
from torch.nn import functional as F

import fxrewrite as fxr

LinearRelu = fxr.chain(linear=nn.Linear, relu=nn.ReLU)
Relu = fxr.chain(relu=nn.ReLU)
Add = fxr.chain(relu=nn.ReLU, add=fxr.call(torch.add))
X = torch.linspace(-2, 2, 12).view(4, 3)


def rule(pattern, build, **kwargs):
    return fxr.rule(pattern=pattern, name="r", **kwargs)(build)


def rewritten(model, *rules, applied, inputs=(X,)):
    """The rewritten model, once it is sure to compute what the model does, bit for bit."""
    model.eval()
    result, report = fxr.rewrite(model, list(rules))
    assert len(report.applied) == applied, str(report)
    given = [[each.clone() for each in inputs] for _ in range(2)]
    torch.testing.assert_close(result(*given[0]), model(*given[1]), rtol=0, atol=0)
    torch.testing.assert_close(given[0], given[1], rtol=0, atol=0)
    return result


def in_one(m):
    return fxr.Replace(nn.Sequential(m.linear, m.relu))


def names(model):
    return [name for name, _ in model.named_children()]


def test_replace_takes_the_name_of_the_first_module_step_unless_told_otherwise():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    by_default = rewritten(model, rule(LinearRelu, in_one), applied=1)
    told = lambda m: fxr.Replace(nn.Sequential(m.linear, m.relu), slot="relu")  # noqa: E731
    by_slot = rewritten(model, rule(LinearRelu, told), applied=1)
    assert (names(by_default), names(by_slot)) == (["0"], ["1"])
    assert by_default.get_submodule("0.0") is model[0]


@settings(max_examples=40)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=12), st.integers(0, 2**16))
def test_merging_layers_changes_no_bit_whatever_modules_are_shared(picks, seed):
    torch.manual_seed(seed)
    pool = [nn.Linear(3, 3), nn.Linear(3, 3), nn.ReLU(), nn.ReLU(), nn.Tanh(), nn.Identity()]
    model = nn.Sequential(*[pool[pick] for pick in picks]).eval()
    merged = sum(a in (0, 1) and b in (2, 3) for a, b in itertools.pairwise(picks))
    before = copy.deepcopy(model.state_dict())
    result = rewritten(model, rule(LinearRelu, in_one), applied=merged)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    pairs = [p for p in itertools.pairwise(picks) if p[0] in (0, 1) and p[1] in (2, 3)]
    new = {id(each) for each in result.modules() if type(each) is nn.Sequential}
    assert len(new) == len(set(pairs))


def test_the_result_of_a_rewrite_keeps_the_name_when_it_is_rewritten_again():
    norm = nn.BatchNorm2d(2, affine=False)
    model = nn.Sequential(nn.Conv2d(3, 2, 1), norm, copy.deepcopy(norm)).eval()
    fused, _ = fxr.rewrite(model, "conv_bn", expect={"conv_bn": 2})
    assert names(fused) == ["0"]


def test_sites_that_share_a_module_and_its_partner_share_one_new_module():
    model = Forward(lambda m, x: m.r(m.a(m.r(m.a(x)))), a=nn.Linear(3, 3), r=nn.ReLU())
    assert names(rewritten(model, rule(LinearRelu, in_one), applied=2)) == ["a_1"]


def test_sites_that_share_a_module_with_different_partners_do_not():
    model = Forward(lambda m, x: m.s(m.a(m.r(m.a(x)))), a=nn.Linear(3, 3), r=nn.ReLU(), s=nn.ReLU())
    result = rewritten(model, rule(LinearRelu, in_one), applied=2)
    assert len(names(result)) == 2


def test_a_module_that_others_use_stays_and_the_new_one_gets_a_fresh_name():
    model = Forward(lambda m, x: m.r(m.a(x)) + m.a(x), a=nn.Linear(3, 3), r=nn.ReLU())
    result = rewritten(model, rule(LinearRelu, in_one), applied=1)
    assert sorted(names(result)) == ["a", "a_1"]
    assert result.a is model.a


TAKEN = {
    "module": nn.ReLU(),
    "parameter": nn.Parameter(torch.ones(3)),
    "attribute": "anything",
}


@pytest.mark.parametrize("kind", TAKEN)
def test_a_fresh_name_is_one_that_the_model_does_not_have(kind):
    def forward(m, x):
        return m.r(m.a(x)) + m.a(x) + (m.a_1 if kind == "parameter" else 0)

    model = Forward(forward, a=nn.Linear(3, 3), r=nn.ReLU(), a_1=TAKEN[kind])
    result = rewritten(model, rule(LinearRelu, in_one), applied=1)
    assert result.a_2[0] is model.a


Function = fxr.chain(act=fxr.call(torch.relu))


class Lambda(nn.ReLU):
    """Called as a keyword is, in lower case."""


class Graph(nn.ReLU):
    """Called as an attribute of every GraphModule is, in lower case; so are these:"""


class Code(nn.ReLU):
    pass


class Meta(nn.ReLU):
    pass


@pytest.mark.parametrize("kind", [nn.ReLU, Lambda, Graph, Code, Meta])
def test_where_no_module_stood_the_new_one_is_named_after_its_class(kind):
    model = Forward(lambda m, x: torch.relu(x))
    result = rewritten(model, rule(Function, lambda m: fxr.Replace(kind())), applied=1)
    (name,) = names(result)
    assert name.startswith(kind.__name__.lower())


class NoLength(nn.Identity):
    def __len__(self):
        raise TypeError("no length")


@pytest.mark.parametrize("kind", [nn.Sequential, NoLength])
def test_a_new_module_may_be_of_length_zero_or_have_none(kind):
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout())
    replace = rule(fxr.chain(drop=nn.Dropout), lambda m: fxr.Replace(kind()))
    assert type(rewritten(model, replace, applied=1).get_submodule("1")) is kind


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin, self.other = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        return self.lin(x)


class Negated(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.lin = fxr.evolve(block.lin, weight=-block.lin.weight, bias=-block.lin.bias)

    def forward(self, x):
        return -self.lin(x)


def test_a_child_of_a_replaced_block_that_is_also_called_by_itself_is_left_to_that_call():
    model = Forward(lambda m, x: m.a(x) + m.a.lin(x), a=Block())
    rewritten(model, rule(fxr.chain(b=Block), lambda m: fxr.Replace(Negated(m.b))), applied=1)


def test_a_block_may_become_its_child_and_no_module_of_the_model_changes():
    model = Forward(lambda m, x: m.a(x) + m.a.other(x), a=Block())
    rewritten(model, rule(fxr.chain(b=Block), lambda m: fxr.Replace(m.b.lin)), applied=1)
    assert list(model.a.lin.named_children()) == []


def test_a_module_kept_whole_does_not_get_a_new_module_inside():
    model = Forward(lambda m, x: m.a(x) + m.r(m.a.lin(x)), a=Block(), r=nn.ReLU()).eval()
    result, _ = fxr.Rewriter(rule(LinearRelu, in_one), leaf_modules=["a"]).rewrite(
        model, expect={"r": 1}
    )
    assert sorted(names(result)) == ["a", "a_lin"]
    assert result.a is model.a
    assert torch.equal(result(X), model(X))


def test_new_modules_take_the_mode_of_the_chain_and_others_keep_theirs():
    model = Forward(lambda m, x: m.r(x) + m.frozen(x), r=nn.ReLU(), frozen=nn.ReLU6())
    model.train()
    model.frozen.eval()
    new = nn.Sequential(model.frozen, nn.Identity()).eval()
    result, _ = fxr.rewrite(model, rule(Relu, lambda m: fxr.Replace(new), any_mode=True))
    assert result.r[1].training
    assert not model.frozen.training


class Sum(nn.Module):
    def forward(self, x, y):
        return F.relu(x) + y


class TwoInputs(nn.Module):
    def __init__(self, write=None):
        super().__init__()
        self.relu, self.write = nn.ReLU(), write

    def forward(self, x, y):
        x = x * 1
        relu = self.relu(x)
        y = torch.tanh(y)
        if self.write is not None:
            {"x": x, "y": y}[self.write].add_(1)
        return torch.add(relu, y), x


def test_side_inputs_are_passed_on_and_the_new_node_stands_where_they_are_known():
    replace = rule(Add, lambda m: fxr.Replace(Sum(), inputs=(m.add.kwargs["other"],)))
    call = rule(Add, lambda m: fxr.Call(lambda x, y: F.relu(x) + y, m.add.kwargs["other"]))
    for each in (replace, call):
        result = rewritten(TwoInputs(), each, applied=1, inputs=(X, X.flip(0)))
        kinds = [str(getattr(n.target, "__name__", n.target)) for n in result.graph.nodes]
        assert "tanh" in kinds[: kinds.index("relu")]


@pytest.mark.parametrize("write", ["x", "y"])
def test_a_write_between_the_ends_of_a_chain_does_not_change_what_is_computed(write):
    replace = rule(Add, lambda m: fxr.Replace(Sum(), inputs=(m.add.kwargs["other"],)))
    model = TwoInputs(write).eval()
    applied = len(fxr.plan(model, replace).applied)
    assert applied == 0 or write == "y"
    rewritten(model, replace, applied=applied, inputs=(X, X.flip(0)))


def test_call_traces_its_function_with_constants_closures_and_options():
    closed, given = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0.0, 1.0, 0.5])
    model = Forward(lambda m, x: m.r(x) * 2, r=nn.ReLU())

    def spelt(x, constant, *, slope):
        return F.leaky_relu(x * closed + constant, slope)

    result, _ = fxr.rewrite(
        model.eval(), rule(Relu, lambda m: fxr.Call(spelt, given, slope=0.1)), expect={"r": 1}
    )
    torch.testing.assert_close(result(X), 2 * F.leaky_relu(X * closed + given, 0.1))
    constants = sorted(each.tolist() for each in result.state_dict().values())
    assert constants == [given.tolist(), closed.tolist()]
    assert names(result) == []


def test_call_may_hand_on_a_parameter_of_the_model_which_is_shared():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    as_function = lambda m: fxr.Call(  # noqa: E731
        lambda x, w, b: F.relu(F.linear(x, w, b)), m.linear.weight, m.linear.bias
    )
    result = rewritten(model, rule(LinearRelu, as_function), applied=1)
    assert {id(p) for p in result.parameters()} == {id(p) for p in model.parameters()}


@pytest.mark.parametrize("answer", [lambda x: (x, x), lambda x: 3, lambda x: None])
def test_call_must_give_one_value(answer):
    with pytest.raises(
        fxr.errors.RuleError, match=r"rule 'r'.* the function of its Call returned a"
    ):
        fxr.rewrite(nn.Sequential(nn.ReLU()).eval(), rule(Relu, lambda m: fxr.Call(answer)))


@pytest.mark.parametrize("spelling", [torch.add, "relu", torch.sub, F.leaky_relu, nn.ReLU])
def test_a_captured_call_can_be_returned_as_it_is(spelling):
    spelt = {
        torch.add: lambda m, x: torch.add(m.d(x), 1, alpha=2),
        torch.sub: lambda m, x: torch.sub(1, m.d(x)),
        F.leaky_relu: lambda m, x: F.leaky_relu(m.d(x), 0.3),
        "relu": lambda m, x: m.d(x).relu(),
        nn.ReLU: lambda m, x: m.r(m.d(x)),
    }
    model = Forward(spelt[spelling], d=nn.Dropout(), r=nn.ReLU())
    pattern = fxr.chain(drop=nn.Dropout, call=fxr.call(spelling))
    rewritten(model, rule(pattern, lambda m: m.call), applied=1)


def test_a_captured_call_can_not_be_given_other_arguments():
    def steeper(m):
        m.call.kwargs["negative_slope"] = 0.5
        return m.call

    model = Forward(lambda m, x: F.leaky_relu(m.d(x), 0.1), d=nn.Dropout()).eval()
    pattern = fxr.chain(drop=nn.Dropout, call=fxr.call(F.leaky_relu))
    with pytest.raises(fxr.errors.RuleError, match="does not support item assignment"):
        fxr.rewrite(model, rule(pattern, steeper))


def test_bypass_leaves_nothing_of_the_chain():
    model = nn.Sequential(nn.Dropout(), nn.Linear(3, 3), nn.Dropout())
    result = rewritten(model, rule(fxr.chain(d=nn.Dropout), lambda m: fxr.Bypass()), applied=2)
    assert [node.op for node in result.graph.nodes] == ["placeholder", "call_module", "output"]
    assert names(result) == ["1"]


def test_what_is_known_of_the_output_stays_known_of_what_makes_it_now():
    traced = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(3, 3), nn.ReLU()).eval())
    *_, last, _ = traced.graph.nodes
    last.meta.update(stack_trace="here", val="known")
    result = rewritten(traced, rule(LinearRelu, in_one), applied=1)
    *_, made, _ = result.graph.nodes
    assert (made.meta["stack_trace"], made.meta["val"]) == ("here", "known")
    called, _ = fxr.rewrite(traced, rule(LinearRelu, lambda m: fxr.Call(lambda x: -F.relu(x))))
    *_, relu, neg, _ = called.graph.nodes
    assert (neg.meta["stack_trace"], neg.meta["val"]) == ("here", "known")
    assert relu.meta["stack_trace"] == "here"
    assert "val" not in relu.meta
