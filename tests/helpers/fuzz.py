"""Whole random module trees for the fuzzer: blocks in blocks, whose forwards are lines of code."""

from __future__ import annotations

import copy
import sys
from collections import OrderedDict
from typing import Any

import attrs
import torch
from hypothesis import reject
from hypothesis import strategies as st
from torch import fx, nn
from torch.fx import _symbolic_trace
from torch.nn import functional as F
from torch.nn.utils import parametrizations, weight_norm

from fxrewrite.testing import Case, graph_module, random_tensor, randomise, written
from fxrewrite.testing.situations import halve_input, halve_output, leave_gradient

# All values have one shape, so that any line may follow any other.
CHANNELS, SIDE = 4, 3
CONVS: list[Any] = [nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d]
NORMS: list[Any] = [nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d]


def tagged(x: Any) -> Any:
    """A value times what was just noted on it."""
    x.tag = 2.0
    return x * x.tag


def doubled(x: Any) -> Any:
    return x * 2


def handed_on(x: Any) -> Any:
    return x


# What tracing keeps as one node each.
fx.wrap("doubled")
fx.wrap("handed_on")
THIS = {"this": sys.modules[__name__], "OrderedDict": OrderedDict}


class Widened(nn.Conv2d):
    """Pads by the size of its input, so that what it makes is of that size."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kh, kw = self.weight.shape[-2:]
        if kh > 1 or x.shape[-1] % 2 == 0:
            x = F.pad(x, (kw // 2, kw // 2, kh // 2, kh // 2))
        return F.conv2d(x, self.weight, self.bias, groups=self.groups)


class Reading(Widened):
    """Reads its weight or its bias otherwise too, or does more with what it makes."""

    how = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.how == 0:
            return super().forward(x) * 0.5
        if self.how == 1:
            return super().forward(x * self.weight.mean())
        if self.how == 2:
            return super().forward(x if self.bias is None else -x)
        y = super().forward(x)
        return y if x.shape[0] > 1 else y * 2


class Holding(Widened):
    """Calls a norm inside it on what it makes, or on its input, or both, or reads it too."""

    how = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.how == 1:
            return super().forward(self.norm(x))
        y = self.norm(super().forward(x))
        if self.how == 2:
            return y if self.norm.weight is None else y * self.norm.weight.mean()
        if self.how == 3:
            return self.norm(y)
        return y.relu() + x


@st.composite
def own_forwards(draw: Any, kernel: int, groups: int, bias: bool) -> nn.Module:
    """A convolution with a forward of its own, which folds or does not."""
    kind = draw(st.sampled_from([Widened, Widened, Reading, Holding, Holding, Holding]))
    made = kind(CHANNELS, CHANNELS, kernel, groups=groups, bias=bias)
    if kind is not Widened:
        made.how = draw(st.sampled_from([0, 0, 0, 0, 1, 2, 3]))
    if kind is Holding:
        made.norm = draw(batch_norms(2))
    return made


class OwnLayer(nn.Module):
    """A layer of somebody's own, which is one of torch's but in name."""

    def __init__(self, like: Any) -> None:
        super().__init__()
        self.weight, self.bias = like.weight, like.bias
        self.settings = {}
        if not isinstance(like, nn.Linear):
            self.padding, self.groups = like.padding, like.groups
            self.settings = {"padding": like.padding, "groups": like.groups}
        self.function = getattr(F, f"conv{like.weight.dim() - 2}d", F.linear)

    def forward(self, x: Any) -> Any:
        return self.function(x, self.weight, self.bias, **self.settings)


@st.composite
def convolutions(draw: Any, dims: int) -> nn.Module:
    """What is folded into: a convolution or, without spatial dimensions, a linear layer."""
    bias = draw(st.booleans())
    own = draw(st.sampled_from([False, False, False, True]))
    if dims == 0:
        linear = nn.Linear(CHANNELS, CHANNELS, bias=bias)
        return OwnLayer(linear) if own else linear
    kernel = draw(st.sampled_from([3, 1]))
    groups = draw(st.sampled_from([1, 1, 2, 4]))
    if draw(st.integers(0, 5)) == 0:
        kind = getattr(nn, f"ConvTranspose{dims}d")
        return kind(CHANNELS, CHANNELS, kernel, padding=kernel // 2, groups=groups, bias=bias)
    padding = draw(st.sampled_from([kernel // 2, kernel // 2, kernel // 2, "same"]))
    mode = draw(st.sampled_from(["zeros", "zeros", "zeros", "circular", "replicate"]))
    if dims == 2 and draw(st.booleans()):
        return draw(own_forwards(kernel, groups, bias))
    conv = CONVS[dims](
        CHANNELS, CHANNELS, kernel, padding=padding, padding_mode=mode, groups=groups, bias=bias
    )
    return OwnLayer(conv) if own and mode == "zeros" else conv


@st.composite
def batch_norms(draw: Any, dims: int) -> nn.Module:
    """A batch norm of any configuration, or another norm that may keep running statistics."""
    affine = draw(st.sampled_from([{}, {"affine": False}, {"affine": True, "bias": False}]))
    keeps = draw(st.sampled_from([True] * 7 + [False]))
    eps = draw(st.sampled_from([1e-5, 1e-3, 1.0]))
    momentum = draw(st.sampled_from([0.1, None]))
    other = draw(st.sampled_from([None] * 7 + ["sync", "instance"]))
    if other == "instance" and dims:
        kind = getattr(nn, f"InstanceNorm{dims}d")
        return kind(CHANNELS, eps=eps, affine=draw(st.booleans()), track_running_stats=keeps)
    if other == "sync":
        return nn.SyncBatchNorm(CHANNELS, eps=eps, affine=draw(st.booleans()))
    return NORMS[dims](CHANNELS, eps=eps, momentum=momentum, track_running_stats=keeps, **affine)


@st.composite
def others(draw: Any, dims: int) -> nn.Module:
    """A layer that keeps the shape, and may write in place or hand on its input."""
    kinds: list[Any] = [
        nn.Identity,
        nn.Dropout,
        lambda: nn.Dropout(inplace=True),
        nn.ReLU,
        lambda: nn.ReLU(inplace=True),
        nn.GELU,
        lambda: nn.GroupNorm(2, CHANNELS),
        lambda: nn.LayerNorm(SIDE if dims else CHANNELS),
        lambda: nn.PReLU(CHANNELS),
        lambda: nn.LeakyReLU(0.1, inplace=True),
        lambda: nn.Flatten(1, 1),
    ]
    if dims:
        kinds += [
            lambda: getattr(nn, f"Dropout{dims}d")(),
            lambda: getattr(nn, f"MaxPool{dims}d")(3, 1, 1),
            lambda: getattr(nn, f"AvgPool{dims}d")(1),
            lambda: nn.Linear(SIDE, SIDE),
            lambda: getattr(nn, f"ReplicationPad{dims}d")(0),
        ]
    return draw(st.sampled_from(kinds))()


@attrs.define
class Pool:
    """The modules that blocks draw from; one module may so be in several of them."""

    dims: int
    convs: list[nn.Module]
    norms: list[nn.Module]
    others: list[nn.Module]
    blocks: list[nn.Module] = attrs.field(factory=list)


@st.composite
def pools(draw: Any) -> Pool:
    dims = draw(st.sampled_from([2, 1, 0, 2, 3]))
    convs = draw(st.lists(convolutions(dims), min_size=1, max_size=3))
    norms = draw(st.lists(batch_norms(dims), min_size=1, max_size=3))
    pool = Pool(dims, convs, norms, draw(st.lists(others(dims), min_size=1, max_size=2)))
    if draw(st.integers(0, 3)) == 0:  # two modules that share a parameter
        tied = copy.deepcopy(convs[0])
        tied.weight = convs[0].weight
        pool.convs.append(tied)
    if draw(st.integers(0, 1)) == 0:  # two that differ in their numbers alone
        pool.convs.append(copy.deepcopy(convs[0]))
    return pool


class Block:
    """A forward that is being written, with the members that it needs."""

    def __init__(self, draw: Any, pool: Pool, inputs: list[str]) -> None:
        self.draw, self.pool = draw, pool
        self.members: dict[str, Any] = {}
        self.lines: list[str] = []
        self.values = list(inputs)
        self.inputs = list(inputs)

    def one(self, *among: Any) -> Any:
        return self.draw(st.sampled_from(among))

    def value(self) -> str:
        """A value to read, mostly the newest."""
        return self.one(self.values[-1], self.values[-1], *self.values)

    def name(self, module: Any, base: str) -> str:
        """The name of a module here; now and then the same module gets a second one."""
        known = [name for name, each in self.members.items() if each is module]
        if known and self.draw(st.integers(0, 4)):
            return known[0]
        name = self.one(base, base, f"deep.{base}")
        while name in self.members:
            name += "_"
        self.members[name] = module
        return name

    def set(self, expression: str) -> str:
        self.values.append(f"v{len(self.values)}")
        self.lines.append(f"{self.values[-1]} = {expression}")
        return self.values[-1]

    def call(self, among: list[nn.Module], base: str, value: str) -> str:
        name = self.name(self.one(*among), base)
        how = self.one("self.{}({})", "self.{}({})", "self.{}(input={})")
        return self.set(how.format(name, value))

    # What follows are the lines a block may have.

    def chain(self) -> None:
        value = self.call(self.pool.convs, "conv", self.value())
        if self.draw(st.integers(0, 3)) == 0:
            value = self.call(self.pool.others, "other", value)
        for _ in range(self.one(1, 1, 2)):
            value = self.call(self.pool.norms, "bn", value)

    def norm_first(self) -> None:
        self.call(self.pool.convs, "conv", self.call(self.pool.norms, "bn", self.value()))

    def layers(self) -> None:
        """Layers and norms in a row, in any order."""
        value = self.value()
        for _ in range(self.one(2, 2, 3)):
            among = self.one(self.pool.convs, self.pool.norms)
            value = self.call(among, "layer", value)

    def branches(self) -> None:
        """Sums of parallel branches, each a layer with a norm or not, a norm, or the value."""
        read = self.value()
        ends = []
        for _ in range(self.one(2, 2, 3)):
            end = read
            for among in self.one("c", "cn", "n", "", "o", "cno"):
                pools = {"c": self.pool.convs, "n": self.pool.norms, "o": self.pool.others}
                end = self.call(pools[among], {"c": "conv", "n": "bn", "o": "other"}[among], end)
            ends.append(end)
        self.set(self.one(" + ".join(ends), f"sum([{', '.join(ends)}])"))

    def siblings(self) -> None:
        """Layers that read one value, each with something behind it or not, and what joins them."""
        read, first = self.value(), self.one(*self.pool.convs)
        alike = [each for each in self.pool.convs if str(each) == str(first)]
        among = self.one(alike, alike, self.pool.convs)
        ends = [self.call(among, "conv", read) for _ in range(self.one(2, 2, 3))]
        behind = self.one("{}", "{}.relu()", "F.gelu({})", "{}.contiguous()", "F.relu({}, True)")
        ends = [behind.format(end) if self.one(True, False) else end for end in ends]
        joined = self.one(
            " * ".join(ends),
            f"torch.stack([{', '.join(ends)}]).sum(0)",
            f"torch.cat([{', '.join(ends)}], 1)[:, -{CHANNELS}:]",
        )
        self.set(joined)

    def other(self) -> None:
        self.call(self.pool.others, "other", self.value())

    def functional_chain(self) -> None:
        """The chain by functions, on the modules' own tensors; or the half of it."""
        conv, norm, value = self.one(*self.pool.convs), self.one(*self.pool.norms), self.value()
        c, n = self.name(conv, "conv"), self.name(norm, "bn")
        dims, half = self.pool.dims, self.one("both", "both", "conv", "bn")
        if half != "bn" and not hasattr(conv, "output_padding"):
            given = f"{value}, self.{c}.weight, self.{c}.bias"
            value = self.set(f"F.linear({given})" if dims == 0 else f"F.conv{dims}d({given}, "
                             f"padding={conv.padding}, groups={conv.groups})")  # fmt: skip
        else:
            value = self.set(f"self.{c}({value})")
        if half != "conv":
            training = self.one("False", "False", f"self.{n}.training", "self.training", "True")
            if norm.running_mean is None:
                training = "True"
            self.set(
                f"F.batch_norm({value}, self.{n}.running_mean, self.{n}.running_var, "
                f"self.{n}.weight, self.{n}.bias, {training}, 0.1, {self.one(norm.eps, 1e-3)})"
            )
        else:
            self.set(f"self.{n}({value})")

    def function(self) -> None:
        text = self.one(
            "F.relu({})",
            "torch.relu({})",
            "{}.relu()",
            "{}.sigmoid()",
            "F.hardtanh({}, -0.5, 0.5)",
            "{}.view_as({})",
            "{}.contiguous()",
            "{}.flatten(1).view_as({})",
            "torch.cat({}.chunk(2, dim=1)[::-1], dim=1)",
            "{} + torch.tensor(0.5)",
            "-{}",
            "{}.clone()",
            "{}.detach()",
            "{}.to({}.dtype)",
            "this.doubled({})",
            "this.handed_on({})",
            "F.dropout({}, 0.5, self.training)",
            "torch.unbind(torch.stack([{}, {}]))[1]",
            "{}.transpose(0, 1).transpose(0, 1)",
            "{}.relu().relu()",
            "{}.double()",
            "{}.to({}.dtype).to(torch.float32)",
            "{}.flatten(1, 1)",
            "{}.reshape({}.shape)",
            "{}.contiguous().contiguous()",
            "F.dropout({}, 0.5, False)",
            "F.relu(F.relu({}, inplace=True))",
        )
        value = self.value()
        self.set(text.replace("{}", value))

    def in_place(self) -> None:
        value = self.value()
        text = self.one(
            "{}.mul_(0.5)",
            "{}[:, :1].add_(1.0)",
            "F.relu({}, inplace=True)",
            "{}.relu_()",
            "torch.tanh_({})",
            "F.leaky_relu_({}, 0.1)",
            "{} += 1",
            "{}[0] = 0.5",
            "{}.transpose(0, 1).neg_()",
            "torch.add({}, 1, out={})",
            "torch.relu_({})",
        )
        line = text.replace("{}", value)
        if "=" not in line.replace("inplace=", "").replace("out=", "") and self.one(True, False):
            self.set(line)
        else:
            self.lines.append(line)

    def combine(self) -> None:
        text = self.one("{} + {}", "torch.add({}, {}, alpha=2)", "{}.sub({})", "{} * {}")
        one, two = self.value(), self.value()
        if self.one(True, False):
            two = f"self.{self.name(self.one(*self.pool.convs), 'conv')}.weight.mean()"
        self.set(text.format(one, two))

    def parameter(self) -> None:
        last = SIDE if self.pool.dims else CHANNELS
        sizes = self.one((CHANNELS, *[1] * self.pool.dims), (1,), (last,))
        self.members["scale"] = nn.Parameter(random_tensor(sizes, 1))
        self.set(
            self.one(
                "{} * self.scale",
                "self.scale + {}",
                "{} / (self.scale + 9)",
                "torch.sub({}, self.scale, alpha=2)",
                "torch.add(self.scale, {}, alpha=2)",
                "torch.rsub({}, self.scale)",
                "{}.mul(self.scale).add(self.scale)",
                "self.scale * {} / 2",
            ).format(self.value())
        )

    def number(self) -> None:
        self.set(
            self.one("{} * 2", "1 - {}", "{} / 4", "0 + {}", "torch.neg({})", "{} + 0.5").format(
                self.value()
            )
        )

    def permuted(self) -> None:
        """A constant for the channels while they are the last dimension."""
        self.members["last"] = nn.Parameter(random_tensor((CHANNELS,), 2))
        dims = self.pool.dims
        to = (0, *range(2, dims + 2), 1)
        back = (0, dims + 1, *range(1, dims + 1))
        operation = self.one("*", "+")
        value = (
            self.value()
            if self.one(True, False)
            else self.call(self.pool.convs, "conv", self.value())
        )
        self.set(f"({value}.permute{to} {operation} self.last).permute{back}")

    def buffer(self) -> None:
        norm = self.one(*self.pool.norms)
        if norm.running_mean is not None:
            name = self.name(norm, "bn")
            text = self.one("{}.mul_(0.5)", "{}[0] = 0.5", "{} += 0.5")
            self.lines.append(text.format(f"self.{name}.running_mean"))

    def control(self) -> None:
        self.members["flag"] = self.draw(st.booleans())
        pool = self.pool
        among = self.one(pool.others, pool.others, pool.others, pool.convs, pool.norms)
        name = self.name(self.one(*among), "other")
        value = self.value()
        text = self.one(
            "self.flag",
            "not self.training",
            "y is not None",
            "len(self._modules) > 3",
            "x.mean() > 0",
            "not x.mean() > 0",
        )
        if text.startswith("y") and "y" not in self.inputs:
            text = "self.flag"
        self.set(f"self.{name}({value}) if {text} else {self.value()}")

    def sequential(self) -> None:
        layers = [self.one(*self.pool.convs), self.one(*self.pool.norms)]
        layers += [self.one(*self.pool.others)] * self.one(0, 1)
        held = nn.Sequential(*layers) if self.one(True, False) else nn.ModuleList(layers)
        name = self.name(held, "seq")
        if isinstance(held, nn.Sequential):
            self.set(f"self.{name}({self.value()})")
        else:
            value = self.set(self.value())
            self.lines += [f"for layer in self.{name}:", f"    {value} = layer({value})"]

    def block(self) -> None:
        if self.pool.blocks:
            block = self.one(*self.pool.blocks)
            name, read = self.name(block, "block"), self.value()
            y = f", {self.value()}" if "y" in block.inputs else ""
            self.set(f"self.{name}({read}{y}){block.takes}")

    def for_one_call(self) -> None:
        """Something of a module is changed for one call, and put back."""
        pool, at = self.pool, len(self.lines)
        among = self.one(pool.norms, pool.norms, pool.others, pool.convs)
        name = self.name(self.one(*among), "changed")
        if self.draw(st.booleans()):
            self.call(pool.convs, "conv", self.value())
        self.call([self.members[name]], name, self.value())
        before, after = self.one(
            ("m = self.{0}.training; self.{0}.train(not m)", "self.{0}.train(m)"),
            ("m = self.{0}.training; self.{0}.training = True", "self.{0}.training = m"),
            ("m = self.{0}.__dict__.get('eps'); self.{0}.eps = 1.5", "self.{0}.eps = m"),
            ("m = self.{0}.register_forward_hook(this.halve_output)", "m.remove()"),
        )
        self.lines.insert(at, before.format(name))
        self.lines.append(after.format(name))

    def outside(self) -> None:
        """A draw, a question to torch, or an attribute of a value."""
        text = self.one(
            "{} + torch.rand(1, dtype={}.dtype)",
            "{} * torch.rand(()).item()",
            "{} * (2.0 if torch.is_grad_enabled() else 1.0)",
            "{} * (2.0 if torch.is_inference_mode_enabled() else 1.0)",
            "this.tagged({})",
        )
        value = self.value()
        self.set(text.replace("{}", value))

    LINES = (
        *[chain] * 5, *[functional_chain] * 2, *[block] * 2, *[branches] * 3, layers, layers,
        norm_first, other, function, function, in_place, combine, parameter, number, permuted,
        buffer, control, sequential, siblings, siblings, for_one_call, outside,
    )  # fmt: skip

    def model(self, most: int) -> nn.Module:
        for _ in range(self.draw(st.integers(1, most))):
            self.one(*self.LINES)(self)
        first, second = self.values[-1], self.value()
        returned, takes = self.one(
            ("{0}", ""), ("{0}", ""), ("{0}", ""), ("{0}, {1}", "[0]"),
            ("{{'a': {0}, 'b': [{1}, {0}]}}", "['a']"), ("({1}, ({0}, None))", "[1][0]"),
            ("OrderedDict(a={0}, b={1})", "['a']"),
        )  # fmt: skip
        lines = [*self.lines, f"return {returned.format(first, second)}"]
        made = written(self.members, lines, ", ".join(self.inputs), THIS)
        made.takes, made.inputs = takes, self.inputs  # type: ignore[assignment]
        return made


