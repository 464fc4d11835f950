"""Random tensors for models, such that no rewrite of them is trivially right."""

from __future__ import annotations

import math

import torch
from torch import nn


def randomise(model: nn.Module, seed: int = 0, decades: float = 0.0) -> nn.Module:
    """Fill a model's parameters and running statistics; the model is returned, in eval mode.

    Vectors, such as the weights of norms, are of both signs, some of their entries near zero and
    some zero. Matrices and kernels are scaled such that values neither fade nor grow.

    >>> bn = randomise(nn.BatchNorm1d(64))
    >>> bool((bn.weight < 0).any()), bool((bn.running_var > 0).all())
    (True, True)

    Args:
        model: any module; lazy and quantised parameters are left as they are.
        seed: of the numbers.
        decades: let the scales and variances of norms range over that many powers of ten up and
            down, per channel.
    """
    make = torch.Generator().manual_seed(seed)

    def normal(like: torch.Tensor) -> torch.Tensor:
        wide = torch.complex128 if like.is_complex() else torch.float64
        return torch.randn(like.shape, generator=make, dtype=wide)

    def spread(like: torch.Tensor) -> torch.Tensor:
        powers = torch.rand(like.shape, generator=make, dtype=torch.float64) * 2 - 1
        return 10 ** (powers * decades)

    def scales(like: torch.Tensor) -> torch.Tensor:
        drawn = normal(like) * spread(like)
        rare = torch.rand(like.shape, generator=make)
        drawn = torch.where(rare < 0.1, drawn * 1e-8, drawn)
        return torch.where(rare < 0.03, torch.zeros_like(drawn), drawn)

    done: set[int] = set()
    with torch.no_grad():
        for module in model.modules():
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is None or id(tensor) in done or not _holds_numbers(tensor):
                    continue
                done.add(id(tensor))
                if name == "running_var":
                    tensor.copy_((0.5 + normal(tensor).abs()) * spread(tensor))
                elif name == "running_mean" or (name in module._parameters and "bias" in name):
                    tensor.copy_(normal(tensor))
                elif name in module._parameters and tensor.dim() > 1:
                    tensor.copy_(normal(tensor) / math.sqrt(max(1, tensor[0].numel())))
                elif name in module._parameters:
                    tensor.copy_(scales(tensor))
    return model.eval()


def _holds_numbers(tensor: torch.Tensor) -> bool:
    if nn.parameter.is_lazy(tensor) or tensor.is_meta:
        return False
    return tensor.is_floating_point() or tensor.is_complex()


def random_tensor(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Normally distributed numbers in float64."""
    make = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=make, dtype=torch.float64)
