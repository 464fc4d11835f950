"""Values that a pattern captures: their shapes, and what a rule may do with them."""

import operator
import subprocess
import sys

import pytest
import torch
from torch import nn

import fxrewrite as fxr

X = torch.linspace(-1, 1, 6).view(2, 3)


@fxr.pattern
class Around:
    before: fxr.Value
    linear: nn.Linear
    between: fxr.Value
    drop: nn.Dropout | None
    relu: nn.ReLU
    after: fxr.Value


def seen(model, *example_inputs, pattern=Around):
    found = []
    look = fxr.rule(pattern=pattern, where=[lambda m: found.append(m) or "only looking"])
    fxr.plan(model.eval(), look(lambda m: fxr.Bypass()), *example_inputs)
    return found


def chain(*layers):
    return nn.Sequential(nn.Linear(3, 4), *layers, nn.ReLU())


@pytest.mark.parametrize("layers", [(), (nn.Dropout(),)])
def test_a_value_field_is_what_flows_where_it_stands(layers):
    (match,) = seen(chain(*layers), X)
    values = (match.before, match.between, match.after)
    assert [value.name for value in values] == ["input_1", "_0", "_2" if layers else "_1"]
    assert [value.shape for value in values] == [(2, 3), (2, 4), (2, 4)]
    assert {value.dtype for value in values} == {torch.float32}


@torch.fx.wrap
def rolled(x, shifts):
    """A function that writes to the list that it is given, as some windowed attentions do."""
    shifts[0] = 0
    return torch.roll(x, shifts, (0, 1))


