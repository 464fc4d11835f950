"""Random inputs and statistics of batch norms, under which an error of a rewrite would show."""

from __future__ import annotations

import copy

import nets
import pytest
import torch
from torch import nn

from fxrewrite.cli.randomising import random_input, randomise_batch_norms
from fxrewrite.errors import LoadError
from fxrewrite.module_utils.running import run


def test_random_inputs_fit_the_model() -> None:
    """An input has the described shape and dtype, else the model's dtype; integers are small."""
    model = nn.Linear(2, 2).bfloat16()
    assert random_input("4,3", model).dtype == torch.bfloat16
    assert random_input("4,3:complex64", model).dtype == torch.complex64
    words = random_input("50:int32", model)
    assert (words.dtype, words.shape) == (torch.int32, (50,))
    assert (int(words.min()), int(words.max())) == (0, 9)
    with pytest.raises(LoadError):
        random_input("4,0", model)


def test_random_statistics_do_not_drown_the_input() -> None:
    """Through 40 randomised layers the output still depends on the input, so errors show too."""

    def block() -> list[nn.Module]:
        depthwise = nn.Conv2d(32, 32, 3, padding=1, groups=32, bias=False)
        pointwise = nn.Conv2d(32, 32, 1, bias=False)
        return [depthwise, nn.BatchNorm2d(32), nn.ReLU6(), pointwise, nn.BatchNorm2d(32)]

    model = nn.Sequential(*[layer for _ in range(20) for layer in block()]).eval()
    one, other = torch.randn(2, 1, 32, 8, 8)
    assert randomise_batch_norms(model, (one,)) == 40
    a, b = (run(model, each).output for each in (one, other))
    assert torch.isfinite(a).all()
    assert (a - b).abs().max() > 1e-2 * a.abs().max()


def test_randomising_draws_all_that_a_fold_reads() -> None:
    """Means, variances, weights of both signs and biases differ from channel to channel."""
    model = nn.Sequential(nn.Conv2d(3, 64, 1), nn.BatchNorm2d(64)).eval()
    randomise_batch_norms(model, (torch.randn(2, 3, 8, 8),))
    bn = model[1]
    for drawn in (bn.running_mean, bn.running_var, bn.weight, bn.bias):
        assert drawn.unique().numel() > 60
    assert (bn.running_var > 0).all()
    assert (bn.weight < 0).any()
    assert (bn.weight > 0).any()


def test_trained_batch_norms_are_not_randomised() -> None:
    """Statistics that are not the initial ones are the model's own, and stay."""
    model = nets.randomise(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))
    before = copy.deepcopy(model.state_dict())
    assert randomise_batch_norms(model, (torch.randn(2, 3, 8, 8),)) == 0
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_batch_norms_that_the_run_misses_are_randomised_too() -> None:
    """A batch norm that is not called, or not reached as the input is wrong, is randomised."""
    model = nn.ModuleDict({"unused": nn.BatchNorm2d(4)})
    assert randomise_batch_norms(model, (torch.ones(1),)) == 1
    assert model["unused"].running_mean.any()


def test_statistics_of_another_shape_than_the_weight_are_randomised() -> None:
    """A subclass may keep statistics for each of several parts of a batch."""
    bn = nn.BatchNorm2d(4)
    bn.running_mean, bn.running_var = torch.zeros(8), torch.ones(8)
    assert randomise_batch_norms(nn.Sequential(bn).eval(), (torch.ones(2, 4, 3, 3),)) == 1
    assert len(bn.running_mean.unique()) == len(bn.running_var.unique()) == 8
    assert len(bn.weight.unique()) == 4
