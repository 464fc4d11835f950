"""Modules and tensors that are not quite what they seem, and what a forward does to them."""

from __future__ import annotations

import copy
from typing import Any

import checks
import nets
import pytest
import torch
from nets import Forward, X, bn, conv, conv_bn
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import fxrewrite as fxr


class SameConv(nn.Conv2d):
    """Overrides nothing of what a convolution does."""

    def __init__(self) -> None:
        super().__init__(4, 4, 1)

    def extra_repr(self) -> str:
        return "the same"

    def fan_in(self) -> int:
        return self.weight[0].numel()


class OtherForward(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2


class OtherConvForward(nn.Conv2d):
    def _conv_forward(self, x: torch.Tensor, *args: Any) -> torch.Tensor:
        return super()._conv_forward(x, *args) * 2


class AnotherBatchNorm(nn.BatchNorm2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).relu()


def test_a_subclass_that_overrides_nothing() -> None:
    """A subclass that behaves as its base is folded, and stays of its class."""
    fused, _ = checks.folded(conv_bn(conv=SameConv()), X, applied=1)
    assert type(fused.get_submodule("conv")) is SameConv


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ({"conv": OtherForward(4, 4, 1)}, "is a OtherForward, whose forward is not that of Conv2d"),
        ({"conv": OtherConvForward(4, 4, 1)}, "whose _conv_forward is not that of Conv2d"),
        ({"bn": AnotherBatchNorm(4)}, "whose forward is not that of BatchNorm2d"),
    ],
)
def test_a_subclass_that_overrides(members: dict[str, nn.Module], words: str) -> None:
    """A subclass that behaves otherwise is refused, and the reason says in what."""
    _, report = checks.folded(conv_bn(**members), X, applied=0)
    assert words in report.why("bn")


@pytest.mark.parametrize("name", ["conv", "bn"])
def test_a_forward_set_on_the_instance(name: str) -> None:
    """A module whose instance has a forward of its own is refused."""
    model = conv_bn().double()
    module = model.get_submodule(name)
    module.forward = lambda x: x * 2
    fused, report = fxr.rewrite(model, "conv_bn", expect={"conv_bn": 0})
    assert f"{name} has a forward of its own, set on the instance" in report.why("bn")
    assert torch.equal(fused(X), model(X))


@pytest.mark.parametrize(
    "wrap",
    [parametrizations.weight_norm, parametrizations.spectral_norm, parametrizations.orthogonal],
)
def test_a_parametrized_weight_is_baked_in(wrap: Any) -> None:
    """A weight that is computed from others is folded at its present value, and the report says so.

    The model keeps its parametrization; the result has a plain convolution.
    """
    model = conv_bn()
    wrap(model.conv)
    model.double().eval()(X)
    fused, report = checks.folded(model, X, applied=1)
    assert type(fused.get_submodule("conv")) is nn.Conv2d
    assert fused.state_dict().keys() == {"conv.weight", "conv.bias"}
    assert "the parametrized tensors of conv are baked in as they are now" in str(report)
    assert report.applied[0].notes


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("wrap", [nn.utils.weight_norm, nn.utils.spectral_norm])
def test_a_weight_norm_of_the_old_kind(wrap: Any) -> None:
    """The older norms, which set the weight in a hook before each call, are baked in as well."""
    model = conv_bn()
    wrap(model.conv)
    with torch.no_grad():  # a weight with a history can't be copied
        model.double().train()(X)
    model.eval()
    fused, report = checks.folded(model, X, applied=1)
    assert type(fused.get_submodule("conv")) is nn.Conv2d
    assert not checks.has_hook(fused.get_submodule("conv"))
    assert fused.state_dict().keys() == {"conv.weight", "conv.bias"}
    assert "the parametrized tensors of conv are baked in as they are now" in str(report)


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_a_hook_beside_an_old_weight_norm() -> None:
    """A weight norm excuses no other hook of the module."""
    model = conv_bn()
    nn.utils.weight_norm(model.conv)
    with torch.no_grad():
        model.double()(X)
    model.conv.register_forward_pre_hook(nets.halve_input)
    _, report = checks.folded(model, X, applied=0)
    assert "conv carries a forward pre hook" in report.why("bn")


@pytest.mark.parametrize("register", ["register_hook", "register_post_accumulate_grad_hook"])
@pytest.mark.parametrize("name", ["conv", "bn"])
def test_a_hook_on_a_parameter(name: str, register: str) -> None:
    """A tensor with a hook of its own is not replaced, for the hook would see no gradients."""
    model = conv_bn()
    getattr(model.get_submodule(name).weight, register)(lambda gradient: None)
    _, report = checks.folded(model, X, applied=0)
    assert f"{name} holds weight, a tensor with a hook" in report.why("bn")


def test_a_hook_behind_a_step_that_is_no_module() -> None:
    """A step that calls a function has no state, and the modules after it are looked at still."""
    model = Forward(lambda m, x: m.conv(x * 2.0), conv=conv()).eval()
    assert len(fxr.plan(model, "affine", X.float()).applied) == 1
    model.conv.register_forward_hook(lambda module, args, output: output * 2)
    assert "conv carries a forward hook" in fxr.plan(model, "affine", X.float()).why("conv")


