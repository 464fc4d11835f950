"""Record what rewriting does to many models, and compare later, say after each refactoring step.

    python tests/tools/golden.py record|compare FOLDER [--only SUBSTRING]

A case is a model, its rule sets, `into`, and whether there are example inputs; it is one JSON file.
What is measured is the fxrewrite that this Python imports. It needs torchvision and timm.
"""

import argparse
import copy
import difflib
import json
import re
import sys
import time
import zlib
from pathlib import Path

import timm
import torch
from torch import fx, nn
from torch.export import ExportedProgram, export
from torch.nn import functional as F
from torch.nn.functional import scaled_dot_product_attention as attend
from torch.nn.utils import parametrizations, prune
from torchvision import models as tv

import fxrewrite as fxr


def rewrite(model, rules, x, into):
    return fxr.rewrite(model, rules, x, into=into)


def own_nets():
    """Nets about what the engine has to know of; their members are a, b, c and so on."""
    conv, conv3, bn = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, 1, 1), nn.BatchNorm2d(4)
    bare, relu_ = nn.Conv2d(4, 4, 1, bias=False), nn.ReLU(inplace=True)
    wide, tall = nn.Conv2d(4, 4, (1, 3), 1, (0, 1)), nn.Conv2d(4, 4, (3, 1), 1, (1, 0))
    kinds = {"C": conv, "K": conv3, "N": bare, "B": bn, "L": nn.Linear(6, 6), "R": relu_}
    nets = {}

    def net(name, forward, letters, *members):
        nets[name] = type(name, (nn.Module,), {"forward": forward})()
        for member, each in zip("abcdef", [*map(kinds.get, letters), *members], strict=False):
            setattr(nets[name], member, copy.deepcopy(each))
        return nets[name].eval()

    def functional(s, x):
        y, b = F.conv2d(x, s.a.weight, padding=1), s.b
        y = F.batch_norm(y, b.running_mean, b.running_var, b.weight, b.bias, s.training)
        return F.linear(y.relu().flatten(1), s.c.weight, s.c.bias)

    def containers(s, x):
        for i, block in enumerate(s.a):
            x = block["bn"](block["conv"](x)) if i else block["bn"](block["conv"](x)).relu()
        return {"out": s.c(s.b(x)), "all": [x]}

    def nothing(s, x):
        y = s.d(F.relu(s.b(s.a(s.c(x))).relu())).float()
        return F.dropout(y.contiguous().contiguous().flatten(1, 1) + 0, training=False)

    def four(s, x):
        return s.d(s.c(s.b(s.a(x))))

    net("shared_conv", lambda s, x: s.b(s.a(x)) + s.c(s.a(x * 2)), "CBB")
    net("read_twice", lambda s, x: (s.c(s.b(s.a(x))), s.a.weight.sum()), "CBC")
    net("hooked", four, "CBCB").a.register_forward_hook(lambda module, args, out: out * 0.5)
    net("in_place", lambda s, x: s.c(s.e(s.b(s.a(x).mul_(2)))) + s.d(x)[:, :1].add_(1), "CBCCR")
    net("relu_", lambda s, x: s.c(s.b(s.d(s.a(x)))) + s.a(x), "CBCR")
    net("attention", lambda s, x: s.d(attend(s.a(x), s.b(x), s.c(x))), "LLLL")
    net("siblings", lambda s, x: torch.cat([s.b(s.a(x)).relu(), s.d(s.c(x)).relu()], 1), "CBNB")
    net("branches", lambda s, x: s.b(s.a(x)) + s.d(s.c(x)) / 2 + s.e(x) + x, "KBNBB")
    net("three", lambda s, x: F.relu(s.b(x) + s.c(x) + s.a(x)), "K", wide, tall)
    net("functional", functional, "KB", nn.Linear(144, 2))
    net("data_dependent", lambda s, x: s.c(s.b(s.a(x)) if x.sum() > 0 else x), "CBC")
    net("optional", lambda s, x, y=None: s.c(s.b(s.a(x))) if y is None else y, "CBC")
    parametrizations.weight_norm(net("parametrized", four, "CBCB").a)
    prune.ln_structured(net("pruned", four, "CBCB").a, "weight", 1, 1, 0)
    net("partly_training", four, "CBCB").b.train()
    net("all_training", four, "CBC", nn.Dropout()).train()
    one = nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6), nn.ConvTranspose1d(6, 4, 2), nn.BatchNorm1d(4)
    net("one_dimension", lambda s, x: s.a(x), "", nn.Sequential(nn.Flatten(2), *one))
    three = nn.Conv3d(2, 4, 1), nn.BatchNorm3d(4), nn.ConvTranspose3d(4, 2, 2), nn.BatchNorm3d(2)
    net("three_dimensions", lambda s, x: s.a(x), "", nn.Sequential(nn.Unflatten(1, (2, 2)), *three))
    up, vector = nn.ConvTranspose2d(4, 4, 2, 2), nn.Parameter(torch.ones(4, 1, 1))
    net("constants", lambda s, x: s.c(s.b((s.a(s.d(x)) * s.e + 1) / 3)) - 2, "BKB", up, vector)
    net("nothing", nothing, "CB", nn.Identity(), nn.Dropout())
    net("linears", four, "LL", nn.LayerNorm(6), nn.Linear(6, 3))
    net("rows", four, "", nn.Flatten(), nn.Linear(144, 6), nn.BatchNorm1d(6), nn.Linear(6, 8))
    blocks = nn.ModuleList(nn.ModuleDict(copy.deepcopy({"conv": conv, "bn": bn})) for _ in "123")
    tied = net("containers", containers, "", blocks, conv, bn)
    tied.alias, tied.b.weight = tied.a[0], tied.a[1]["conv"].weight
    net("effects", lambda s, x: s.c.append(1) or s.b(s.a(x)), "CB", [])
    net("nested", four, "CB", copy.deepcopy(nets["data_dependent"]), bn)
    nets["graph_module"] = fx.symbolic_trace(copy.deepcopy(nets["branches"]))
    return nets


