"""Fold a batch norm into the convolution before it."""

from __future__ import annotations

import torch
from torch import nn

import fxrewrite as fxr

from . import norms
from .affine import scaled_and_shifted
from .held_norm import fold_held_norm
from .norms import AnotherBatchNorm
from .own_forward import OwnForward
from .spellings import LAY_OUT

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_HALF = (torch.float16, torch.bfloat16)


@fxr.pattern
class ConvBn:
    """A convolution whose only reader is a batch norm; what does nothing may stand between."""

    x: fxr.Value
    conv: nn.Conv1d | nn.Conv2d | nn.Conv3d | OwnForward
    made: fxr.Value
    between: tuple[
        nn.Identity | nn.Dropout | nn.Dropout1d | nn.Dropout2d | nn.Dropout3d
        | nn.AlphaDropout | nn.FeatureAlphaDropout,
        ...,
    ]  # fmt: skip
    laid: tuple[fxr.Call, ...] = fxr.call(*LAY_OUT, chain="input", side_inputs=False)
    bn: nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | AnotherBatchNorm


def same_rank(m: ConvBn) -> str | None:
    """The batch norm must be of the convolution's rank and number of channels."""
    if not norms.reads_dims(m.bn, _rank(m.conv)):
        return f"a {_name(m.bn)} does not normalise the output of a {_name(m.conv)}"
    features = None if m.bn.running_mean is None else len(m.bn.running_mean)
    if features not in (None, m.conv.out_channels):
        return f"{m.conv.out_channels} channels can't be normalised by {features} features"
    return None


def reads_a_batch(m: ConvBn) -> str | None:
    """Of a tensor without a batch, a batch norm takes what comes second for the channels."""
    for value, does in ((m.x, "reads"), (m.made, "makes")):
        if value.rank not in (None, _rank(m.conv) + 2):
            return (
                f"the {_name(m.conv)} {does} a {value.rank}-d tensor, which has no batch "
                "dimension; of that the batch norm does not normalise the channels"
            )
    return None


def has_running_stats(m: ConvBn) -> str | None:
    """The batch norm must normalise by stored statistics, not by those of the batch."""
    if m.bn.running_mean is None or m.bn.running_var is None:
        return "the batch norm keeps no running statistics and normalises by those of each batch"
    return None


def same_dtype(m: ConvBn) -> str | None:
    """The types must be such that the folded convolution's result has the batch norm's type."""
    conv, bn = m.conv.weight.dtype, {t.dtype for t in norms.tensors_of(m.bn)}
    # Torch lets a batch norm in float32 follow a convolution in half precision, and gives half.
    is_mixed = norms.takes_half(m.bn) and bn == {torch.float32} and conv in _HALF
    if bn == {conv} or is_mixed:
        return None
    found = " and ".join(sorted(str(each).removeprefix("torch.") for each in bn))
    return f"the convolution is in {str(conv).removeprefix('torch.')} and the batch norm in {found}"


def same_device(m: ConvBn) -> str | None:
    """All tensors must be on one device."""
    devices = {t.device for t in (m.conv.weight, *norms.tensors_of(m.bn))}
    if len(devices) == 1:
        return None
    return f"their tensors are on {' and '.join(sorted(map(str, devices)))}"


@fxr.rule(where=[same_rank, reads_a_batch, has_running_stats, same_dtype, same_device])
def fold_conv_bn(m: ConvBn) -> fxr.Replace | fxr.Revise:
    """Scale weight and bias as the batch norm would the output; what it does after that stays."""
    found = norms.vectors(m.bn)
    assert not isinstance(found, str)
    folded, rest = scaled_and_shifted(m.conv, *found), norms.rest_of(m.bn)
    if rest is None and not m.laid:
        return fxr.Replace(folded, slot="conv")
    return fxr.Revise(conv=folded, between=None, bn=rest)


conv_bn = fxr.RuleSet(
    "conv_bn",
    [fold_conv_bn, fold_held_norm],
    doc="Fold each batch norm into the convolution before it.",
)


def _rank(conv: nn.Module) -> int:
    return next(i for i, kind in enumerate(_CONVS, 1) if isinstance(conv, kind))


def _name(module: nn.Module) -> str:
    return type(module).__name__
