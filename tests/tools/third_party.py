"""Fold the batch norms of models of many libraries, and tell which stay and why.

    python tests/tools/third_party.py [NAME ...] [--rules conv_bn] [--trust] [--out FILE]

A NAME is part of a model's, such as `monai` or `yolo11n`; by default all are tried. What is printed
is Markdown. Models are built with random weights and nothing is downloaded. They run in float64;
what can't, as its forward makes float32 of something, runs in float32. `nox -s third_party`
installs the libraries; where one is missing, its rows say so.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import operator
import os
import re
import resource
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode

import fxrewrite as fxr
from fxrewrite.cli.randomising import random_input, randomise_batch_norms, randomise_constants
from fxrewrite.cli.sweep_row import general
from fxrewrite.module_utils.nested import flatten, mapped
from fxrewrite.module_utils.running import called

SECONDS, SLOW = 120, 3
MIB = 10 * 1024
LIMIT = {torch.float64: 1e-9, torch.float32: 1e-4}
COLUMNS = """model norms folded proved guarded trusted alone_stay into rewrite_s forward_s error
    why_the_others_stay""".split()
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "YOLO_OFFLINE": "true"}
ENVIRONMENT |= {"PYTHONWARNINGS": "ignore", "CUDA_VISIBLE_DEVICES": ""}
_CONVOLUTION = nn.Conv1d | nn.Conv2d | nn.Conv3d

Build = Callable[[], Any]


def of(path: str, *args: Any, **kwargs: Any) -> Build:
    """What calls `module:attribute`, which is imported only then, with these arguments."""
    return lambda: attribute(path)(*args, **kwargs)


def attribute(path: str) -> Any:
    """What stands at `module:attribute`."""
    module, _, name = path.partition(":")
    return operator.attrgetter(name)(importlib.import_module(module))


def within(module: str, **always: Any) -> Callable[..., Build]:
    """What makes a `Build` from the name of something in a module, and arguments."""

    def build(name: str, *args: Any, **kwargs: Any) -> Build:
        inside, _, last = f"{module}.{name}".rpartition(".")
        return of(f"{inside}:{last}", *args, **always, **kwargs)

    return build


def yolo(config: str) -> Build:
    kind = "RTDETR" if config.startswith("rtdetr") else "YOLO"
    return lambda: attribute(f"ultralytics:{kind}")(f"{config}.yaml").model


def hf(kind: str, **kwargs: Any) -> Build:
    """A model of transformers, and its config, which is named as the model is."""
    name = re.split(r"For(?=[A-Z])|Model$|Encoder$", kind)[0] + ("Encoder" * ("Encoder" in kind))
    return lambda: attribute(f"transformers:{kind}")(
        attribute(f"transformers:{name}Config")(**kwargs)
    )


def effdet(name: str) -> Build:
    def build() -> Any:
        config = attribute("effdet:get_efficientdet_config")(name)
        config.image_size = (128, 128)
        return attribute("effdet:EfficientDet")(config, pretrained_backbone=False)

    return build


smp = within("segmentation_models_pytorch", encoder_weights=None)
monai = within("monai.networks.nets")
video = within("pytorchvideo.models")
audio = within("torchaudio.models")
speech = within("speechbrain.lobes.models")
graph = within("torch_geometric.nn.models")
kornia = within("kornia")
doctr = within("doctr.models", pretrained=False)
reid = within("torchreid.reid.models", num_classes=10)
pretrained = within("pretrainedmodels", pretrained=None)
unets = within("dynamic_network_architectures.architectures.unet")
cv = partial(of, "pytorchcv.model_provider:get_model")
tiny = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
seamless = {"encoder_layers": 1, "decoder_layers": 1, "vocab_size": 64}
loftr: dict[str, Any] = {"backbone_type": "ResNetFPN", "resolution": (8, 2)}
loftr |= {"resnetfpn": {"initial_dim": 32, "block_dims": [32, 48, 64]}}
unet2d = {"norm_op": nn.BatchNorm2d, "nonlin": nn.ReLU}
unet3d = {"norm_op": nn.BatchNorm3d, "nonlin": nn.ReLU}
image, document, clip = "1,3,64,64", "1,3,32,128 None True", "1,3,8,64,64"

# What each is called with is as `fxrewrite verify --input` takes it, or a constant.
# fmt: off
MODELS: dict[str, tuple[Build, str]] = {
    "ultralytics:yolov5n": (yolo("yolov5n"), image),
    "ultralytics:yolov8n": (yolo("yolov8n"), image),
    "ultralytics:yolov8n-seg": (yolo("yolov8n-seg"), image),
    "ultralytics:yolov9t": (yolo("yolov9t"), image),
    "ultralytics:yolov10n": (yolo("yolov10n"), "1,3,160,160"),
    "ultralytics:yolo11n": (yolo("yolo11n"), image),
    "ultralytics:yolo11n-cls": (yolo("yolo11n-cls"), image),
    "ultralytics:yolo12n": (yolo("yolo12n"), image),
    "ultralytics:yolo26n": (yolo("yolo26n"), "1,3,160,160"),
    "ultralytics:rtdetr-l": (yolo("rtdetr-l"), "1,3,160,160"),
    "transformers:ResNet": (hf("ResNetForImageClassification"), image),
    "transformers:RegNet": (hf("RegNetForImageClassification"), image),
    "transformers:MobileNetV2": (hf("MobileNetV2ForImageClassification"), image),
    "transformers:EfficientNet": (hf("EfficientNetForImageClassification"), image),
    "transformers:LeViT": (hf("LevitForImageClassification", image_size=64), image),
    "transformers:SwiftFormer": (hf("SwiftFormerForImageClassification"), image),
    "transformers:MobileViT": (hf("MobileViTForImageClassification"), image),
    "transformers:SegFormer": (hf("SegformerForSemanticSegmentation"), image),
    "transformers:RT-DETR": (
        hf("RTDetrForObjectDetection", freeze_backbone_batch_norms=False, num_queries=20),
        "1,3,160,160",
    ),
    "transformers:D-FINE": (
        hf("DFineForObjectDetection", freeze_backbone_batch_norms=False, num_queries=20),
        "1,3,160,160",
    ),
    "transformers:HGNetV2": (hf("HGNetV2ForImageClassification"), image),
    "transformers:TextNet": (hf("TextNetForImageClassification"), image),
    "transformers:Wav2Vec2-Conformer": (hf("Wav2Vec2ConformerModel", **tiny), "1,8000"),
    "transformers:FastSpeech2Conformer": (hf("FastSpeech2ConformerModel"), "1,12:int64"),
    "transformers:Parakeet": (hf("ParakeetEncoder", **tiny), "1,64,80"),
    "transformers:SeamlessM4T": (
        hf("SeamlessM4TForSpeechToText", hidden_size=64, speech_encoder_layers=2, **seamless),
        "1,16,160 None 1,4:int64",
    ),
    "transformers:PatchTST": (hf("PatchTSTModel"), "2,32,1"),
    "segmentation_models_pytorch:Unet": (smp("Unet", "resnet18"), image),
    "segmentation_models_pytorch:DeepLabV3Plus": (smp("DeepLabV3Plus", "mobilenet_v2"), image),
    "segmentation_models_pytorch:PAN": (smp("PAN", "resnet18"), "1,3,128,128"),
    "segmentation_models_pytorch:MAnet": (smp("MAnet", "efficientnet-b0"), image),
    "segmentation_models_pytorch:UPerNet": (smp("UPerNet", "resnet18"), "1,3,128,128"),
    "monai:DenseNet121": (monai("DenseNet121", 2, 1, 2), "1,1,64,64"),
    "monai:EfficientNetBN": (monai("EfficientNetBN", "efficientnet-b0", False), image),
    "monai:SEResNet50": (monai("SEResNet50", spatial_dims=2, in_channels=3, num_classes=5), image),
    "monai:VNet": (monai("VNet"), "1,1,16,16,16"),
    "monai:AHNet": (monai("AHNet", spatial_dims=2, psp_block_num=2), "1,1,64,64"),
    "monai:HoVerNet": (monai("HoVerNet"), "1,3,256,256"),
    "monai:UNet": (monai("UNet", 3, 1, 2, (8, 16, 32), (2, 2), norm="batch"), "1,1,32,32,32"),
    "monai:SegResNet": (monai("SegResNet", 2, norm="batch"), "1,1,64,64"),
    "monai:DynUNet": (
        monai("DynUNet", 2, 1, 2, [3, 3, 3], [1, 2, 2], [2, 2], norm_name="batch"),
        "1,1,64,64",
    ),
    "pytorchvideo:resnet": (video("create_resnet", head_pool_kernel_size=(4, 2, 2)), "1,3,4,64,64"),
    "pytorchvideo:x3d": (
        video("x3d.create_x3d", input_clip_length=4, input_crop_size=64),
        "1,3,4,64,64",
    ),
    "pytorchvideo:csn": (video("create_csn", head_pool_kernel_size=(1, 2, 2)), clip),
    "pytorchvideo:r2plus1d": (
        video("r2plus1d.create_r2plus1d", head_pool_kernel_size=(1, 2, 2)),
        clip,
    ),
    "torchaudio:Conformer": (audio("Conformer", 16, 4, 32, 3, 7), "2,9,16 2:int64"),
    "torchaudio:WaveRNN": (audio("WaveRNN", [2, 2], 8, 4), "1,1,24 1,1,128,10"),
    "torchaudio:Tacotron2": (audio("Tacotron2"), "1,8:int64 1:int64 1,80,9 1:int64"),
    "speechbrain:ECAPA-TDNN": (speech("ECAPA_TDNN.ECAPA_TDNN", 40), "2,30,40"),
    "speechbrain:Xvector": (speech("Xvector.Xvector"), "2,30,40"),
    "speechbrain:CRDNN": (
        speech("CRDNN.CRDNN", input_shape=(2, 30, 40), rnn_neurons=32),
        "2,30,40",
    ),
    "speechbrain:ContextNet": (
        speech("ContextNet.ContextNet", (2, 30, 40), 64, num_layers=2),
        "2,30,40",
    ),
    "speechbrain:Cnn14": (speech("Cnn14.Cnn14", 64, 32), "1,96,64"),
    "speechbrain:ResNet": (speech("ResNet.ResNet", 40), "1,40,40"),
    "torch_geometric:GIN": (graph("GIN", 8, 16, 3, norm="batch_norm"), "12,8 2,40:int64"),
    "torch_geometric:LINKX": (graph("LINKX", 12, 8, 16, 4, 2, 2, 2), "12,8 2,40:int64"),
    "torch_geometric:Polynormer": (graph("Polynormer", 8, 16, 4), "12,8 2,40:int64 12:int64"),
    "effdet:lite0": (effdet("tf_efficientdet_lite0"), "1,3,128,128"),
    "effdet:d0": (effdet("efficientdet_d0"), "1,3,128,128"),
    "kornia:HardNet": (kornia("feature.HardNet", False), "4,1,32,32"),
    "kornia:HyNet": (kornia("feature.HyNet", False), "4,1,32,32"),
    "kornia:DeFMO": (kornia("feature.DeFMO", False), "1,6,64,64"),
    "kornia:KeyNet": (kornia("feature.KeyNet", False), "1,1,64,64"),
    "kornia:LoFTR-backbone": (kornia("feature.loftr.backbone.build_backbone", loftr), "1,1,64,64"),
    "kornia:XFeatModel": (kornia("feature.xfeat.XFeatModel"), "1,1,64,64"),
    "kornia:DexiNed": (kornia("models.dexined.DexiNed", False), image),
    "open_clip:ModifiedResNet": (
        of("open_clip.modified_resnet:ModifiedResNet", [2, 2, 2, 2], 64, 4, 64, 32),
        image,
    ),
    "doctr:db_resnet34": (doctr("db_resnet34", pretrained_backbone=False), f"{image} None True"),
    "doctr:linknet_resnet18": (
        doctr("linknet_resnet18", pretrained_backbone=False),
        f"{image} None True",
    ),
    "doctr:fast_tiny": (doctr("fast_tiny", pretrained_backbone=False), f"{image} None True"),
    "doctr:crnn_mobilenet": (doctr("crnn_mobilenet_v3_small", pretrained_backbone=False), document),
    "doctr:sar_resnet31": (doctr("sar_resnet31", pretrained_backbone=False), document),
    "doctr:vip_tiny": (doctr("vip_tiny"), "1,3,32,128"),
    "torchreid:osnet": (reid("osnet_x1_0", pretrained=False), "1,3,64,32"),
    "torchreid:mlfn": (reid("mlfn.mlfn", pretrained=False), "1,3,64,32"),
    "torchreid:mudeep": (reid("mudeep.MuDeep"), "1,3,256,128"),
    "torchreid:shufflenet": (reid("shufflenet.shufflenet", pretrained=False), "1,3,64,32"),
    "pytorch_tcn:TCN": (of("pytorch_tcn:TCN", 4, [8, 8, 8], use_norm="batch_norm"), "2,4,32"),
    "asteroid:ConvTasNet": (
        of("asteroid.models:ConvTasNet", 2, norm_type="bN", n_blocks=2, n_repeats=2),
        "1,1,800",
    ),
    "facenet_pytorch:InceptionResnetV1": (of("facenet_pytorch:InceptionResnetV1"), "1,3,80,80"),
    "efficientnet_pytorch:b0": (
        of("efficientnet_pytorch:EfficientNet.from_name", "efficientnet-b0"),
        image,
    ),
    "pretrainedmodels:nasnetamobile": (
        pretrained("nasnetamobile", num_classes=1000),
        "1,3,224,224",
    ),
    "pretrainedmodels:pnasnet5large": (
        pretrained("pnasnet5large", num_classes=1000),
        "1,3,331,331",
    ),
    "pretrainedmodels:dpn68": (pretrained("dpn68"), "1,3,224,224"),
    "pretrainedmodels:bninception": (pretrained("bninception"), "1,3,224,224"),
    "pretrainedmodels:xception": (pretrained("xception"), "1,3,96,96"),
    "torchxrayvision:DenseNet": (of("torchxrayvision.models:DenseNet"), "1,1,64,64"),
    "dynamic_network_architectures:PlainConvUNet": (
        unets("PlainConvUNet", 1, 3, [8, 16, 32], nn.Conv3d, 3, [1, 2, 2], 2, 2, 2, **unet3d),
        "1,1,16,16,16",
    ),
    "dynamic_network_architectures:ResidualEncoderUNet": (
        unets("ResidualEncoderUNet", 1, 3, [8, 16, 32], nn.Conv2d, 3, [1, 2, 2], 2, 2, 2, **unet2d),
        "1,1,32,32",
    ),
    "mmcv:ResNet": (of("mmcv.cnn:ResNet", 18), image),
    "mmcv:VGG": (of("mmcv.cnn:VGG", 11, with_bn=True), image),
    "openunmix:OpenUnmix": (of("openunmix.model:OpenUnmix", 64, 2, 32), "1,2,64,10"),
    "easyocr:CRAFT": (of("easyocr.craft:CRAFT"), image),
    "easyocr:CRNN-VGG": (
        of("easyocr.model.vgg_model:Model", 1, 32, 32, 10),
        "1,1,32,100 1,5:int64",
    ),
    "easyocr:CRNN-ResNet": (of("easyocr.model.model:Model", 1, 32, 32, 10), "1,1,32,100 1,5:int64"),
    "resnest:resnest50": (of("resnest.torch:resnest50"), image),
    "lightly:BarlowTwinsProjectionHead": (
        of("lightly.models.modules.heads:BarlowTwinsProjectionHead", 8, 16, 8),
        "4,8",
    ),
    "lightly:ResNet-9": (
        of("lightly.models.resnet:ResNetGenerator", "resnet-9", num_splits=0),
        "2,3,32,32",
    ),
    "pytorchcv:condensenet": (cv("condensenet74_c4_g4"), "1,3,224,224"),
    "pytorchcv:espnetv2": (cv("espnetv2_wd2"), "1,3,224,224"),
    "pytorchcv:ibppose": (cv("ibppose_coco"), "1,3,128,128"),
    "pytorchcv:darts": (cv("darts"), "1,3,224,224"),
    "pytorchcv:shakeshake": (cv("shakeshakeresnet20_2x16d_cifar10"), "1,3,32,32"),
    "pytorchcv:sinet": (cv("sinet_cityscapes"), "1,3,128,128"),
}
# fmt: on


def reading_one_convolution(model: nn.Module, inputs: Any) -> set[str]:
    """The batch norms of which a run shows that each reads one convolution, and nothing else does.

    Both are called once. What a forward returns besides, or keeps for later, is not seen.
    """
    names = {module: name for name, module in reversed([*model.named_modules()])}
    calls: Counter[nn.Module] = Counter()
    made: dict[int, nn.Module] = {}
    pairs: list[tuple[nn.Module, nn.Module, int]] = []

    def before(module: nn.Module, args: tuple[Any, ...]) -> None:
        calls[module] += 1
        if isinstance(module, _BatchNorm) and args and id(args[0]) in made:
            pairs.append((made[id(args[0])], module, id(args[0])))

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        made[id(output)] = module

    hooks = []
    for module in names:
        if isinstance(module, _CONVOLUTION | _BatchNorm):
            hooks.append(module.register_forward_pre_hook(before))
        if isinstance(module, _CONVOLUTION):
            hooks.append(module.register_forward_hook(after))
    with _Readers() as readers:
        called(model, inputs)
    for hook in hooks:
        hook.remove()
    alone = (b for a, b, id_ in pairs if calls[a] == calls[b] == 1 and readers.count[id_] == 1)
    return {names[norm] for norm in alone}


class _Readers(TorchDispatchMode):
    """Counts how often a tensor is read; keeps all of them, so that no id is given out twice."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[int] = Counter()
        self._kept: list[Any] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        output = function(*args, **(kwargs or {}))
        self._kept += [args, output]
        self.count.update({id(each) for _, each in flatten(args, "") if is_tensor(each)})
        return output