TORCHVISION = """resnet18 resnet50 resnext50_32x4d mobilenet_v2 mobilenet_v3_large efficientnet_b0
    densenet121 regnet_y_400mf regnet_x_400mf shufflenet_v2_x0_5 mnasnet0_5 squeezenet1_1 vgg11_bn
    convnext_tiny swin_t maxvit_t vit_b_32 googlenet inception_v3 r3d_18 mc3_18""".split()
WITH_BACKBONE = """lraspp_mobilenet_v3_large deeplabv3_mobilenet_v3_large
    ssdlite320_mobilenet_v3_large fasterrcnn_mobilenet_v3_large_320_fpn""".split()
TIMM = """resnet26d repvgg_a0 mobileone_s0 levit_128s ghostnet_100 efficientvit_b0 efficientvit_m0
    hardcorenas_a res2net50_14w_8s xception41 dla34 ese_vovnet19b_dw mixer_s32_224 rexnet_100
    deit_tiny_patch16_224 convmixer_768_32 edgenext_xx_small fastvit_t8 tinynet_e resnest14d
    lcnet_035 repghostnet_050 mobilenetv4_conv_small repvit_m0_9 poolformerv2_s12 nf_regnet_b0
    resnetv2_50 skresnet18 selecsls42b hrnet_w18_small cspresnet50 regnetx_002 starnet_s1 gernet_s
    tf_efficientnet_b0 eca_resnet33ts pit_ti_224 coat_lite_tiny pvt_v2_b0 mambaout_femto""".split()
PROGRAMS = "resnet18 mobilenet_v3_large levit_128s branches functional attention".split()
SMALL = "affine cleanup conv_bn inference merge_siblings reparam".split()
LARGE = "conv_bn inference inference+merge_siblings".split()
STRIPPED = re.compile(
    r"/[^\s'\"(`]*/((site-packages|lib/python3\.\d+)/|(?=golden\.py|(fxrewrite|patterns)/))"
    r"|(?<=golden\.py):\d+|0x[0-9a-f]{6,}|(?<=eval_with_key>)\.\d+"
)


def cases(only):
    """The name of each case that has `only` in its name, and its content."""
    nets = own_nets()
    ways = [(r, i, x) for r in SMALL for i in ("", "modules", "graph") for x in ("", "x")]
    todo = dict.fromkeys(nets, ways)
    for i, name in enumerate([*TORCHVISION, *WITH_BACKBONE, *TIMM]):
        todo[name] = [(rules, "", "") for rules in LARGE]
        todo[name].append(("inference", ("modules", "", "graph")[i % 3], "x" * (i % 3 == 1)))
        todo[name].append((LARGE[i % 2 * 2], "modules", "x" * (i % 3 == 0)))
        todo[name] += [(LARGE[2], "", "x")] * (i % 3 != 1)
    forms = [f"{name}.{form}" for name in PROGRAMS for form in ("exported", "decomposed")]
    todo |= {name: [(rules, "", "") for rules in LARGE] for name in forms}
    for name, ways in todo.items():
        named = {"__".join(filter(None, (name, *way))): way for way in ways}
        named = {case: way for case, way in named.items() if only in case}
        model, given = made(name, nets) if named else (None, None)
        for case, (rules, into, x) in named.items():
            yield case, plain(content(model, rules.split("+"), given if x else None, into or None))


