"""What `randomise` fills a model with."""

from __future__ import annotations

import torch
from torch import nn

from fxrewrite.testing import randomise


def test_scales_are_of_both_signs_some_tiny_and_some_zero() -> None:
    """A rule that divides by a scale, or drops its sign, is wrong for some of them."""
    scales = randomise(nn.BatchNorm1d(1000)).weight
    assert (scales > 0.1).any()
    assert (scales < -0.1).any()
    assert (scales == 0).any()
    assert ((scales != 0) & (scales.abs() < 1e-7)).sum() > 20


def test_variances_are_positive_and_means_are_of_both_signs() -> None:
    """Statistics are such as a model could have gathered."""
    norm = randomise(nn.BatchNorm1d(1000))
    assert isinstance(norm.running_mean, torch.Tensor)
    assert isinstance(norm.running_var, torch.Tensor)
    assert (norm.running_var >= 0.5).all()
    assert norm.running_mean.min() < -1 < 1 < norm.running_mean.max()