def test_a_function_of_the_model_may_write_to_a_list_of_its_call():
    """The code of a graph gives it a new list each time, and so does looking for shapes."""

    class Rolling(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.relu = nn.Linear(3, 4), nn.ReLU()

        def forward(self, x):
            return self.relu(self.linear(rolled(x, [1, 1])))

    (match,) = seen(Rolling(), X)
    assert match.between.shape == (2, 4)


def test_without_example_inputs_shapes_are_not_known():
    (match,) = seen(chain())
    assert (match.before.shape, match.after.dtype) == (None, None)


def test_side_inputs_have_shapes_too():
    class Add(nn.Module):
        def forward(self, x, y):
            return torch.relu(x) + y

    pattern = fxr.chain(relu=fxr.call(torch.relu), add=fxr.call(operator.add))
    (match,) = seen(Add(), (X, X[:1].double()), pattern=pattern)
    assert match.add.kwargs["other"].shape == (1, 3)
    assert match.add.kwargs["other"].dtype == torch.float64


@pytest.mark.parametrize("given", [X, (X,), [X]], ids=["tensor", "tuple", "list"])
def test_example_inputs_are_a_tensor_or_the_arguments(given):
    assert seen(chain(), given)[0].before.shape == (2, 3)


def test_shapes_are_known_up_to_a_value_that_only_data_decides():
    class Dynamic(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = chain(), chain()

        def forward(self, x):
            y = self.first(x)
            return self.second(x[y.sum(-1) > 0])

    first, second = seen(Dynamic(), X)
    assert (first.after.shape, first.after.rank) == ((2, 4), 2)
    assert (second.after.shape, second.after.rank) == (None, 2)
    assert second.after.dtype == torch.float32


@pytest.mark.parametrize(
    ("guard", "given", "data_dependent", "reason"),
    [
        (fxr.known_rank, None, False, "the rank of x is not known; example_inputs would decide it"),
        (fxr.known_shape, None, False, "the shape of x is not known; example_inputs would decide"),
        (fxr.known_shape, X, True, "the shape of getitem is not known, since it depends on data"),
        (fxr.known_rank, X, True, None),
        (fxr.known_shape, X, False, None),
    ],
)
def test_guards_that_need_a_shape_say_what_would_decide_it(guard, given, data_dependent, reason):
    class Relu(nn.Module):
        def forward(self, x):
            return torch.relu(x[x.sum(-1) > 0] if data_dependent else x).sin()

    @fxr.pattern
    class Act:
        before: fxr.Value
        act: fxr.Call = fxr.call(torch.relu)

    needy = fxr.rule(pattern=Act, where=[guard("before")], name="needy")(lambda m: fxr.Bypass())
    (finding,) = fxr.plan(Relu(), needy, given).findings
    assert finding.outcome == ("refused" if reason else "applied")
    assert finding.reason.startswith(reason or "")


def test_looking_for_shapes_computes_nothing_runs_no_hook_and_changes_nothing():
    ran = []
    model = nn.Sequential(chain(), nn.BatchNorm1d(4))
    model[1].register_forward_hook(lambda *a: ran.append("hook"))
    model.register_forward_pre_hook(lambda *a: ran.append("root"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train()
    fxr.plan(model, fxr.rule(pattern=Around, any_mode=True)(lambda m: fxr.Bypass()), X)
    assert ran == []
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    assert model[1].weight.grad is None


@pytest.mark.parametrize(
    "given", [X[:, :2], "text", {"other": X}, (), (X, X)], ids=["shape", "str", "dict", "0", "2"]
)
def test_inputs_that_the_model_does_not_take_are_an_error_that_says_so(given):
    """In the model's own words."""
    said = "the model does not take the input .*: (RuntimeError|TypeError): "
    with pytest.raises(fxr.errors.InputError, match=said):
        seen(chain(), given)


def rewrite_chain(answer):
    rule = fxr.rule(pattern=Around, name="misusing")(answer)
    return fxr.rewrite(nn.Sequential(chain(), nn.Linear(4, 3), chain()).eval(), rule)


class Second(nn.Module):
    def forward(self, x, y):
        return y


MISUSED = {
    "Call of between": lambda m: fxr.Call(torch.add, m.between),
    "Call of after": lambda m: fxr.Call(torch.add, m.after),
    "Replace with between": lambda m: fxr.Replace(Second(), inputs=(m.between,)),
    "Replace with after": lambda m: fxr.Replace(Second(), inputs=(m.after,)),
}


@pytest.mark.parametrize("how", MISUSED)
def test_a_value_that_goes_with_its_chain_can_not_be_read_by_what_replaces_it(how):
    with pytest.raises(fxr.errors.RuleError, match="rule 'misusing'"):
        rewrite_chain(MISUSED[how])


def test_a_value_of_an_earlier_site_can_not_be_read_when_it_is_gone():
    values = []

    def read_the_first(m):
        values.append(m.between)
        return fxr.Bypass() if len(values) == 1 else fxr.Call(torch.add, values[0])

    with pytest.raises(fxr.errors.RuleError, match="rule 'misusing'"):
        rewrite_chain(read_the_first)


def test_the_value_before_the_chain_may_be_read_again():
    rule = fxr.rule(pattern=Around, name="add")(lambda m: fxr.Call(torch.add, m.before))
    rewritten, _ = fxr.rewrite(chain().eval(), rule, expect={"add": 1})
    assert torch.equal(rewritten(X), X + X)


HOLDS = """
import torch, warnings
from torch import nn
import fxrewrite as fxr

warnings.simplefilter("ignore")
class Holds(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("odd", {tensor})

    def forward(self, x):
        return x

rule = fxr.rule(pattern=fxr.chain(a=Holds, b=nn.ReLU))(lambda m: fxr.Replace(m.a))
for held in ("buffer", "list"):
    module = Holds()
    if held == "list":
        module.kept, module.odd = [module.odd], None
    fxr.plan(nn.Sequential(module, nn.ReLU()).eval(), rule)
"""
ODD = {
    "sparse": "torch.eye(3).to_sparse()",
    "sparse CSR": "torch.eye(3).to_sparse_csr()",
    "conjugate": "torch.randn(3, dtype=torch.complex64).conj()",
    "negated": "torch.randn(3, dtype=torch.complex64).conj().imag",
    "quantized": "torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)",
    "nested": "torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])",
    "float8": "torch.ones(3).to(torch.float8_e4m3fn)",
    "expanded": "torch.ones(1).expand(3)",
    "bool": "torch.ones(3, dtype=torch.bool)",
    "empty": "torch.zeros(0)",
    "scalar": "torch.tensor(1.0)",
    "meta": "torch.ones(3, device='meta')",
}


@pytest.mark.parametrize("kind", [each for each in ODD if each != "quantized"])
def test_a_module_may_hold_tensors_of_any_kind(kind):
    exec(HOLDS.format(tensor=ODD[kind]), {})


@pytest.mark.slow
def test_a_module_may_hold_quantized_tensors():
    """In a process of its own: torch crashes when it is asked for the bytes of one."""
    program = HOLDS.format(tensor=ODD["quantized"])
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
