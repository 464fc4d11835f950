"""Random inputs and random batch norms to verify a model with, the same ones each time."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
from torch import nn

from ..errors import LoadError
from ..module_utils.running import SEED, called, cloned

BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm

_ABOUT_ZERO = 1e-3


def random_input(text: str, model: nn.Module) -> torch.Tensor:
    """A random tensor as described, such as `10,3,224,224` or `1,16:int64`.

    Floating-point numbers are normally distributed; integers lie between 0 and 9, so that they
    index even a small embedding.

    >>> random_input("2,3", nn.Linear(3, 1)).shape
    torch.Size([2, 3])

    Args:
        text: sizes, then an optional dtype; by default it is that of the model's first
            floating-point parameter.
        model: the model that the input is for; its device is taken.

    Raises:
        LoadError: the text describes no tensor.
    """
    sizes, colon, name = text.partition(":")
    parameters = [p for p in model.parameters() if p.is_floating_point() or p.is_complex()]
    like = parameters[0] if parameters else torch.empty(0)
    dtype = getattr(torch, name, None) if colon else like.dtype
    try:
        shape = [int(size) for size in sizes.split(",")]
    except ValueError:
        shape = [0]
    if min(shape) < 1 or not isinstance(dtype, torch.dtype):
        raise LoadError(f"input {text!r} is not of the form 10,3,224,224 or 1,16:int64")
    generator = torch.Generator().manual_seed(SEED)
    if dtype.is_floating_point or dtype.is_complex:
        made = torch.randn(shape, generator=generator, dtype=dtype)
    else:
        made = torch.randint(0, 10, shape, generator=generator).to(dtype)
    return made.to(like.device)


def randomise_batch_norms(model: nn.Module, inputs: Any) -> int:
    """Give each batch norm that was never trained random statistics and affine weights, in place.

    A fresh batch norm does nothing, so a wrong fold of it would show nowhere. The statistics are
    drawn to the scale of what each batch norm is given: drawn blindly, they let a deep model's
    signal fade layer by layer, and a wrong fold in an early layer would show nowhere either.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)).eval()
    >>> randomise_batch_norms(model, (torch.ones(1, 3, 4, 4),))
    1

    Args:
        model: the model in eval mode.
        inputs: what it is called with, in one of the forms that `verify` takes.

    Returns:
        How many batch norms there were whose statistics were the initial ones.
    """
    generator = torch.Generator().manual_seed(SEED)
    norms = [each for each in model.modules() if isinstance(each, BatchNorm)]
    count = 0

    def randomise(bn: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        nonlocal count
        if isinstance(bn, BatchNorm) and _is_fresh(bn):
            count += 1
            scale = float(given[0].abs().double().square().mean().sqrt())
            _randomise(bn, scale if 0 < scale < math.inf else 1.0, generator)

    with contextlib.ExitStack() as hooks:
        for bn in norms:
            hooks.callback(bn.register_forward_pre_hook(randomise).remove)
        # An input that the model does not take is reported when the model is verified.
        hooks.enter_context(contextlib.suppress(Exception))
        called(model, cloned(inputs))
    for bn in norms:
        randomise(bn, (torch.ones(()),))  # those that this run did not come to
    return count


def randomise_constants(model: nn.Module) -> int:
    """Give random values to each parameter that is one number throughout, in place.

    Behind a layer that scales by zero, or by next to nothing, a wrong rewrite would show nowhere.
    Models are often initialised so: the last layer of a branch, a layer scale, a classifier.

    >>> linear = nn.Linear(4, 2)
    >>> _ = nn.init.zeros_(linear.weight)
    >>> randomise_constants(linear)
    1

    Args:
        model: the model; a parameter of a single number is left alone unless it is about zero.

    Returns:
        How many parameters there were.
    """
    generator = torch.Generator().manual_seed(SEED)
    count = 0
    for parameter in model.parameters():
        if nn.parameter.is_lazy(parameter) or not parameter.is_floating_point():
            continue
        values = parameter.detach().flatten()
        if not len(values) or not bool((values == values[0]).all()):
            continue
        if len(values) == 1 and abs(float(values)) > _ABOUT_ZERO:
            continue
        # A vector scales or shifts channels; of a larger one, the products are summed.
        is_vector = len(values) == max(parameter.shape, default=1)
        spread = 0.2 if is_vector else (parameter.shape[0] / len(values)) ** 0.5
        drawn = torch.randn(parameter.shape, generator=generator) * spread
        with torch.no_grad():
            parameter.add_(drawn.to(parameter))
        count += 1
    return count


def _is_fresh(bn: BatchNorm) -> bool:
    mean, var = bn.running_mean, bn.running_var
    if mean is None or var is None or nn.parameter.is_lazy(mean):
        return False
    return not mean.any() and bool((var == 1).all())


@torch.no_grad()
def _randomise(bn: BatchNorm, scale: float, generator: torch.Generator) -> None:
    def normal(like: torch.Tensor, spread: float) -> torch.Tensor:
        return spread * torch.randn(like.shape, generator=generator)

    mean, var = bn.running_mean, bn.running_var
    assert mean is not None
    assert var is not None
    mean.copy_(normal(mean, 0.2 * scale))
    var.copy_(scale**2 * (0.5 + torch.rand(var.shape, generator=generator)))
    for parameter, spread in ((bn.weight, 1.0), (bn.bias, 0.2)):
        if parameter is not None:
            parameter.copy_(normal(parameter, spread))
