"""Copies of a module with other tensors or attributes, and how two modules differ."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import nn

from .state import REGISTRIES
from .torch_private import COMPILED_CALL

M = TypeVar("M", bound=nn.Module)


def evolve(module: M, /, **changes: Any) -> M:
    """A shallow copy of a module with these parameters, buffers, children or attributes changed.

    All that is not named is shared with the original, which is left as it was.

    >>> conv = nn.Conv2d(3, 8, 1, bias=False)
    >>> biased = evolve(conv, bias=torch.zeros(8))
    >>> biased.weight is conv.weight, conv.bias is None, biased.bias.requires_grad
    (True, True, True)

    Args:
        module: the module to copy. Its children are shared.
        changes: by name, a tensor (any shape and dtype) or None for a parameter or buffer, a module
            for a child, or any value for another attribute. A new parameter keeps the
            `requires_grad` of the one it replaces, or else of the module's other parameters.

    Raises:
        AttributeError: the module has nothing of that name.
    """
    new = type(module).__new__(type(module))
    state = new.__dict__
    state.update(module.__dict__)
    for registry in REGISTRIES:
        state[registry] = state[registry].copy()
    state.pop(COMPILED_CALL, None)
    for name, value in changes.items():
        if name in new._parameters:
            new._parameters[name] = _parameter(module, module._parameters[name], value)
        elif name in new._buffers:
            new._buffers[name] = value
        elif name in new._modules:
            new._modules[name] = value
        elif name in new.__dict__:
            new.__dict__[name] = value
        else:
            known = ", ".join([*module._parameters, *module._buffers])
            raise AttributeError(f"{type(module).__name__} has no {name!r}; its tensors: {known}")
    return new


def _parameter(
    module: nn.Module, old: nn.Parameter | None, value: torch.Tensor | None
) -> nn.Parameter | None:
    # isinstance() would ask torch's metaclass, in Python.
    if value is None or issubclass(type(value), nn.Parameter):
        return value  # type: ignore[return-value]
    like = old
    if like is None:
        like = next((each for each in module._parameters.values() if each is not None), None)
    wants_grad = like is None or like.requires_grad
    return nn.Parameter(value, wants_grad and (value.is_floating_point() or value.is_complex()))


def same_module(one: nn.Module, other: nn.Module) -> bool:
    """Whether two modules are alike in all they hold, their tensors to the bit if they have any."""
    if one is other:
        return True
    mine, theirs = one.__dict__, other.__dict__
    return (
        type(one) is type(other)
        and mine.keys() == theirs.keys()
        and all(_same(mine[name], theirs[name]) for name in mine)
    )


def differs_in_numbers(one: nn.Module, other: nn.Module) -> bool:
    """Whether two modules differ at most in mode, their tensors' numbers, and having a bias."""
    mine, theirs = one.__dict__, other.__dict__
    rest = mine.keys() - {"_parameters", "_buffers", "training"}
    held, given = ({**each._parameters, **each._buffers} for each in (one, other))
    return (
        type(one) is type(other)
        and mine.keys() == theirs.keys()
        and held.keys() == given.keys()
        and all(_same(mine[name], theirs[name]) for name in rest)
        and all(_metadata(held[name]) == _metadata(given[name]) for name in held.keys() - {"bias"})
    )


def _metadata(tensor: torch.Tensor | None) -> Any:
    return None if tensor is None else (tensor.shape, tensor.dtype, tensor.device)


def _same(one: Any, other: Any) -> bool:
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        alike = one.dtype == other.dtype and one.requires_grad == other.requires_grad
        if one.device != other.device or not alike or one.stride() != other.stride():
            return False
        return one.shape == other.shape if one.is_meta else torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, nn.Module):
        return same_module(one, other)
    return isinstance(one, bool | int | float | str | set) and one == other
