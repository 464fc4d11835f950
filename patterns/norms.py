"""Norms that are a fixed scale and shift per channel in eval mode, and how to add one's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

import attrs
import torch
from torch import nn

import fxrewrite as fxr

from .affine import scale_and_shift, wide

Vectors: TypeAlias = tuple[torch.Tensor, torch.Tensor]
Adapter: TypeAlias = Callable[[Any], "Vectors | str"]
F = TypeVar("F", bound=Adapter)


class Norm(fxr.Family):
    """A norm whose scale and shift per channel are known."""


class AnotherBatchNorm(nn.BatchNorm2d, fxr.Family):
    """A batch norm of another type than torch's three: frozen, or with an activation behind it."""


@attrs.frozen
class _Known:
    """What there is to know of a kind of norm.

    Args:
        adapter: gives its scale and shift, or the reason why it has none.
        dims: how many dimensions may follow the channels in what it reads; None for any number.
        checks: whether it raises for an input of another rank, or with other channels.
        half: whether it may read half precision with tensors in float32, and gives half.
        rest: the names of children that it calls on the result, in order.
    """

    adapter: Adapter
    dims: tuple[int, ...] | None = None
    checks: bool = False
    half: bool = False
    rest: tuple[str, ...] = ()


def foldable(kind: type[nn.Module] | str, *, dims: int | None = None) -> Callable[[F], F]:
    """Make a kind of norm foldable: the function decorated gives its scale and shift per channel.

    In eval mode, the norm must compute `x * scale + shift` along dimension 1 of its input, the
    first being the batch, and give the type of its tensors, which must be that of the input.

    >>> class Whiten(nn.Module):
    ...     def __init__(self, channels):
    ...         super().__init__()
    ...         self.mean = nn.Buffer(torch.zeros(channels))
    ...         self.std = nn.Buffer(torch.ones(channels))
    ...     def forward(self, x):
    ...         return (x - self.mean[:, None, None]) / self.std[:, None, None]
    >>> @foldable(Whiten, dims=2)
    ... def whiten(norm):
    ...     return 1 / norm.std, -norm.mean / norm.std
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 1), Whiten(8)).eval()
    >>> fxr.rewrite(model, "affine")[0]
    Sequential(
      (0): Conv2d(3, 8, kernel_size=(1, 1), stride=(1, 1))
    )

    Args:
        kind: the module's type, or its name with that of the module that defines it, so that
            nothing needs to be imported for it. Subclasses count if they override nothing.
        dims: how many dimensions follow the channels in what the norm reads; by default any number.

    Returns:
        a decorator. The function gets a copy of the norm with its tensors in float64 (complex128
        for complex ones), and returns two vectors of shape (C,), or the reason as a string why
        this norm is no fixed scale and shift.
    """

    def declare(adapter: F) -> F:
        allowed = None if dims is None else (dims,)
        Norm.add(kind, _Known(lambda norm: adapter(_widened(norm)), allowed))
        return adapter

    return declare


def vectors(norm: nn.Module) -> Vectors | str:
    """A norm's scale and shift, of shape (C,), or the reason why it has none."""
    found = _known(norm).adapter(norm)
    if isinstance(found, str):
        return found
    scale, shift = found
    if scale.dim() != 1 or scale.shape != shift.shape:
        shapes = f"{tuple(scale.shape)} and {tuple(shift.shape)}"
        return f"the scale and shift of {type(norm).__name__} are of shape {shapes}, not one (C,)"
    return scale, shift


def reads_dims(norm: nn.Module, dims: int) -> bool:
    """Whether a norm reads what has that many dimensions behind its channels, dimension 1."""
    allowed = _known(norm).dims
    return allowed is None or dims in allowed


def may_lack_batch(norm: nn.Module, x: fxr.Value) -> str | None:
    """Why a norm may not normalise dimension 1 of what it reads, of unknown rank, or None.

    Some take an input without a batch for one with a batch, and normalise another dimension.
    """
    if x.rank is not None or _known(norm).checks:
        return None
    return (
        f"a {type(norm).__name__} also takes an input without a batch, and whether this one has "
        f"one is not known; {x.unknown}"
    )


