"""Fold a batch norm into the convolution before it."""

from __future__ import annotations

import torch
from torch import nn

import fxrewrite as fxr

from .affine import scale_and_shift, scaled_and_shifted
from .held_norm import fold_held_norm
from .own_forward import OwnForward

_RANK: dict[type[nn.Module], int] = {
    nn.Conv1d: 1,
    nn.BatchNorm1d: 1,
    nn.Conv2d: 2,
    nn.BatchNorm2d: 2,
    nn.Conv3d: 3,
    nn.BatchNorm3d: 3,
}
_HALF = (torch.float16, torch.bfloat16)


@fxr.pattern
class ConvBn:
    """A convolution whose only reader is a batch norm; what does nothing may stand between."""

    conv: nn.Conv1d | nn.Conv2d | nn.Conv3d | OwnForward
    made: fxr.Value
    between: tuple[
        nn.Identity | nn.Dropout | nn.Dropout1d | nn.Dropout2d | nn.Dropout3d
        | nn.AlphaDropout | nn.FeatureAlphaDropout,
        ...,
    ]  # fmt: skip
    bn: nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d


def same_rank(m: ConvBn) -> str | None:
    """The batch norm must be of the convolution's rank and number of channels."""
    if _rank(m.conv) != _rank(m.bn):
        return f"a {_name(m.bn)} does not normalise the output of a {_name(m.conv)}"
    if m.conv.out_channels != m.bn.num_features:
        return f"{m.conv.out_channels} channels can't be normalised by {m.bn.num_features} features"
    return None


def reads_a_batch(m: ConvBn) -> str | None:
    """Of a tensor without a batch, a batch norm takes what comes second for the channels."""
    if m.made.rank is None or m.made.rank == _rank(m.conv) + 2:
        return None
    return (
        f"the {_name(m.conv)} makes a {m.made.rank}-d tensor, which has no batch dimension; of "
        "that the batch norm does not normalise the channels"
    )


def has_running_stats(m: ConvBn) -> str | None:
    """The batch norm must normalise by stored statistics, not by those of the batch."""
    if m.bn.running_mean is None or m.bn.running_var is None:
        return "the batch norm keeps no running statistics and normalises by those of each batch"
    return None


def same_dtype(m: ConvBn) -> str | None:
    """The types must be such that the folded convolution's result has the batch norm's type."""
    conv, bn = m.conv.weight.dtype, {t.dtype for t in _tensors(m.bn)}
    # Torch lets a batch norm in float32 follow a convolution in half precision, and gives half.
    if bn == {conv} or (bn == {torch.float32} and conv in _HALF):
        return None
    found = " and ".join(sorted(str(each).removeprefix("torch.") for each in bn))
    return f"the convolution is in {str(conv).removeprefix('torch.')} and the batch norm in {found}"


def same_device(m: ConvBn) -> str | None:
    """All tensors must be on one device."""
    devices = {t.device for t in (m.conv.weight, *_tensors(m.bn))}
    if len(devices) == 1:
        return None
    return f"their tensors are on {' and '.join(sorted(map(str, devices)))}"


@fxr.rule(where=[same_rank, reads_a_batch, has_running_stats, same_dtype, same_device])
def fold_conv_bn(m: ConvBn) -> fxr.Replace:
    """Scale the weight and shift the bias as the batch norm would scale and shift the output."""
    return fxr.Replace(scaled_and_shifted(m.conv, *scale_and_shift(m.bn)), slot="conv")


conv_bn = fxr.RuleSet(
    "conv_bn",
    [fold_conv_bn, fold_held_norm],
    doc="Fold each batch norm into the convolution before it.",
)


def _tensors(bn: nn.Module) -> list[torch.Tensor]:
    held = (*bn._parameters.values(), bn._buffers["running_mean"], bn._buffers["running_var"])
    return [each for each in held if each is not None]


def _rank(module: nn.Module) -> int:
    return next(rank for kind, rank in _RANK.items() if isinstance(module, kind))


def _name(module: nn.Module) -> str:
    return type(module).__name__