def assurances(report: fxr.Report) -> dict[str, int]:
    """How many batch norms' folds are proved, how many guarded, how many trusted."""
    return Counter({each.anchor: str(each.assurance) for each in report.applied}.values())


def row(name: str, rules: str, trust: Literal["run"] | None) -> dict[str, Any]:
    """What becomes of one model. What it is doing is printed, to know where a process died."""
    print("built", flush=True)
    model, inputs, dtype = prepared(*MODELS[name])
    norms = {k: m for k, m in model.named_modules() if isinstance(m, _BatchNorm)}
    alone = reading_one_convolution(model, inputs)
    _, forward = timed(lambda: called(model, inputs))
    print("rewritten", flush=True)
    (made, report), seconds = timed(lambda: fxr.rewrite(model, rules, inputs, trust=trust))
    print("compared", flush=True)
    stay = {k for k, m in made.named_modules() if isinstance(m, _BatchNorm)} & norms.keys()
    return {
        "norms": len(norms),
        "folded": len(norms) - len(stay),
        **assurances(report),
        "alone_stay": len(alone & stay),
        "into": report.into,
        "rewrite_s": f"{seconds:.2f}",
        "forward_s": f"{forward:.2f}",
        "error": compared(model, made, like(inputs, forward), LIMIT[dtype]),
        "reasons": [(k, k in alone, short(report.why(k))) for k in norms if k in stay],
    }


