"""A rewritten model is loaded back without the original weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nets
import pytest
import safetensors.torch
import torch
from torch import nn

import fxrewrite as fxr

X = nets.X.float()


def as_state_dict(model: nn.Module, folder: Path) -> Any:
    return model.state_dict()


def as_torch_file(model: nn.Module, folder: Path) -> Any:
    torch.save(model.state_dict(), folder / "model.pt")
    return folder / "model.pt"


def as_safetensors_file(model: nn.Module, folder: Path) -> Any:
    """Safetensors keeps one name of tensors that share storage."""
    safetensors.torch.save_model(model, str(folder / "model.safetensors"))
    return str(folder / "model.safetensors")


SAVED = [as_state_dict, as_torch_file, as_safetensors_file]


@pytest.mark.parametrize("save", SAVED)
def test_it_is_loaded_back_without_the_original_weights(
    into: Any, save: Callable[[nn.Module, Path], Any], tmp_path: Path
) -> None:
    """The same to the bit, with nothing on the meta device and ties kept; it can be trained."""
    fused, report = fxr.rewrite(nets.tied(), "conv_bn", into=into)
    again = fxr.Rewriter("conv_bn", into=into).load(
        nets.Tied, save(fused, tmp_path), report.to_json()
    )
    assert type(again).__name__ == type(fused).__name__
    assert torch.equal(again(X), fused(X))
    assert again.state_dict().keys() == fused.state_dict().keys()
    assert again.tied.weight is again.head.weight
    assert not again.training
    again(X).sum().backward()
    assert all(parameter.grad is not None for parameter in again.parameters())


def test_loading_needs_no_weights_where_the_state_dict_has_all(into: Any) -> None:
    """The architecture is built on the meta device, and no second time."""
    devices = []

    def build() -> nn.Module:
        made = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
        devices.append(made[0].weight.device.type)
        return made

    model = nets.randomise(build()).half()
    fused, report = fxr.rewrite(model, "conv_bn", into=into)
    devices.clear()
    again = fxr.Rewriter("conv_bn", into=into).load(build, fused.state_dict(), report)
    assert devices == ["meta"]
    weights = [each.get_parameter("0.weight") for each in (again, fused)]
    assert torch.equal(*weights)
    assert weights[0].dtype == torch.float16


def test_a_builder_that_needs_numbers_is_given_them(into: Any) -> None:
    """A model that can't be built on the meta device is built with weights of its own."""

    def build() -> nn.Module:
        conv = nn.Conv2d(4, 4, 1)
        nn.init.constant_(conv.weight, conv.bias.sum().item())
        return nn.Sequential(conv, nn.BatchNorm2d(4))

    fused, report = fxr.rewrite(nets.randomise(build()).float(), "conv_bn", into=into)
    again = fxr.Rewriter("conv_bn", into=into).load(build, fused.state_dict(), report)
    assert torch.equal(again(X), fused(X))


class Fewer(nets.Tied):
    """The same keys after a rewrite, but a batch norm that is read twice."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + self.conv(x).mean()


def test_another_rewrite_than_the_saved_one_is_an_error(into: Any) -> None:
    """What differs is named: rules, sites with the reason, keys, shapes, a file that is none."""
    fused, report = fxr.rewrite(nets.tied(), "conv_bn", into=into)
    state = fused.state_dict()

    def refused(
        match: str, build: Any = nets.Tied, rules: Any = "conv_bn", state: Any = state
    ) -> None:
        with pytest.raises(fxr.errors.LoadError, match=match):
            fxr.Rewriter(rules, into=into).load(build, state, report.to_json())

    refused("norm: fold_conv_bn made conv of conv -> norm when it was saved, and now is", Fewer)
    other = fxr.RuleSet("other", fxr.get_rule_set("conv_bn").rules)
    refused("the rules was .*conv_bn.* when the model was saved, not .*other", rules=other)
    refused('Missing key.*"conv.bias"', state={k: v for k, v in state.items() if k != "conv.bias"})
    refused("Unexpected key.*more", state={**state, "more": X})
    refused("size mismatch for conv.bias", state={**state, "conv.bias": torch.ones(3)})
    refused("there is no weights file", state="nowhere.safetensors")
    assert fxr.Rewriter("conv_bn", into=into).load(nets.Tied, state)(X).shape == (2, 4)


def test_a_tensor_that_nothing_gives_is_not_left_without_numbers() -> None:
    """Where even the builder has a plain tensor on the meta device, that is an error."""

    def build() -> nn.Module:
        model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
        model.register_buffer("lost", torch.ones(1, device="meta"), persistent=False)
        return model

    fused = fxr.fuse(build().eval(), into="modules")
    with pytest.raises(fxr.errors.LoadError, match="gives the tensor lost"):
        fxr.Rewriter("conv_bn", into="modules").load(build, fused.state_dict())