class Negated(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return -x


@pytest.mark.parametrize("name", ["weight", "bias", "running_mean"])
def test_a_parametrized_batch_norm(name: str) -> None:
    """The same holds for tensors of the batch norm, parameters and buffers."""
    model = conv_bn()
    parametrize.register_parametrization(model.bn, name, Negated())
    model.eval()  # the parametrization comes in training mode
    _, report = checks.folded(model, X, applied=1)
    assert "the parametrized tensors of bn are baked in as they are now" in report.why("bn")


def test_a_spectral_norm_in_training_mode_is_refused() -> None:
    """In training mode a spectral norm changes at each call, so there is no value to bake in."""
    model = conv_bn()
    parametrizations.spectral_norm(model.conv)
    model.double().eval().conv.train()
    expected = checks.outputs(copy.deepcopy(model), X)
    fused, report = fxr.rewrite(model, "conv_bn", expect={"conv_bn": 0})
    assert "in training mode" in report.why("bn")
    assert checks.largest_error(expected, checks.outputs(fused, X)) <= 1e-9


def test_lazy_modules() -> None:
    """A lazy convolution is refused until a first call has made it a plain one."""
    model = nn.Sequential(nn.LazyConv2d(4, 1), nn.BatchNorm2d(4)).eval()
    assert "not initialised yet; run the model once" in fxr.plan(model, "conv_bn").why("1")
    model(X.float())
    checks.folded(nets.randomise(model), X, applied=1)


class Tagged(torch.Tensor):
    """A tensor subclass."""


@pytest.mark.parametrize(("name", "tensor"), [("conv", "weight"), ("bn", "running_var")])
def test_a_tensor_subclass_is_refused(name: str, tensor: str) -> None:
    """What a tensor subclass computes is its own business, so its module stays."""
    model = conv_bn().double()
    module = model.get_submodule(name)
    special = getattr(module, tensor).detach().as_subclass(Tagged)
    setattr(module, tensor, nn.Parameter(special) if tensor == "weight" else special)
    fused, report = fxr.rewrite(model, "conv_bn", expect={"conv_bn": 0})
    assert f"{name} holds {tensor}, a tensor of the subclass Tagged" in report.why("bn")
    assert torch.equal(fused(X), model(X))


@pytest.mark.parametrize(
    ("forward", "what"),
    [
        (lambda m, x: (m.bn.running_mean.add_(1.0), m.bn(m.conv(x)))[-1], "bn holds running_mean"),
        (
            lambda m, x: (y := m.bn(m.conv(x)), m.bn.running_var.mul_(2.0), y)[-1],
            "bn holds running_var",
        ),
        (lambda m, x: (m.conv.weight.data.mul_(2.0), m.bn(m.conv(x)))[-1], "conv holds weight"),
        (lambda m, x: (m.conv.bias[:2].detach().zero_(), m.bn(m.conv(x)))[-1], "conv holds bias"),
    ],
    ids=["buffer before", "buffer behind", "data of a weight", "part of a bias"],
)
def test_a_forward_that_writes_to_its_modules(forward: Any, what: str) -> None:
    """A tensor that the forward writes to is no constant: refused, on the first and next calls."""
    model = Forward(forward, conv=conv(), bn=bn()).double()
    twin = copy.deepcopy(model)
    before = checks.Record(model)
    fused, report = fxr.rewrite(model, "conv_bn", expect={"conv_bn": 0})
    before.assert_unchanged()
    assert f"{what}, which the model writes to in its forward" in report.why("bn")
    for _ in range(3):
        assert torch.equal(fused(X), twin(X))


class Counting(nn.Module):
    """Counts its calls in a buffer, and has a tensor constant in its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = conv(), bn()
        self.register_buffer("calls", torch.zeros((), dtype=torch.float64))
        self.register_buffer("scale", torch.tensor(3.0, dtype=torch.float64), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.add_(1.0)
        y = self.bn(self.conv(x)) * self.scale + torch.tensor([0.5], dtype=torch.float64)
        return y + self.calls


def test_buffers_and_constants() -> None:
    """Buffers are read and written as before, constants are kept, and the model is left as it was.

    A buffer that is not saved is not saved of the result either, nor is a tensor constant.
    """
    model = nets.randomise(Counting())
    fused, _ = checks.folded(model, X, applied=1)
    assert not [name for name in vars(model) if name.startswith("_tensor_constant")]
    assert fused.state_dict().keys() == {"conv.weight", "conv.bias", "calls"}
    assert fused.get_buffer("scale") is model.scale
    assert fused.get_buffer("calls") is model.calls
    assert [round(float(model.calls)) for _ in range(2) if fused(X) is not None] == [2, 3]


def test_a_buffer_that_the_forward_replaces() -> None:
    """A forward that sets an attribute can't be a graph: the error says which, nothing changed."""

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        m.bn.running_mean = m.bn.running_mean + 1.0
        return m.bn(m.conv(x))

    model = Forward(forward, conv=conv(), bn=bn())
    before = checks.Record(model)
    with pytest.raises(fxr.errors.TraceError, match=r"changed bn\.running_mean"):
        fxr.fuse(model, into="graph")
    before.assert_unchanged()


def test_a_layer_in_training_mode_needs_something_with_a_mode_that_is_in_eval_mode() -> None:
    """Otherwise nobody says that its weights are not to be trained."""
    linear, norm = nn.Linear(4, 4), nn.BatchNorm1d(4).eval()
    both = nn.Sequential(nn.Linear(4, 4).eval(), nn.Linear(4, 4))
    report = fxr.plan(both, "affine", torch.ones(2, 4))
    assert "1 is in training mode" in report.why("1")
    frozen = nn.Sequential(linear, norm)
    assert fxr.plan(frozen, "affine", torch.ones(2, 4)).applied
    assert not fxr.plan(frozen.train(), "affine", torch.ones(2, 4)).applied