def made(name, nets):
    """A model, in the form that its name ends on, and its inputs."""
    name, _, form = name.partition(".")
    if name in nets:
        model = nets[name]
    elif name in TIMM:
        model = timm.create_model(name, num_classes=9).eval()
    else:
        backbone = {"weights_backbone": None} if name in WITH_BACKBONE else {}
        model = tv.get_model(name, weights=None, num_classes=9, **backbone).eval()
    torch.manual_seed(zlib.crc32(name.encode()))
    for key, each in model.state_dict().items():
        if key.endswith("running_var"):
            each.uniform_(0.5, 2)[::17] *= 1e-4
        elif each.is_floating_point() and each.numel() > max(each.shape, default=1):
            each.normal_(0, each[0].numel() ** -0.5)
        elif each.is_floating_point():
            vector = each.normal_().view(-1)  # of both signs, some near zero, and some zero
            vector[::13] *= 1e-8
            vector[5::29] = 0
    image = (3, 4, 32, 32) if name in ("r3d_18", "mc3_18") else (3, 224, 224)
    x = torch.randn((2, 4, 6, 6) if name in nets else (1, *image))
    if form:
        model = export(model, (x,))
        model = model.run_decompositions() if form == "decomposed" else model
    return model, ([x[0]],) if name in WITH_BACKBONE[2:] else (x,)


def content(model, *given):
    """All that is to be known of one rewrite."""
    try:
        made, report = rewrite(model, *given)
    except Exception as error:
        return {"error": [type(error).__name__, str(error)]}
    data = {f"report.{k}": each for k, each in json.loads(report.to_json()).items()}
    names = [k for k, _ in model.named_modules()] if isinstance(model, nn.Module) else []
    names = names[1 :: len(names) // 10 + 1] + [f.anchor for f in report.findings[:5]]
    data |= {"str": str(report), "why": {k: report.why(k) for k in names}}
    known = {id(each): f"is {k}" for k, each in tensors(model)}
    data["state"] = {k: in_words(each, known) for k, each in tensors(made)}
    if isinstance(made, ExportedProgram):
        data["signature"] = [str(made.graph_signature), list(made.constants)]
        made = made.graph_module
    modules = [(k, type(m).__name__, m.extra_repr(), m.training) for k, m in made.named_modules()]
    data["modules"] = [" ".join(map(str, each)) for each in modules]
    if isinstance(made, fx.GraphModule):
        nodes = [f"{n.op} {n.name} {sorted(n.meta)}" for n in made.graph.nodes]
        data |= {"code": made.code, "nodes": nodes}
    return data


def tensors(model):
    is_program = isinstance(model, ExportedProgram)
    return (model.state_dict if is_program else model.state_dict(keep_vars=True)).items()


def in_words(each, known):
    """A tensor in words, with the name that it has in the original, or else sums of it."""
    kind = f"{type(each).__name__} {each.dtype} {list(each.shape)} {each.requires_grad}"
    if id(each) in known:
        return f"{kind} {known[id(each)]}"
    values = each.detach().double().flatten()
    size = values.abs().sum().item()
    sums = values.sum().item(), (values @ torch.arange(len(values)).double().cos()).item()
    return f"{kind} {size:.6g} {[round(each / (size or 1), 6) + 0.0 for each in sums]}"


def plain(value):
    """Data without this machine's folders and running numbers, texts as lists of their lines."""
    if isinstance(value, dict):
        return {k: plain(each) for k, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    lines = STRIPPED.sub("", value).split("\n") if isinstance(value, str) else [value]
    return lines if len(lines) > 1 else lines[0]


def difference(old, new):
    """The parts that differ, each with the beginning of its difference."""
    parts = [k for k in {**old, **new} if old.get(k) != new.get(k)]
    for part in parts:
        a, b = (json.dumps(each.get(part), indent=1).split("\n") for each in (old, new))
        diff = [*difflib.unified_diff(a, b, n=1, lineterm="")][2:]
        yield from (f"    {line[:200]}" for line in [part, *diff[: max(3, 18 // len(parts))]])


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("command", choices=("record", "compare"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default="", metavar="SUBSTRING")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    count, differ, start = 0, 0, time.process_time()
    for case, data in cases(given.only):
        file, count = given.folder / f"{case}.json", count + 1
        print(f"{time.process_time() - start:5.1f} s  {case}", file=sys.stderr, flush=True)
        if given.command == "record":
            file.write_text(json.dumps(data, indent=1))
        old = json.loads(file.read_text()) if file.exists() else {}
        if old != data:
            differ += 1
            print(f"{case}{'' if old else ' has no recording'}:", *difference(old, data), sep="\n")
        start = time.process_time()
    print(f"{count} cases, {differ} differ")
    sys.exit(differ > 0)


if __name__ == "__main__":
    main()
