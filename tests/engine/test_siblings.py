"""Groups of siblings: what they are, which of them become one call, and who must not notice."""

from __future__ import annotations

import dataclasses
import operator
from collections import OrderedDict

import nets
import pytest
import torch
from fxrewrite.patterns.merge_siblings import in_common, of_any_size, stacked
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nets import Forward
from torch import nn
from torch.nn import functional as F

import fxrewrite as fxr
from fxrewrite.errors import PatternError, RuleError
from fxrewrite.testing import check_rule, models_around
from fxrewrite.testing.written import written


@fxr.pattern
class Linears:
    layers: fxr.Siblings[nn.Linear] = fxr.siblings(dim=-1, keeps_sizes=True, alike=in_common)


@fxr.rule(last=True)
def merge(m: Linears) -> fxr.Split:
    sizes = tuple(layer.out_features for layer in m.layers)
    return fxr.Split(stacked(m.layers, out_features=sum(sizes)), sizes)


convs = of_any_size.rules[1]


def attention(*, after=(), before=(), returned="F.relu(q), F.silu(k), v.sum(-1)", **members):
    """Three layers that read x, with lines before the second and after the third."""
    layers = {"q": nn.Linear(4, 6), "k": nn.Linear(4, 2, bias=False), "v": nn.Linear(4, 3)}
    lines = ["q = self.q(x)", *before, "k, v = self.k(x), self.v(x)", *after, f"return {returned}"]
    return written({**layers, **members}, lines).double()


x = torch.randn(2, 5, 4, dtype=torch.float64)


def rewritten(model, example_inputs=None, *, applied=1, inputs=x, **options):
    rewriter = fxr.Rewriter(merge, **options)
    made, report = rewriter.rewrite(model, example_inputs, expect={"merge": applied})
    torch.testing.assert_close(made(inputs.clone()), model(inputs.clone()), rtol=0, atol=1e-12)
    return made, report


def chain_of(report):
    return str(report.applied[0]).partition("merge: ")[2]


def reason(report, name):
    return next(each.reason for each in report.findings if each.anchor == name)


# What becomes of a group.


def test_siblings_become_one_call_and_a_split():
    made, report = rewritten(attention())
    assert chain_of(report) == "(q | k | v) became q"
    assert made.q.out_features == 11
    assert [name for name, _ in made.named_children()] == ["q"]
    split = next(n for n in made.graph.nodes if n.target is torch.split_with_sizes)
    assert split.args[1:] == ([6, 2, 3], -1)


def test_each_sibling_is_told_of():
    _, report = rewritten(attention())
    assert report.why("q") == report.why("k") == report.why("v")
    assert report.counts["merge"] == {"applied": 1, "refused": 0, "missed": 0}


def test_the_tensors_of_each_sibling_are_in_the_new_ones():
    _, report = rewritten(attention())
    assert str(report.parameter_names["v.bias"]) == "folded into q.weight, q.bias"


@pytest.mark.parametrize("rows", [1, 10])
def test_a_layer_without_a_bias_gets_one_that_changes_no_number_and_no_sign_of_zero(rows):
    """It is 0.0, from which torch starts to add up products, be they negative zeros all."""
    model = attention(returned="torch.sign(1 / q), torch.sign(1 / k), torch.sign(1 / v)")
    with torch.no_grad():
        model.k.weight.fill_(1e-200)
    made, _ = fxr.rewrite(model, merge)
    assert not torch.signbit(made.q.bias[6:8]).any()
    assert not made.q.bias[6:8].any()
    negative = torch.full((rows, 4), -1e-200, dtype=torch.float64)
    assert torch.equal(made(negative)[1], model(negative)[1])


def test_a_name_that_something_else_uses_is_left_to_it():
    made, report = rewritten(attention(after=["v = v + self.q(x * 2).sum()"]))
    assert chain_of(report) == "(q | k | v) became q_1"
    assert made.q.out_features == 6