def prepared(build: Build, described: str) -> tuple[nn.Module, tuple[Any, ...], torch.dtype]:
    """A model that gives something other than zeros, its inputs, and the dtype in which it runs."""
    torch.set_num_threads(1)
    for dtype in LIMIT:
        torch.set_default_dtype(dtype)  # many a model makes tensors in its forward
        torch.manual_seed(0)
        model = build()
        model.to(dtype).requires_grad_(False)
        model.eval()
        constants = {"None": None, "True": True}
        inputs = tuple(
            constants[each] if each in constants else random_input(each, model)
            for each in described.split()
        )
        randomise_constants(model)
        print("run", flush=True)
        try:
            called(model, inputs)
        except RuntimeError:
            if dtype is not torch.float32:
                continue
            raise
        break
    randomise_batch_norms(model, inputs)
    for norm in model.modules():
        if isinstance(norm, _BatchNorm) and norm.affine:
            norm.weight[::5] *= 1e-3
    return model, inputs, dtype


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    """What a function gives, and how many seconds of the processor it takes."""
    start = time.process_time()
    return function(), time.process_time() - start


def like(inputs: Any, forward: float) -> list[Any]:
    """The inputs, and unless the model takes long, other numbers and a larger batch."""
    return [inputs] + [mapped(each, inputs) for each in (changed, repeated) if forward < SLOW]


