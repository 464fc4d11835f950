"""Layers with a forward of their own, such as libraries have, to draw models with."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


class PadsBySize(nn.Conv2d):
    """Pads with zeros, as many as the size of its input asks for."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The convolution of what is padded."""
        sizes: Any = zip(x.shape[-2:], self.kernel_size, self.stride, strict=False)
        missing = [max((math.ceil(n / s) - 1) * s + k - n, 0) for n, k, s in sizes]
        pad = [side for n in reversed(missing) for side in (n // 2, n - n // 2)]
        return F.conv2d(F.pad(x, pad), self.weight, self.bias, self.stride)


class PadsOneSide(nn.Conv2d):
    """Pads on one side alone, which a convolution can't."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The convolution of what is padded."""
        return super().forward(F.pad(x, (0, 1, 1, 0)))


class HoldsNorm(nn.Conv2d):
    """Calls a norm inside it on what a convolution makes, and then a ReLU."""

    def __init__(self, *args: Any, norm: nn.Module, **options: Any) -> None:
        """A convolution by the other arguments."""
        super().__init__(*args, **options)
        self.norm = norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """What the norm makes of the convolution."""
        return torch.relu(self.norm(super().forward(x)))