def test_groups_of_the_same_modules_share_one_new_module():
    again = ["y = x * 2", *(f"{each}2 = self.{each}(y)" for each in "qkv")]
    made, report = rewritten(
        attention(after=again, returned="F.relu(q), k * v2.sum(), v + k2.sum(), q2.sum()"),
        applied=2,
    )
    assert len(list(made.children())) == 1
    assert {each.became for each in report.applied} == {"q"}


def test_values_of_the_graph_are_recorded_for_what_is_made():
    made, _ = rewritten(attention(), example_inputs=x)
    shapes = {n.name: tuple(n.meta["val"].shape) for n in made.graph.nodes if n.op != "output" and
              isinstance(n.meta.get("val"), torch.Tensor)}  # fmt: skip
    assert shapes["q"] == (2, 5, 11)
    strides = [n.meta["val"].stride() for n in made.graph.nodes if n.name.startswith("getitem")]
    assert strides == [(55, 11, 1)] * 3


def test_two_groups_of_one_value_by_what_they_have_in_common():
    half = {"a": nn.Linear(4, 2), "b": nn.Linear(4, 3)}
    for layer in half.values():
        layer.requires_grad_(False)
    model = attention(
        after=["a, b = self.a(x), self.b(x)"],
        returned="F.relu(q), k * 2, v * 2, a * 2, b * 2",
        **half,
    )
    _, report = rewritten(model, applied=2)
    assert [" | ".join(to for _, to in each.steps) for each in report.applied] == [
        "q | k | v",
        "a | b",
    ]


# Which siblings are left out.


def left_out(model, name="k", **options):
    """Why one of three stays, while the two others become one."""
    _, report = rewritten(model, **options)
    others = [each for each in "qkv" if each != name]
    assert [to for _, to in report.applied[0].steps] == others
    return reason(report, name)


def test_a_sibling_with_a_hook():
    model = attention()
    model.k.register_forward_hook(lambda *_: None)
    assert left_out(model).startswith("k carries a forward hook")


def test_a_sibling_in_training_mode():
    model = attention()
    model.v.train()
    assert "training mode" in left_out(model, "v")


def test_the_first_sibling_in_training_mode():
    model = attention()
    model.q.train()
    assert "training mode" in left_out(model, "q")