def compared(model: nn.Module, made: nn.Module, trials: list[Any], limit: float) -> str:
    """The largest error on inputs, of which the model takes the first at least."""
    errors = []
    for each in trials:
        try:
            before = called(model, each)
        except Exception:
            if not errors:
                raise
            continue  # not every model takes any numbers, or any batch
        errors.append(error(before, called(made, each)))
    worst = max(errors, key=lambda each: (math.isnan(each), each))
    said = f"{worst:.0e}{' (float32)' * (limit > 1e-6)}"
    return said if worst <= limit else f"**{said}**"


def changed(value: Any) -> Any:
    """Other numbers for those of an input, of another scale."""
    return -2 * value.flip(-1) if is_tensor(value) and value.is_floating_point() else value


def repeated(value: Any) -> Any:
    return torch.cat([value, changed(value)]) if is_tensor(value) and value.dim() > 1 else value


def error(before: Any, after: Any) -> float:
    """The largest relative error of a tensor of the output; infinite if no rounding explains it."""
    old, new = (dict(flatten(each, "output")) for each in (before, after))
    worst = math.nan  # where no tensor has anything to compare
    if old.keys() != new.keys():
        return math.inf
    for path, a in old.items():
        if is_tensor(a) and a.is_floating_point() and bool(a.any()):
            b = new[path]
            if a.shape != b.shape or not torch.equal(a.isfinite(), b.isfinite()):
                return math.inf
            a, b = (torch.where(each.isfinite(), each, 0).double() for each in (a, b))
            found = float((a - b).abs().max()) / (float(a.abs().max()) or math.nan)
            worst = found if math.isnan(worst) else max(worst, found)
    return worst


