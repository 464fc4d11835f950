"""What a rewrite gives, a graph or the user's own modules, is still a model like any other."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import checks
import nets
import pytest
import safetensors.torch
import torch
from onnx.reference import ReferenceEvaluator
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fxrewrite as fxr


class Net(nn.Module):
    """Batch norms that are folded, one that stays, tied weights, and what no state dict holds."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.GELU())
        self.conv = nn.Conv2d(4, 4, 1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.stays = nn.BatchNorm2d(4)
        self.head, self.tied = nn.Linear(4, 4), nn.Linear(4, 4)
        self.tied.weight = self.head.weight
        self.register_buffer("scale", torch.full((4,), 0.5), persistent=False)
        self.register_buffer("offset", torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stays(self.norm(self.conv(self.stem(x))).tanh())
        x = x.mean((2, 3)) * self.scale + self.offset + torch.tensor(0.25)
        return self.tied(self.head(x))


def randomised() -> nn.Module:
    net = nets.randomise(Net())
    net.offset.fill_(3.0)
    return net.float()


@pytest.fixture(params=["graph", "modules"])
def into(request: pytest.FixtureRequest) -> Any:
    return request.param


X = nets.X.float()


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_it_can_be_fine_tuned(into: Any) -> None:
    """In training mode gradients reach the folded weights, and a step changes what it gives."""
    model = randomised()
    original = copy.deepcopy(model.state_dict())
    fused, report = fxr.rewrite(model, "conv_bn", into=into)
    assert len(report.applied) == 2
    fused.train()
    assert all(module.training for module in fused.modules())
    optimiser = torch.optim.SGD(fused.parameters(), lr=0.1)
    before = checks.outputs(fused.eval(), X)[0]
    fused.train()(X).square().mean().backward()
    for name, parameter in fused.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    optimiser.step()
    assert not torch.allclose(checks.outputs(fused.eval(), X)[0], before)
    for name in ("stem.0.weight", "stem.1.weight", "conv.weight", "norm.running_mean"):
        assert torch.equal(model.state_dict()[name], original[name])


def test_it_compiles(into: Any) -> None:
    """torch.compile takes it as a whole, without a graph break."""
    model = randomised()
    fused = fxr.fuse(model, into=into)
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    close(compiled(X), model(X))


def test_it_scripts_where_the_original_does(into: Any) -> None:
    """So does torch.jit.script."""
    model = randomised()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(fxr.fuse(model, into=into))
        torch.jit.script(model)
    close(scripted(X), model(X))


def test_it_is_exported(into: Any) -> None:
    """torch.export gives a program whose state dict has the same keys."""
    model = randomised()
    fused = fxr.fuse(model, into=into)
    program = torch.export.export(fused, (X,))
    close(program.module()(X), model(X))
    saved = {name for name in program.state_dict if not name.startswith("_tensor_constant")}
    assert fused.state_dict().keys() <= saved | {"tied.weight", "head.weight"}


def test_it_goes_to_onnx(into: Any) -> None:
    """ONNX's reference evaluator gives what the model gives, of what the dynamo exporter makes."""
    model = randomised()
    program = torch.onnx.export(fxr.fuse(model, into=into), (X,), dynamo=True, verbose=False)
    assert program is not None
    exported = program.model_proto
    assert sum(node.op_type == "BatchNormalization" for node in exported.graph.node) == 1
    found = ReferenceEvaluator(exported).run(None, {exported.graph.input[0].name: X.numpy()})
    close(torch.from_numpy(found[0]), model(X))


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_it_trains_in_parallel(into: Any) -> None:
    """DataParallel and DistributedDataParallel wrap it, and gradients come through."""
    model = randomised()
    fused = fxr.fuse(model, into=into)
    close(nn.DataParallel(fused)(X), model(X))
    parallel = DistributedDataParallel(fused)
    close(parallel(X), model(X))
    parallel(X).sum().backward()
    assert all(parameter.grad is not None for parameter in fused.parameters())


def test_it_is_copied_and_pickled(into: Any) -> None:
    """A deep copy and a pickle give the same model, to the bit, with tied weights tied."""
    fused = fxr.fuse(randomised(), into=into)
    for again in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert torch.equal(again(X), fused(X))
        assert again.tied.weight is again.head.weight


def test_its_state_dict_goes_round(into: Any) -> None:
    """It loads into another rewrite of the same architecture, strictly."""
    fused, other = (fxr.fuse(each, into=into) for each in (randomised(), Net().eval()))
    assert not torch.allclose(other(X), fused(X))
    other.load_state_dict(fused.state_dict())
    assert torch.equal(other(X), fused(X))


# Loading it back


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
    fused, report = fxr.rewrite(randomised(), "conv_bn", into=into)
    again = fxr.Rewriter("conv_bn", into=into).load(Net, save(fused, tmp_path), report.to_json())
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


class Fewer(Net):
    """The same keys after a rewrite, but a batch norm that is read twice."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + self.conv(x).mean()


def test_another_rewrite_than_the_saved_one_is_an_error(into: Any) -> None:
    """What differs is named: rules, sites with the reason, keys, shapes, a file that is none."""
    fused, report = fxr.rewrite(randomised(), "conv_bn", into=into)
    state = fused.state_dict()

    def refused(match: str, build: Any = Net, rules: Any = "conv_bn", state: Any = state) -> None:
        with pytest.raises(fxr.errors.LoadError, match=match):
            fxr.Rewriter(rules, into=into).load(build, state, report.to_json())

    refused("norm: fold_conv_bn made conv of conv -> norm when it was saved, and now is", Fewer)
    other = fxr.RuleSet("other", fxr.get_rule_set("conv_bn").rules)
    refused("the rules was .*conv_bn.* when the model was saved, not .*other", rules=other)
    refused('Missing key.*"conv.bias"', state={k: v for k, v in state.items() if k != "conv.bias"})
    refused("Unexpected key.*more", state={**state, "more": X})
    refused("size mismatch for conv.bias", state={**state, "conv.bias": torch.ones(3)})
    refused("there is no weights file", state="nowhere.safetensors")
    assert fxr.Rewriter("conv_bn", into=into).load(Net, state)(X).shape == (2, 4)


def test_a_tensor_that_nothing_gives_is_not_left_without_numbers() -> None:
    """Where even the builder has a plain tensor on the meta device, that is an error."""

    def build() -> nn.Module:
        model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
        model.register_buffer("lost", torch.ones(1, device="meta"), persistent=False)
        return model

    fused = fxr.fuse(build().eval(), into="modules")
    with pytest.raises(fxr.errors.LoadError, match="gives the tensor lost"):
        fxr.Rewriter("conv_bn", into="modules").load(build, fused.state_dict())