def test_a_sibling_of_a_subclass_that_behaves_otherwise():
    class Twice(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    assert "whose forward is not that of Linear" in left_out(attention(k=Twice(4, 2)))


def test_a_sibling_whose_weight_the_forward_writes_to():
    model = attention(before=["self.k.weight.mul_(1.0)"]).requires_grad_(False)
    assert "writes to in its forward" in left_out(model)


def test_a_sibling_of_another_kind_is_told_what_it_has_otherwise():
    model = attention()
    model.k.requires_grad_(False)
    assert left_out(model) == (
        "q (Linear), which reads the same value, differs in requires_grad: True, and here False"
    )


def test_a_layer_that_is_called_twice_on_one_value_is_there_once():
    _, report = rewritten(attention(after=["v = v + self.q(x).sum()"]))
    assert "q (Linear) is called twice on one value" in str(report)


@pytest.mark.parametrize(
    ("returned", "expected"),
    [
        ("F.relu(q), k, v.sum()", "its output is returned, and the caller could tell"),
        ("F.relu(q), k.transpose(0, 1), v.sum()", "a view of its output, transpose, is returned"),
        ("F.relu(q), k.contiguous(), v.sum()", "a view of its output, contiguous, is returned"),
        ("F.relu(q), k.relu_() + k, v.sum()", "relu_ (.relu_()) writes in place to its output"),
        ("F.relu(q), k.mul_(2), v.sum()", "mul_ (.mul_()) writes in place to its output"),
        ("F.relu(q), k[0].relu_(), v.sum()", "writes in place to a view of its output, getitem,"),
        ("F.relu(q), k.view(-1), v.sum()", "whether view (.view()) only splits"),
        ("F.relu(q), k.chunk(2, -1)[0] * 2, v.sum()", "its output is split already, by chunk"),
        ("F.relu(q), k.stride(0), v.sum()", "stride (.stride()) might tell"),
        ("F.relu(q), k.is_contiguous(), v.sum()", "is_contiguous (.is_contiguous()) might tell"),
        ("F.relu(q), torch.as_strided(k, (2,), (1,)), v.sum()", "might tell that its output is"),
        ("F.relu(q), self.leaf(k), v.sum()", "leaf (Leaf) might tell"),
        ("F.relu(q), self.hooked(k), v.sum()", "hooked (ReLU) might tell"),
    ],
)  # fmt: skip
def test_a_sibling_whose_reader_could_tell(returned, expected):
    hooked = nn.ReLU()
    hooked.register_forward_hook(lambda *_: None)
    leaf = (
        {"leaf": Leaf()}
        if "leaf" in returned
        else {"hooked": hooked}
        if "hooked" in returned
        else {}
    )
    model = attention(returned=returned, **leaf)
    assert expected in left_out(model, leaf_modules=[Leaf])


@dataclasses.dataclass
class Pair:
    one: object
    two: object


@pytest.mark.parametrize("kind", [OrderedDict, Pair])
def test_an_object_that_is_returned_reads_as_any_other_call(kind):
    """The graph calls its class, which is no module's, on what siblings read and make."""

    def forward(m, x):
        return kind(one=F.relu(m.q(x)) + F.relu(m.k(x)), two=x)

    model = Forward(forward, q=nn.Linear(4, 4), k=nn.Linear(4, 4)).double()
    made, _ = fxr.rewrite(model, merge, expect={"merge": 1})
    found, expected = made(x), model(x)
    assert type(found) is kind
    fields = dict if kind is OrderedDict else vars
    torch.testing.assert_close(fields(found), fields(expected), rtol=0, atol=1e-12)


class Leaf(nn.Module):
    def forward(self, x):
        return x.view(-1) * 2


@pytest.mark.parametrize(
    "read",
    [
        "k * 2", "F.relu(k)", "k.transpose(0, 1) @ torch.ones(2, 2).double()", "k.reshape(-1) + 1",
        "k.contiguous().view(-1) + 1", "k.flatten(1).sum(-1)", "torch.cat([k, k])",
        "k.sum() + k.size(0)", "k[..., :1] * 2", "torch.softmax(k.unsqueeze(0), -1)",
        "self.drop(k) + 1", "k + k.shape[0]",
    ],
)  # fmt: skip
def test_readers_that_go_by_the_numbers_alone(read):
    rewritten(attention(returned=f"F.relu(q), {read}, v * 2", drop=nn.Dropout()))


@pytest.mark.parametrize(
    ("view", "is_fit"),
    [
        ("k.view(2, 5, 1, 2)", True),
        ("k.view(10, 2)", True),
        ("k.view(10, 1, 2)", True),
        ("k.view(x.size(0), x.size(1), -1, 1)", True),
        ("k.view(x.shape[0], x.shape[1], -1)", True),
        ("k.view(x.shape[1], x.shape[0], -1)", False),
        ("k.view(2, 5, -1)", False),
        ("k.view(2, 10)", False),
        ("k.view(-1)", False),
        ("k.view(2, 5, 2).view(20)", False),
    ],
)
def test_a_view_may_split_the_last_dimension_only_and_join_others(view, is_fit):
    model = attention(returned=f"F.relu(q), {view} * 2, v * 2")
    if is_fit:
        _, report = rewritten(model, example_inputs=x)
        assert chain_of(report) == "(q | k | v) became q"
    else:
        assert left_out(model, example_inputs=x).endswith("to be contiguous")


def test_other_numbers_of_what_siblings_read_are_no_sizes():
    model = attention(returned="F.relu(q), k.view(x.stride()[0], x.stride()[1], -1) * 2, v * 2")
    wide = torch.randn(8, 5, 4, dtype=torch.float64)
    assert left_out(model, example_inputs=wide, inputs=wide).endswith("to be contiguous")


@pytest.mark.parametrize(
    ("read", "calmed"),
    [
        ("F.relu(k, inplace=True)", "torch.nn.functional.relu(getitem_1, inplace = False)"),
        ("F.relu(k, True)", "torch.nn.functional.relu(getitem_1, inplace = False)"),
        (
            "F.leaky_relu(k, 0.2, True)",
            "leaky_relu(getitem_1, negative_slope = 0.2, inplace = False)",
        ),
        ("torch.relu_(k)", "torch.relu(getitem_1)"),
        ("k.sigmoid_()", "getitem_1.sigmoid()"),
        ("self.act(k)", "self.act(getitem_1)"),
        ("self.act(self.act(k) + 1)", "self.act_1(getitem_1)"),
    ],
)
def test_an_activation_that_alone_reads_a_sibling_stops_writing_in_place(read, calmed):
    """What it writes is seen by nobody else, so it is returned as it was, in new storage."""
    act = nn.ReLU(inplace=True)
    model = attention(returned=f"F.relu(q), {read}, v.sum()", act=act)
    made, report = rewritten(model)
    assert calmed in made.code
    assert "no longer writes in place" in report.applied[0].notes[0]
    assert layout(made(x)) == layout(model(x))
    assert act.inplace


@pytest.mark.parametrize(
    "act", [nn.CELU(inplace=True), nn.RReLU(inplace=True), nn.Threshold(0.1, 0.0, inplace=True)]
)
def test_any_activation_of_torch_stops_writing_in_place(act):
    """Not only those of which more is known; all have the same flag."""
    model = attention(returned="F.relu(q), self.act(k), v.sum()", act=act).eval()
    made, report = rewritten(model)
    assert report.applied[0].notes == ("act no longer writes in place",)
    assert layout(made(x)) == layout(model(x))


def test_activations_of_an_exported_program_are_calmed_too():
    model = attention(returned="F.relu(q), F.relu(k, inplace=True), v.sum()")
    program = torch.export.export(model, (x,))
    made, _ = fxr.rewrite(program, merge, expect={"merge": 1})
    assert torch.ops.aten.relu_.default not in {n.target for n in made.graph.nodes}
    for one, other in zip(made.module()(x), model(x), strict=True):
        torch.testing.assert_close(one, other)


# Where the new call stands.


def test_a_write_to_what_siblings_read_parts_them():
    model = attention(before=["x.add_(1)"])
    _, report = rewritten(model)
    assert chain_of(report) == "(k | v) became k"
    assert "writes in place to what siblings read, between q (Linear) and" in reason(report, "q")


def test_a_write_through_a_view_parts_them_as_well():
    _, report = rewritten(attention(before=["x[:1].mul_(3)"]))
    assert chain_of(report) == "(k | v) became k"


def test_a_later_write_is_none_of_their_business():
    rewritten(attention(after=["x.add_(1)"], returned="F.relu(q), k * 2, v * 2, x.sum()"))


def test_what_is_read_may_come_right_before_the_first_of_them():
    lines = [
        "y = torch.relu(x)",
        "q = self.q(y)",
        "z = q.sum()",
        "k = self.k(y) * z",
        "return k, q * 2",
    ]
    model = written({"q": nn.Linear(4, 2), "k": nn.Linear(4, 2)}, lines).double()
    rewritten(model)


# What is not a group.


def test_a_layer_alone_is_missed():
    report = fxr.plan(written({"q": nn.Linear(4, 2)}, ["return self.q(x)"]), merge)
    assert str(report.missed[0].reason) == "no other Linear reads the model's input 'x'"


def test_where_only_one_may_change_none_does_and_says_why():
    model = attention(returned="q, k, F.relu(v)")
    report = fxr.plan(model, merge)
    assert not report.applied
    assert reason(report, "v") == (
        "it has no sibling that may change: its output is returned, and the caller could tell the "
        "difference"
    )


def test_a_module_tree_has_no_place_for_a_split():
    report = fxr.plan(attention(), merge, into="modules")
    assert {each.reason for each in report.refused} == {
        "siblings become one call, which the forward would have to split; "
        "into='graph' can rewrite it"
    }


# Other dialects, passes, parts of a rewrite.


def test_functional_calls_are_siblings():
    members = {"w": nn.Parameter(torch.randn(3, 4)), "u": nn.Parameter(torch.randn(2, 4))}
    model = written(members, ["return F.relu(F.linear(x, self.w)), F.linear(x, self.u) * 2"])
    made, report = rewritten(model.double())
    assert len(report.applied) == 1
    assert [n.target for n in made.graph.nodes].count(F.linear) == 1


@pytest.mark.parametrize("decomposed", [False, True])
def test_exported_programs(decomposed):
    flat = x[:, 0]
    program = torch.export.export(attention(), (flat,))
    program = program.run_decompositions() if decomposed else program
    made, _ = fxr.rewrite(program, merge, expect={"merge": 1})
    for one, other in zip(made.module()(flat), program.module()(flat), strict=True):
        torch.testing.assert_close(one, other)
    assert list(made.state_dict) == ["q.weight", "q.bias"]
    assert {type(n.target) for n in made.graph.nodes if "split" in n.name} == {
        torch._ops.OpOverload
    }


@pytest.mark.parametrize(
    ("view", "is_fit"),
    [("k.view(2, 5, -1, 1)", True), ("k.view(5, 2, -1)", False), ("k.view(2, 1, -1, 1)", False)],
)
def test_a_program_keeps_its_sizes_so_numbers_will_do(view, is_fit):
    model = attention(returned=f"F.relu(q), {view} * 2, v * 2")
    program = torch.export.export(model, (x,))
    report = fxr.plan(program, merge)
    assert len(report.applied[0].steps) == (3 if is_fit else 2)


def test_around_a_backend_of_torch_compile():
    model, found = attention(), []

    def inner(module, inputs):
        found.append([n.target for n in module.graph.nodes])
        return module

    compiled = torch.compile(model, backend=fxr.integrations.backend(merge, inner=inner))
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))
        model.k.weight.mul_(2)
        torch.testing.assert_close(compiled(x), model(x))
    assert torch.split_with_sizes in found[0]
    torch._dynamo.reset()


