"""Which functions spell the call of which module, in each dialect; facts, no machinery.

A rule is written on module types. Where a graph calls a function instead, around tensors of the
model, `lifting` reads it as the module that these facts make of it, and spells what a rule made of
that in the same dialect again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import attrs
import torch
from torch import fx, nn
from torch.nn import functional as F

from ..ir.op_traits import traits_of_function
from .semantics import (
    BATCH_NORMS,
    CONVS,
    DROPOUTS,
    TRANSPOSED_CONVS,
    ActivationMeaning,
    AnyConvMeaning,
    BatchedMatMulMeaning,
    BatchNormMeaning,
    ConvMeaning,
    DropoutMeaning,
    LinearMeaning,
    MatMulMeaning,
    Meaning,
)

aten = torch.ops.aten


@attrs.frozen
class Spelling:
    """A function or method that spells the call of a module.

    Args:
        function: the function, the overload of a torch operator, or the name of a tensor's method.
        dialect: functions of one dialect may stand in one graph.
        meaning: what the arguments mean.
        names: the positional arguments, in order.
        keywords: the arguments that are given by keyword only.
        data: the argument by which the chain's value comes in.
        fields: what the module calls those of its tensors that the function calls otherwise.
        item: of a function that returns several values, which of them is the module's.
        implied: the arguments that its name says, as `_` at its end does.
        rank: how many dimensions the chain's value has, if it takes no others.
    """

    function: Callable[..., Any] | str
    dialect: str
    meaning: Meaning
    names: tuple[str, ...]
    keywords: tuple[str, ...] = ()
    data: str = "input"
    fields: dict[str, str] = attrs.field(factory=dict)
    item: int | None = None
    implied: dict[str, Any] = attrs.field(factory=dict)
    rank: int | None = None

    @property
    def op(self) -> str:
        """What FX calls a node that calls it."""
        return "call_method" if isinstance(self.function, str) else "call_function"

    @property
    def says_mode(self) -> bool:
        """Whether an argument says that a call is in training mode."""
        return not {"training", "train"}.isdisjoint(self.names)

    def spell(self, module: nn.Module) -> dict[str, Any] | None:
        """The arguments by name, without the chain's value; None where they can't say it."""
        if type(module) not in self.meaning.kinds:
            return None
        spelt = self.meaning.lower(module)
        named = (*self.names, *self.keywords)
        if spelt is None or any(spelt.get(name) != said for name, said in self.implied.items()):
            return None
        if spelt.get("inplace") and "inplace" not in (*named, *self.implied):
            return None
        return {name: spelt[name] for name in named if name != self.data}


_CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED_CONV = (*_CONV[:5], "output_padding", "groups", "dilation")
_ANY_CONV = (*_CONV[:6], "transposed", "output_padding", "groups")
_NORM = ("input", "weight", "bias", "running_mean", "running_var")
_NORM_SETTINGS = ("training", "momentum", "eps")
_NORM_OF_F = ("input", *_NORM[3:], *_NORM[1:3], *_NORM_SETTINGS)
_NORM_OF_TORCH = (*_NORM, *_NORM_SETTINGS, "cudnn_enabled")
_DROP = ("input", "p", "training", "inplace")
_DROP_OF_TORCH = ("input", "p", "train")
_BY_DIMS = list(enumerate(zip(CONVS, TRANSPOSED_CONVS, DROPOUTS, strict=True), 1))
# Each with the settings that function and module name alike.
_ACTIVATIONS: dict[str, tuple[type[nn.Module], tuple[str, ...]]] = {
    "relu": (nn.ReLU, ()),
    "relu6": (nn.ReLU6, ()),
    "hardtanh": (nn.Hardtanh, ("min_val", "max_val")),
    "leaky_relu": (nn.LeakyReLU, ("negative_slope",)),
    "elu": (nn.ELU, ("alpha",)),
    "celu": (nn.CELU, ("alpha",)),
    "selu": (nn.SELU, ()),
    "silu": (nn.SiLU, ()),
    "mish": (nn.Mish, ()),
    "hardswish": (nn.Hardswish, ()),
    "hardsigmoid": (nn.Hardsigmoid, ()),
    "sigmoid": (nn.Sigmoid, ()),
    "tanh": (nn.Tanh, ()),
    "softplus": (nn.Softplus, ("beta", "threshold")),
    "hardshrink": (nn.Hardshrink, ("lambd",)),
    "softshrink": (nn.Softshrink, ("lambd",)),
    "gelu": (nn.GELU, ("approximate",)),
}


def _activations(dialect: str, place: Any) -> Iterable[Spelling]:
    """Each activation by its names there, of which that with `_` behind writes in place."""
    for name, (kind, settings) in _ACTIVATIONS.items():
        for spelt in (name, f"{name}_"):
            function = getattr(place, spelt, None)
            if function is None:
                continue
            if place is aten:
                function = function.default
            takes_flag = traits_of_function(function).writes_if is not None
            keywords = settings if kind is nn.GELU else ()
            yield Spelling(
                spelt if place is torch.Tensor else function,
                dialect,
                ActivationMeaning((kind,), settings),
                ("input", *(() if keywords else settings), *["inplace"] * takes_flag),
                keywords,
                implied={} if spelt == name else {"inplace": True},
            )


def _functional() -> Iterable[Spelling]:
    """`torch.nn.functional`, and those functions of `torch` itself that modules call."""

    def spelling(function: Any, meaning: Meaning, *names: str, keywords: Any = ()) -> Spelling:
        return Spelling(function, "functional", meaning, names, keywords)

    for dims, (conv, transposed, drop) in _BY_DIMS:
        meaning = ConvMeaning((conv,))
        yield spelling(getattr(F, f"conv{dims}d"), meaning, *_CONV)
        meaning = ConvMeaning((transposed,))
        yield spelling(getattr(F, f"conv_transpose{dims}d"), meaning, *_TRANSPOSED_CONV)
        yield spelling(getattr(F, f"dropout{dims}d"), DropoutMeaning((drop,)), *_DROP)
    yield spelling(F.linear, LinearMeaning((nn.Linear,)), "input", "weight", "bias")
    yield spelling(F.batch_norm, BatchNormMeaning(BATCH_NORMS), *_NORM_OF_F)
    yield spelling(torch.batch_norm, BatchNormMeaning(BATCH_NORMS), *_NORM_OF_TORCH)
    yield spelling(F.dropout, DropoutMeaning((nn.Dropout,)), *_DROP)
    alpha = DropoutMeaning((nn.AlphaDropout,), by_default=False)
    yield spelling(F.alpha_dropout, alpha, *_DROP)
    alpha = DropoutMeaning((nn.FeatureAlphaDropout,), by_default=False)
    yield spelling(F.feature_alpha_dropout, alpha, *_DROP)
    yield spelling(torch.dropout, DropoutMeaning((nn.Dropout,), "train"), *_DROP_OF_TORCH)
    for place in (F, torch, torch.Tensor):
        yield from _activations("functional", place)


def _aten() -> Iterable[Spelling]:
    """What `torch.export.export` makes, and functions that it shares with the decomposed form."""

    def spelling(function: Any, meaning: Meaning, *names: str, keywords: Any = ()) -> Spelling:
        return Spelling(function, "aten", meaning, names, keywords)

    for dims, (conv, transposed, _) in _BY_DIMS:
        packet = getattr(aten, f"conv{dims}d")
        yield spelling(packet.default, ConvMeaning((conv,), tuple), *_CONV)
        yield spelling(packet.padding, ConvMeaning((conv,), str), *_CONV)
        packet = getattr(aten, f"conv_transpose{dims}d")
        overload = packet.default if dims == 1 else packet.input
        meaning = ConvMeaning((transposed,), tuple)
        yield spelling(overload, meaning, *_TRANSPOSED_CONV)
    yield spelling(aten.linear.default, LinearMeaning((nn.Linear,)), "input", "weight", "bias")
    yield spelling(aten.batch_norm.default, BatchNormMeaning(BATCH_NORMS), *_NORM_OF_TORCH)
    drops: dict[Any, tuple[Any, ...]] = {
        aten.dropout: (nn.Dropout,),
        aten.feature_dropout: DROPOUTS,
        aten.alpha_dropout: (nn.AlphaDropout,),
        aten.feature_alpha_dropout: (nn.FeatureAlphaDropout,),
    }
    for packet, kinds in drops.items():
        yield spelling(packet.default, DropoutMeaning(kinds, "train"), *_DROP_OF_TORCH)
    yield from _activations("aten", aten)


def _decomposed() -> Iterable[Spelling]:
    """What `run_decompositions` makes of it, and compilers read."""

    def spelling(function: Any, meaning: Meaning, *names: str, **further: Any) -> Spelling:
        return Spelling(function, "decomposed", meaning, names, **further)

    yield spelling(
        aten.convolution.default, AnyConvMeaning((*CONVS, *TRANSPOSED_CONVS)), *_ANY_CONV
    )
    norm = aten._native_batch_norm_legit_no_training.default
    yield spelling(
        norm,
        BatchNormMeaning(BATCH_NORMS, needs_statistics=True),
        *_NORM,
        "momentum",
        "eps",
        item=0,
    )
    fields = {"input": "bias", "mat2": "weight"}
    products = {
        aten.addmm.default: (MatMulMeaning((nn.Linear,), has_bias=True), 2, "mat1"),
        aten.mm.default: (MatMulMeaning((nn.Linear,), has_bias=False), 2, "input"),
        aten.bmm.default: (BatchedMatMulMeaning((nn.Linear,), has_bias=False), 3, "input"),
    }
    for function, (meaning, rank, data) in products.items():
        names = ("input", "mat1", "mat2") if data == "mat1" else ("input", "mat2")
        yield spelling(function, meaning, *names, data=data, fields=fields, rank=rank)


SPELLINGS: dict[Any, Spelling] = {
    each.function: each for dialect in (_functional, _aten, _decomposed) for each in dialect()
}


def spelling_of(node: fx.Node) -> Spelling | None:
    """What is known of the function or method that a node calls, if it spells a module."""
    return SPELLINGS.get(node.target) if node.op in ("call_function", "call_method") else None