def short(why: str) -> str:
    """Why a norm stays, without the names of the model."""
    said = re.sub(r"^.*?: ((missed|refused) by \w+: )?", "", why.splitlines()[0])
    said = re.sub(r"\b\w+(\.\w+)+(?= )", "it", general(said))
    return said if len(said) <= 120 else f"{said[:117]}..."


def is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def in_a_process(name: str, options: list[str]) -> dict[str, Any]:
    """The row of a model, made in a process of its own; whatever goes wrong is a row, too."""
    command = [sys.executable, __file__, "--one", name, *options]
    limit = partial(resource.setrlimit, resource.RLIMIT_DATA, (MIB * 2**20, MIB * 2**20))
    environment = {**os.environ, **ENVIRONMENT}
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=SECONDS,
            preexec_fn=limit,
            env=environment,
        )
    except subprocess.TimeoutExpired as stopped:
        stage = (stopped.stdout or b"").decode().strip().rpartition("\n")[2]
        return {"error": f"**more than {SECONDS} s, while it was {stage}**"}
    said, errors = (each.strip().splitlines() for each in (done.stdout, done.stderr))
    if done.returncode == 0:
        found: dict[str, Any] = json.loads(said[-1])
        return found
    stages = [each for each in said if each in ("built", "run", "rewritten", "compared")]
    last = errors[-1][:200] if errors else f"exit code {done.returncode}"
    return {"error": f"**while it was {(stages or ['started'])[-1]}: {last}**"}


