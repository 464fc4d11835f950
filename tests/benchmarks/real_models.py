"""Models of other libraries, with random weights, for a sweep; and what is compared beside it.

The builders need `transformers`, `segmentation-models-pytorch` or `ultralytics`, each for itself:

    fxrewrite sweep tests/benchmarks/real_models.txt

As a script, with `yolo`, `onnx` or `inductor`, it compares further: our rewrite of a YOLO with the
model's own `fuse()`; what ONNX's reference evaluator makes of a ResNet-18 before and after
(`onnx`, `onnxscript`); and what inductor makes of it.
"""

from __future__ import annotations

import copy
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fxrewrite as fxr
from fxrewrite.cli.randomising import randomise_batch_norms


def hf_resnet() -> nn.Module:
    """A small ResNet of Hugging Face."""
    from transformers import ResNetConfig, ResNetForImageClassification

    return ResNetForImageClassification(ResNetConfig(depths=[2, 2, 2, 2], layer_type="basic"))


def hf_mobilenet_v2() -> nn.Module:
    """MobileNetV2 of Hugging Face, with the padding of TensorFlow that is its default."""
    from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

    return MobileNetV2ForImageClassification(MobileNetV2Config())


def smp_unet() -> nn.Module:
    """A U-Net on a ResNet-34 of segmentation-models-pytorch."""
    from segmentation_models_pytorch import Unet

    return Unet("resnet34", encoder_weights=None)


def yolo() -> nn.Module:
    """The smallest YOLO11 of ultralytics, from its description."""
    from ultralytics import YOLO

    return YOLO("yolo11n.yaml").model


def compare_yolo() -> None:
    """Our rewrite against the model's own `fuse()`, which is made for it.

    The model's forward hands its layers to a profiler, when it is called with `profile=True`. So
    without an example ours leaves it alone.
    """
    torch.manual_seed(0)
    model, x = yolo().eval(), torch.randn(1, 3, 64, 64)
    randomise_batch_norms(model, (x,))
    made: dict[str, nn.Module] = {"original": model}
    seconds = {"original": 0.0}

    def make(name: str, how: Callable[[], nn.Module]) -> None:
        start = time.process_time()
        made[name] = how()
        seconds[name] = time.process_time() - start

    make("without", lambda: fxr.rewrite(model, "conv_bn")[0])
    make("fxrewrite", lambda: fxr.rewrite(model, "conv_bn", x)[0])
    # It changes the model that it is called on.
    make("its fuse()", lambda: copy.deepcopy(model).fuse(verbose=False))  # type: ignore[operator]
    exact = _first(copy.deepcopy(model).double()(x.double()))
    for name, each in made.items():
        norms = sum(isinstance(module, nn.BatchNorm2d) for module in each.modules())
        error = (_first(each(x)) - exact).abs().max() / exact.abs().max()
        took = f"{seconds[name]:.1f} s"
        print(f"{name:10} {norms:3} batch norms, relative error {error:.1e} to float64, {took}")
    print(fxr.plan(model, "conv_bn", x).applied[0])


def compare_onnx() -> None:
    """Export before and after, and evaluate both by ONNX's own reference."""
    import onnx
    from onnx.reference import ReferenceEvaluator

    model, x = _resnet18()
    for into in ("graph", "modules"):
        fused = fxr.fuse(model, into=into)
        for name, each in (("original", model), (into, fused)):
            with tempfile.TemporaryDirectory() as folder:
                file = str(Path(folder) / "model.onnx")
                torch.onnx.export(each, (x,), file, dynamo=True, verbose=False)
                exported = onnx.load(file)
                ops = [node.op_type for node in exported.graph.node]
                feeds = {exported.graph.input[0].name: x.numpy()}
                found = torch.from_numpy(ReferenceEvaluator(exported).run(None, feeds)[0])
            error = (found - model(x)).abs().max() / model(x).abs().max()
            count = ops.count("BatchNormalization")
            print(
                f"{name:9} {len(ops)} nodes, {count} batch norms, relative difference {error:.1e}"
            )


def compare_inductor() -> None:
    """torch.compile by its default backend."""
    model, x = _resnet18()
    for into in ("graph", "modules"):
        compiled = torch.compile(fxr.fuse(model, into=into))
        error = (compiled(x) - model(x)).abs().max() / model(x).abs().max()
        print(f"{into:9} by inductor, relative difference {error:.1e}")


def _resnet18() -> tuple[nn.Module, torch.Tensor]:
    from torchvision.models import resnet18

    torch.manual_seed(0)
    model, x = resnet18().eval(), torch.randn(1, 3, 32, 32)
    randomise_batch_norms(model, (x,))
    return model, x


def _first(output: Any) -> torch.Tensor:
    """The first tensor of an output."""
    while not isinstance(output, torch.Tensor):
        output = output[0]
    return output


if __name__ == "__main__":
    comparisons: dict[str, Callable[[], None]] = {
        "yolo": compare_yolo,
        "onnx": compare_onnx,
        "inductor": compare_inductor,
    }
    with torch.no_grad():
        for chosen in sys.argv[1:] or comparisons:
            comparisons[chosen]()