def forget_wraps() -> None:
    """Let go of what the graphs of earlier models wrapped.

    FX keeps that for ever, and goes through all of it at each trace, so that a long run would take
    several times as long.
    """
    wrapped = _symbolic_trace._wrapped_fns_to_patch
    for key in [key for key, names in wrapped.items() if "__name__" not in names]:
        del wrapped[key]  # of a graph's code, which is no module


@st.composite
def cases(draw: Any) -> Case:
    """A model of blocks in blocks, as a class or as a GraphModule, with arguments that fit."""
    forget_wraps()
    pool = draw(pools())
    for _ in range(draw(st.sampled_from([0, 1, 1, 2]))):
        inputs = draw(st.sampled_from([["x"], ["x"], ["x", "y"]]))
        pool.blocks.append(Block(draw, pool, inputs).model(3))
    inputs = draw(st.sampled_from([["x"], ["x", "y"], ["x", "X"]]))
    model = Block(draw, pool, inputs).model(5)
    randomise(model, draw(st.integers(0, 2**16)))
    dtype = draw(st.sampled_from(DTYPES))
    shape = (2, CHANNELS, *[SIDE] * pool.dims)
    args = tuple(random_tensor(shape, i).to(dtype) for i, _ in enumerate(inputs))
    model.to(dtype)
    disturb(draw, model)
    if draw(st.integers(0, 3)) == 0:
        try:
            model = graph_module(model, ())
        except Exception:  # not every forward can be traced
            reject()
        for name in draw(st.lists(st.sampled_from(["", "conv"]), max_size=1)):
            if name in dict(model.named_modules()):
                model.get_submodule(name).register_forward_hook(halve_output)
    return Case(model, args)