def cells(name: str, found: dict[str, Any]) -> Iterator[str]:
    """A row's cells, as Markdown."""
    reasons = Counter(why for _, _, why in found.get("reasons", ())).most_common(3)
    shown = {**found, "model": name}
    shown["why_the_others_stay"] = "; ".join(f"{count}x {why}" for why, count in reasons)
    for column in COLUMNS:
        yield str(shown.get(column, 0 if "norms" in found else "")).replace("|", "\\|")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--rules", default="conv_bn")
    parser.add_argument("--trust", action="store_const", const="run", help="trust a run")
    parser.add_argument("--out", type=Path, help="append each row as a line of JSON to this file")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.one:
        print(json.dumps(row(chosen.one, chosen.rules, chosen.trust)))
        return
    options = ["--rules", chosen.rules, *["--trust"] * bool(chosen.trust)]
    print("|", " | ".join(each.replace("_", " ") for each in COLUMNS), "|")
    print("|", "---|" * len(COLUMNS), sep="")
    alone: Counter[str] = Counter()
    for name in MODELS:
        if chosen.names and not any(each in name for each in chosen.names):
            continue
        found = in_a_process(name, options)
        print("|", " | ".join(cells(name, found)), "|", flush=True)
        alone.update(f"{name}: {why}" for _, is_alone, why in found.get("reasons", ()) if is_alone)
        if chosen.out:
            with chosen.out.open("a") as file:
                file.write(json.dumps({"model": name, "options": options, **found}) + "\n")
    print("\nRead one convolution alone in a run, and stay:\n")
    print("\n".join(f"- {count}x {said}" for said, count in alone.most_common()))


if __name__ == "__main__":
    main()