def test_a_wrong_group_is_found():
    @fxr.rule(pattern=Linears)
    def doubled(m):
        sizes = tuple(layer.out_features for layer in m.layers)
        layer = stacked(m.layers, out_features=sum(sizes))
        return fxr.Split(fxr.evolve(layer, weight=layer.weight * 2), sizes)

    found = fxr.Rewriter(doubled).localise(attention(), x)
    assert [str(each.finding).partition(": ")[0] for each in found.guilty] == ["q"]


def test_a_rule_that_waits_leaves_norms_to_be_folded_first():
    convs = {"a": nn.Conv2d(2, 3, 1), "b": nn.Conv2d(2, 3, 1)}
    norms = {"m": nn.BatchNorm2d(3), "n": nn.BatchNorm2d(3)}
    lines = ["return F.relu(self.m(self.a(x))), F.relu(self.n(self.b(x)))"]
    model = written({**convs, **norms}, lines)
    model(torch.randn(4, 2, 5, 5))
    for order in (["conv_bn", "merge_siblings"], ["merge_siblings", "conv_bn"]):
        _, report = fxr.rewrite(model, order, torch.randn(1, 2, 5, 5))
        assert [each.rule for each in report.applied] == ["fold_conv_bn"] * 2 + ["merge_convs"]


