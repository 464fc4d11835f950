"""The tensors of a module, and whether a tensor holds numbers alone."""

from __future__ import annotations

import cmath
from collections.abc import Iterator

import torch
from torch import nn


def named_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """A module's parameters and buffers, those of its submodules included, by name.

    >>> [name for name, _ in named_tensors(nn.Linear(2, 3))]
    ['weight', 'bias']
    """
    if not module._modules:  # named_parameters() and named_buffers() cost more than a fold
        held = (*module._parameters.items(), *module._buffers.items())
        yield from ((name, tensor) for name, tensor in held if tensor is not None)
    else:
        yield from (*module.named_parameters(), *module.named_buffers())


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether a tensor holds no infinity and no NaN, as far as it has numbers to look at.

    >>> is_finite(torch.tensor([1.0, float("inf")])), is_finite(torch.ones(2, device="meta"))
    (False, True)
    """
    if tensor.is_meta or tensor.is_nested or tensor.layout is not torch.strided:
        return True
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    # A sum shows any infinity or NaN at a fourth of the cost, but it may overflow by itself.
    if tensor.dtype.itemsize > 1 and cmath.isfinite(tensor.sum().item()):
        return True
    return bool(torch.isfinite(tensor.to(torch.complex128)).all())
