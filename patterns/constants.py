"""Sums and products with a constant, as a scale and a shift of the channels that they meet."""

from __future__ import annotations

import numbers
from collections.abc import Iterable
from typing import Any, TypeAlias

import attrs
import torch

import fxrewrite as fxr

from .affine import wide
from .spellings import ADD, DIV, MUL, NEG, RSUB, SUB

ARITHMETIC = (*ADD, *SUB, *RSUB, *MUL, *DIV, *NEG)
Constant: TypeAlias = "torch.Tensor | int | float | complex"


@attrs.frozen
class Where:
    """The tensor that an operation meets: its channels, and where they are.

    Args:
        channels: how many there are.
        from_end: the place of the channels' dimension, counted from the last one, which is 1.
        rank: the number of dimensions, or None where it is not known.
        unknown: why it is not known, then.
        dtype: the type of what the tensor holds.
        device: where it is.
    """

    channels: int
    from_end: int
    rank: int | None
    unknown: str
    dtype: torch.dtype
    device: torch.device


Vectors: TypeAlias = tuple[torch.Tensor | None, torch.Tensor | None]


def vectors(call: fxr.Call, where: Where) -> Vectors | str:
    """The scale and shift of shape (C,), None for none, or the reason why the call is no such.

    The operations are those of `ARITHMETIC`: with `alpha` as torch has it, `x + alpha * c`,
    `x - alpha * c`, `c - alpha * x`, `x * c`, `x / c` and `-x`.
    """
    written = {name: value for name, value in call.kwargs.items() if name in ("input", "other")}
    further = call.kwargs.keys() - written.keys() - {"alpha"}
    alpha = call.kwargs.get("alpha", 1)
    if further or not isinstance(alpha, int | float):
        return f"it is called with {', '.join(sorted(further)) or 'an alpha that is no number'}"
    is_first = call.takes == "input"
    if _is(call, NEG):
        return torch.full((where.channels,), -1.0, dtype=wide(where.dtype)), None
    if len(written) != 1:
        return f"it reads its constant by {' and '.join(call.kwargs) or 'no argument'}"
    (constant,) = written.values()
    reason = _misfit(constant, where)
    if reason is not None:
        return reason
    vector = _per_channel(constant, where)
    if _is(call, MUL):
        return vector, None
    if _is(call, DIV):
        return (1 / vector, None) if is_first else "a constant divided by a value is not affine"
    if _is(call, ADD):
        # The second operand is multiplied by alpha, be it the value or the constant.
        return (None, alpha * vector) if is_first else (_times(alpha, vector), vector)
    if _is(call, RSUB):
        is_first = not is_first
    return (None, -alpha * vector) if is_first else (_times(-alpha, vector), vector)


def _times(factor: float, like: torch.Tensor) -> torch.Tensor | None:
    return None if factor == 1 else torch.full_like(like, factor)


def _is(call: fxr.Call, spellings: Iterable[Any]) -> bool:
    return call.function in spellings


def _misfit(constant: Any, where: Where) -> str | None:
    """Why a constant does not do the same to all of a channel, or changes more than numbers."""
    if not isinstance(constant, torch.Tensor | numbers.Number):
        return f"its other operand is a {type(constant).__name__}"
    kind = torch.result_type(torch.empty(1, dtype=where.dtype, device="meta"), _typed(constant))
    if kind != where.dtype:
        own = _name(where.dtype)
        return f"the constant makes the result {_name(kind)}, and the layer is in {own}"
    if not isinstance(constant, torch.Tensor) or constant.dim() == 0:
        return None
    if constant.device != where.device:
        return f"the constant is on {constant.device}, and the layer on {where.device}"
    shape = tuple(constant.shape)
    at = len(shape) - where.from_end
    rest = shape if at < 0 else (*shape[:at], *shape[at + 1 :])
    if any(size != 1 for size in rest) or (at >= 0 and shape[at] not in (1, where.channels)):
        return (
            f"the constant, of shape {shape}, does not hold one number for each of the "
            f"{where.channels} channels"
        )
    if at > 0 and where.rank is None:
        return (
            f"the constant, of shape {shape}, adds a dimension where there is no batch; "
            f"{where.unknown}"
        )
    if where.rank is not None and len(shape) > where.rank:
        return f"the constant, of shape {shape}, adds a dimension to a {where.rank}-d tensor"
    return None


def _typed(constant: Any) -> Any:
    """The constant without what it holds, of the same part in type promotion."""
    if isinstance(constant, torch.Tensor):
        return torch.empty(constant.shape, dtype=constant.dtype, device="meta")
    return constant


def _per_channel(constant: Any, where: Where) -> torch.Tensor:
    dtype = wide(where.dtype)
    if not isinstance(constant, torch.Tensor):
        return torch.full((where.channels,), constant, dtype=dtype, device=where.device)
    flat = constant.detach().to(where.device, dtype).flatten()
    return flat.expand(where.channels) if flat.numel() == 1 else flat


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