# What a rule and a pattern may say.


def test_a_rule_of_a_group_returns_a_split_of_each_sibling():
    @fxr.rule(pattern=Linears)
    def one(m):
        return fxr.Replace(m.layers[0])

    @fxr.rule(pattern=Linears)
    def two(m):
        return fxr.Split(m.layers[0], (1, 2))

    with pytest.raises(RuleError, match="not a Split"):
        fxr.rewrite(attention(), one)
    with pytest.raises(RuleError, match="2 sizes for 3 siblings"):
        fxr.rewrite(attention(), two)


def test_a_split_is_for_siblings():
    @fxr.rule(pattern=fxr.chain(act=nn.Linear))
    def wrong(m):
        return fxr.Split(m.act, (1,))

    with pytest.raises(RuleError, match="not a Replace or Revise or Call or Bypass"):
        fxr.rewrite(attention(), wrong)


def test_what_a_group_may_not_be():
    with pytest.raises(PatternError, match="is the only step of its pattern"):

        @fxr.pattern
        class Two:
            act: nn.ReLU
            layers: fxr.Siblings[nn.Linear] = fxr.siblings(dim=-1)

    with pytest.raises(PatternError, match="a group is declared"):

        @fxr.pattern
        class Bare:
            layers: fxr.Siblings[nn.Linear]

    with pytest.raises(PatternError, match=r"expected a subclass of nn\.Module"):

        @fxr.pattern
        class Odd:
            layers: fxr.Siblings[int] = fxr.siblings(dim=-1)