def takes_half(norm: nn.Module) -> bool:
    """Whether a norm in float32 may read half precision, and gives half."""
    return _known(norm).half


def rest_of(norm: nn.Module) -> nn.Module | None:
    """What a norm does after it has normalised, as a module, or None."""
    children = [getattr(norm, name, None) for name in _known(norm).rest]
    rest = [each for each in children if each is not None and not isinstance(each, nn.Identity)]
    return None if not rest else rest[0] if len(rest) == 1 else nn.Sequential(*rest)


def tensors_of(norm: nn.Module) -> list[torch.Tensor]:
    """The tensors that a norm itself computes with."""
    held = (*norm._parameters.values(), *norm._buffers.values())
    return [t for t in held if t is not None and (t.is_floating_point() or t.is_complex())]


def _known(norm: nn.Module) -> _Known:
    known: _Known = Norm.known_of(norm)
    return known


def _widened(norm: nn.Module) -> nn.Module:
    changes = {
        name: tensor.detach().to(wide(tensor.dtype), copy=True)
        for name, tensor in (*norm._parameters.items(), *norm._buffers.items())
        if tensor is not None and (tensor.is_floating_point() or tensor.is_complex())
    }
    return fxr.evolve(norm, **changes)


def _running(norm: Any) -> Vectors | str:
    """The batch norms, and what computes as they do."""
    if norm.running_mean is None or norm.running_var is None:
        return f"the {type(norm).__name__} keeps no running statistics and uses those of its input"
    return scale_and_shift(norm)


Norm.add(nn.BatchNorm1d, _Known(_running, (0, 1), half=True))
Norm.add(nn.BatchNorm2d, _Known(_running, (2,), checks=True, half=True))
Norm.add(nn.BatchNorm3d, _Known(_running, (3,), checks=True, half=True))
# Of what is one dimension short, an instance norm takes the first for the channels, as it should.
for _kind, _dims in {nn.InstanceNorm1d: 1, nn.InstanceNorm2d: 2, nn.InstanceNorm3d: 3}.items():
    Norm.add(_kind, _Known(_running, (_dims,), checks=True))


def _frozen(norm: Any) -> Vectors:
    """The copies of torchvision's frozen batch norm whose forward has a number for `eps`."""
    scale = norm.weight * (norm.running_var.to(wide(norm.running_var.dtype)) + 1e-5).rsqrt()
    return scale, norm.bias - norm.running_mean * scale


def _add(kind: type[nn.Module] | str, known: _Known) -> None:
    Norm.add(kind, known)
    AnotherBatchNorm.add(kind, known)


_add(nn.SyncBatchNorm, _Known(_running, half=True))
# Other libraries' norms are named, so that nothing is imported for them.
_TIMM = "timm.layers.norm_act"
_THEN = ("drop", "act")
_add("torchvision.ops.misc.FrozenBatchNorm2d", _Known(_running, (2,)))
_add(f"{_TIMM}.BatchNormAct2d", _Known(_running, (2,), checks=True, half=True, rest=_THEN))
_add(f"{_TIMM}.SyncBatchNormAct", _Known(_running, half=True, rest=_THEN))
_add(f"{_TIMM}.FrozenBatchNormAct2d", _Known(_running, (2,), rest=_THEN))
for _model, _name in {
    "conditional_detr": "ConditionalDetr",
    "d_fine": "DFine",
    "dab_detr": "DabDetr",
    "deformable_detr": "DeformableDetr",
    "deimv2": "Deimv2",
    "detr": "Detr",
    "grounding_dino": "GroundingDino",
    "mm_grounding_dino": "MMGroundingDino",
    "pp_doclayout_v2": "PPDocLayoutV2",
    "pp_doclayout_v3": "PPDocLayoutV3",
    "pp_doclayout_v4": "PPDocLayoutV4",
    "rt_detr": "RTDetr",
    "rt_detr_v2": "RTDetrV2",
    "table_transformer": "TableTransformer",
}.items():
    _path = f"transformers.models.{_model}.modeling_{_model}.{_name}FrozenBatchNorm2d"
    _add(_path, _Known(_frozen, (2,)))