DTYPES = [*[torch.float64] * 10, torch.float32, torch.bfloat16, torch.float16]


def disturb(draw: Any, model: nn.Module) -> None:
    """Put some modules in training mode, hook some, compute the weight of one."""
    modules = [each for _, each in model.named_modules()]
    for _ in range(draw(st.sampled_from([0, 0, 1, 2]))):
        module = draw(st.sampled_from(modules))
        what = draw(st.sampled_from(["train", "train", "hook", "weight", "own", "frozen", "half"]))
        if what == "train":
            module.train(draw(st.booleans()))
            if draw(st.booleans()):
                module.training = not module.training
        elif what == "hook":
            hook = draw(st.sampled_from(["forward", "pre", "backward", "state", "load"]))
            if hook == "forward":
                module.register_forward_hook(halve_output)
            elif hook == "pre":
                module.register_forward_pre_hook(halve_input)
            elif hook == "backward":
                module.register_full_backward_hook(leave_gradient)
            elif hook == "state":
                module.register_state_dict_post_hook(leave_gradient)
            else:
                module.register_load_state_dict_pre_hook(leave_gradient)
        elif what == "weight" and isinstance(module, tuple(CONVS)):
            if "weight" in module._parameters:
                make = draw(st.sampled_from([parametrizations.weight_norm, weight_norm]))
                make(module)
        elif what == "own" and not module._modules:
            plain = module.forward
            module.forward = lambda input, _of=plain: _of(input) * 0.5
        elif what == "frozen":
            module.requires_grad_(False)
        elif what == "half":
            tensors = [t for t in module._parameters.values() if t is not None]
            for tensor in tensors[:1]:
                with torch.no_grad():
                    tensor.flatten()[:1].fill_(draw(st.sampled_from([0.0, -1e30, 1e-30])))