@pytest.mark.slow
def test_any_model_with_siblings():
    check_rule([merge, convs])


@pytest.mark.slow
@given(models_around(Linears), st.booleans())
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_what_is_returned_lies_in_memory_as_it_did(case, shapes):
    """Of no output the strides or the outputs that share its storage change."""
    try:
        made, report = fxr.rewrite(case.model, merge, case.args if shapes else None)
    except fxr.errors.TraceError:
        return
    if report.applied:
        with torch.no_grad():
            assert layout(made(*copied(case.args))) == layout(case.model(*copied(case.args)))


def copied(args):
    return tuple(each.clone() for each in args)


def layout(outputs):
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    storages = [each.untyped_storage().data_ptr() for each in outputs]
    return [
        (each.is_contiguous(), storages.index(at), each.untyped_storage().nbytes())
        for each, at in zip(outputs, storages, strict=True)
    ]


def test_gradients_flow_as_they_did():
    model = attention(returned="(F.relu(q).sum() + (k * v.sum()).sum(),)")
    made, _ = fxr.rewrite(model, merge, expect={"merge": 1})
    given = [x.clone().requires_grad_() for _ in range(2)]
    for run, each in zip((model, made), given, strict=True):
        run(each)[0].backward()
    torch.testing.assert_close(given[0].grad, given[1].grad)
    parts = made.q.weight.grad.split([6, 2, 3])
    for name, part in zip("qkv", parts, strict=True):
        torch.testing.assert_close(part, model.get_submodule(name).weight.grad)


def test_the_result_is_scripted_exported_saved_and_loaded(tmp_path):
    def build():
        return nets.Attention().double().eval()

    model = build()
    made, report = rewritten(model)
    for again in (
        torch.jit.script(made),
        torch.export.export(made, (x,)).module(),
        fxr.Rewriter(merge).load(build, made.state_dict(), report.to_json()),
    ):
        torch.testing.assert_close(again(x), model(x))


def test_in_a_graph_of_operators_all_that_is_made_is_operators():
    model = attention()
    module, expected = torch.export.export(model, (x,)).module(), model(x)
    fxr.integrations.inductor_pass(merge)(module.graph)
    module.recompile()
    calls = [n.target for n in module.graph.nodes if n.op == "call_function"]
    assert torch.ops.aten.split_with_sizes.default in calls
    assert all(isinstance(n, torch._ops.OpOverload) or n is operator.getitem for n in calls)
    for one, other in zip(module(x), expected, strict=True):
        torch.testing.assert_close(one, other)
