"""Models with parts that rewriters trip over: each ends right, or untouched and with a reason."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import checks
import nets
import pytest
import torch
from nets import X, bn, conv, conv_bn
from torch import nn
from torch.nn.modules import module as nn_module

import fxrewrite as fxr


def test_the_end_of_a_tie_is_noted() -> None:
    """A folded weight is no longer tied to the module that shared it, and the report says so."""
    model = conv_bn(lambda m, x: m.bn(m.conv(x)) + m.tied(x), tied=conv())
    model.tied.weight = model.conv.weight
    _, report = checks.folded(model, X, applied=1)
    assert report.applied[0].notes == ("the tie of conv.weight and tied.weight ends here",)


class TiedEnds(nn.Module):
    """A language model in small: the output layer has the weight of the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.conv, self.bn = nn.Embedding(7, 4), nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4)
        self.out = nn.Linear(4, 7, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.out(self.bn(self.conv(self.embed(tokens).transpose(1, 2))).transpose(1, 2))


def test_a_tie_between_what_is_untouched_stays() -> None:
    """Embedding and output layer hold one parameter before and after."""
    model = nets.randomise(TiedEnds()).double()
    tokens = torch.arange(6).view(2, 3)
    expected = [model(tokens)]
    fused, report = fxr.rewrite(model, "conv_bn", expect={"conv_bn": 1})
    assert fused.get_parameter("out.weight") is fused.get_parameter("embed.weight")
    assert not report.applied[0].notes
    assert checks.largest_error(expected, [fused(tokens)]) <= 1e-9


GLOBAL_HOOKS: list[Callable[[], Any]] = [
    lambda: nn_module.register_module_forward_pre_hook(lambda m, args: None),
    lambda: nn_module.register_module_full_backward_hook(lambda m, i, o: None),
    lambda: nn_module.register_module_full_backward_pre_hook(lambda m, o: None),
]


@pytest.mark.parametrize("register", GLOBAL_HOOKS, ids=["pre", "backward", "backward pre"])
def test_a_hook_on_all_modules_of_any_kind(register: Callable[[], Any]) -> None:
    """While any kind of hook is registered for all modules, nothing is folded."""
    model = conv_bn()
    handle = register()
    try:
        report = fxr.plan(model, "conv_bn")
    finally:
        handle.remove()
    assert "a global module hook is registered" in report.why("bn")
    assert fxr.plan(model, "conv_bn").applied


class Labelled(torch.Tensor):
    """A tensor subclass that lives on through torch's functions."""


def test_an_input_of_a_tensor_subclass() -> None:
    """What `__torch_function__` makes of the input's type, it makes of it afterwards too."""
    model = conv_bn().double()
    expected = [model(X)]
    fused = fxr.fuse(model)
    x = X.as_subclass(Labelled)
    assert type(fused(x)) is type(model(x)) is Labelled
    assert checks.largest_error(expected, [fused(X)]) <= 1e-9


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_quantised_modules_are_left_alone() -> None:
    """A quantised layer is no anchor and no step; what is beside it is folded."""
    quantised = torch.ao.nn.quantized.dynamic.Linear(5, 5)
    model = conv_bn(lambda m, x: m.q(m.bn(m.conv(x))), q=quantised)
    x = X.float()
    expected = checks.outputs(model, x)
    fused, _ = fxr.rewrite(model, "conv_bn", expect={"conv_bn": 1})
    assert fused.get_submodule("q") is quantised
    assert checks.largest_error(expected, checks.outputs(fused, x)) <= 1e-5


def test_a_convolution_in_quantisation_aware_training_is_refused() -> None:
    """Its weight passes a fake quantiser, so the type's forward is not that of a convolution."""
    model = conv_bn()
    model.conv.qconfig = torch.ao.quantization.get_default_qat_qconfig("fbgemm")
    model.conv = torch.ao.nn.qat.Conv2d.from_float(model.conv).eval()
    report = fxr.plan(model, "conv_bn")
    assert "conv is a Conv2d, whose forward is not that of Conv2d" in report.why("bn")


def test_a_model_made_under_inference_mode() -> None:
    """Inference tensors are folded as others are, and what is made of them can learn."""
    with torch.inference_mode():
        model = conv_bn().double()
        expected = [model(X)]
    fused, _ = fxr.rewrite(model, "conv_bn", expect={"conv_bn": 1})
    assert not any(each.is_inference() for each in fused.parameters())
    with torch.inference_mode():
        assert checks.largest_error(expected, [fused(X)]) <= 1e-9


@pytest.mark.parametrize("name", ["running_mean", "weight"])
def test_a_tensor_on_another_device(name: str) -> None:
    """A chain whose tensors are on several devices is refused, and the reason names them."""
    model = conv_bn()
    held = getattr(model.bn, name)
    setattr(model.bn, name, nn.Parameter(held.to("meta")) if name == "weight" else held.to("meta"))
    assert "their tensors are on cpu and meta" in fxr.plan(model, "conv_bn").why("bn")


def test_a_result_that_nothing_reads() -> None:
    """A dead chain is rewritten like any other, and the output stays."""
    model = conv_bn(lambda m, x: (m.bn(m.conv(x)), x + 1.0)[1])
    checks.folded(model, X, applied=1)


def test_a_part_of_a_value_that_is_read_through_an_attribute() -> None:
    """A read of a module's attribute deep in the tree counts as a use of that module."""

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        return m.bn(m.conv(x)) * m.conv.weight.mean() + m.inner[0].running_mean.sum()

    model = conv_bn(forward, inner=nn.ModuleList([bn()]))
    weight = copy.deepcopy(model.conv.weight)
    fused, _ = checks.folded(model, X, applied=1)
    assert torch.equal(fused.get_parameter("conv.weight"), weight)
