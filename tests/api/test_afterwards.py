"""What a rewrite gives, a graph or the user's own modules, is still a model like any other."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import checks
import nets
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fxrewrite as fxr

X = nets.X.float()


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_it_can_be_fine_tuned(into: Any) -> None:
    """In training mode gradients reach the folded weights, and a step changes what it gives."""
    model = nets.tied()
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


@pytest.mark.slow
def test_it_compiles(into: Any) -> None:
    """torch.compile takes it as a whole, without a graph break."""
    model = nets.tied()
    fused = fxr.fuse(model, into=into)
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    close(compiled(X), model(X))


def test_it_scripts_where_the_original_does(into: Any) -> None:
    """So does torch.jit.script."""
    model = nets.tied()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(fxr.fuse(model, into=into))
        torch.jit.script(model)
    close(scripted(X), model(X))


def test_it_is_exported(into: Any) -> None:
    """torch.export gives a program whose state dict has the same keys."""
    model = nets.tied()
    fused = fxr.fuse(model, into=into)
    program = torch.export.export(fused, (X,))
    close(program.module()(X), model(X))
    saved = {name for name in program.state_dict if not name.startswith("_tensor_constant")}
    assert fused.state_dict().keys() <= saved | {"tied.weight", "head.weight"}


@pytest.mark.slow
def test_it_goes_to_onnx(into: Any) -> None:
    """ONNX's reference evaluator gives what the model gives, of what the dynamo exporter makes."""
    model = nets.tied()
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
    model = nets.tied()
    fused = fxr.fuse(model, into=into)
    close(nn.DataParallel(fused)(X), model(X))
    parallel = DistributedDataParallel(fused)
    close(parallel(X), model(X))
    parallel(X).sum().backward()
    assert all(parameter.grad is not None for parameter in fused.parameters())


def test_it_is_copied_and_pickled(into: Any) -> None:
    """A deep copy and a pickle give the same model, to the bit, with tied weights tied."""
    fused = fxr.fuse(nets.tied(), into=into)
    for again in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert torch.equal(again(X), fused(X))
        assert again.tied.weight is again.head.weight


def test_its_state_dict_goes_round(into: Any) -> None:
    """It loads into another rewrite of the same architecture, strictly."""
    fused, other = (fxr.fuse(each, into=into) for each in (nets.tied(), nets.Tied().eval()))
    assert not torch.allclose(other(X), fused(X))
    other.load_state_dict(fused.state_dict())
    assert torch.equal(other(X), fused(X))
