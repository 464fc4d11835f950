"""How operations that are no modules are spelt, and modules that do nothing in eval mode."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import fxrewrite as fxr

aten = torch.ops.aten

ADD: tuple[Any, ...] = (
    operator.add, operator.iadd, torch.add, "add", "add_", aten.add.Tensor, aten.add.Scalar,
    aten.add_.Tensor, aten.add_.Scalar,
)  # fmt: skip
SUB: tuple[Any, ...] = (
    operator.sub, operator.isub, torch.sub, torch.subtract, "sub", "sub_", "subtract", "subtract_",
    aten.sub.Tensor, aten.sub.Scalar, aten.sub_.Tensor, aten.sub_.Scalar,
)  # fmt: skip
RSUB: tuple[Any, ...] = (torch.rsub, "rsub", aten.rsub.Tensor, aten.rsub.Scalar)
MUL: tuple[Any, ...] = (
    operator.mul, operator.imul, torch.mul, torch.multiply, "mul", "mul_", "multiply", "multiply_",
    aten.mul.Tensor, aten.mul.Scalar, aten.mul_.Tensor, aten.mul_.Scalar,
)  # fmt: skip
DIV: tuple[Any, ...] = (
    operator.truediv, operator.itruediv, torch.div, torch.divide, torch.true_divide, "div", "div_",
    "divide", "divide_", "true_divide", "true_divide_", aten.div.Tensor, aten.div.Scalar,
    aten.div_.Tensor, aten.div_.Scalar,
)  # fmt: skip
NEG: tuple[Any, ...] = (
    operator.neg, torch.neg, torch.negative, "neg", "neg_", "negative", aten.neg.default,
)  # fmt: skip
FLATTEN: tuple[Any, ...] = (torch.flatten, "flatten", aten.flatten.using_ints)
RESHAPE: tuple[Any, ...] = (
    torch.reshape, "reshape", "view", aten.view.default, aten.reshape.default,
)  # fmt: skip
PERMUTE: tuple[Any, ...] = (torch.permute, "permute", aten.permute.default)

# What gives the same values, laid out in memory anew.
LAY_OUT: tuple[Any, ...] = (
    "contiguous", "clone", torch.clone, aten.contiguous.default, aten.clone.default,
)  # fmt: skip

DROPOUT: tuple[Any, ...] = (
    F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout,
    torch.dropout, aten.dropout.default,
)  # fmt: skip


class Idle(fxr.Family):
    """A module that in eval mode passes on what it reads."""


for _kind in (
    nn.Identity,
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
    "torchvision.ops.stochastic_depth.StochasticDepth",
    "timm.layers.drop.DropPath",
    "timm.layers.drop.DropBlock2d",
):
    Idle.add(_kind)
