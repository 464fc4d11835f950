"""Copies of a module with other tensors or attributes, and how two modules differ."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import nn

from .state import REGISTRIES
from .torch_private import COMPILED_CALL

M = TypeVar("M", bound=nn.Module)

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_GEOMETRY = ("kernel_size", "stride", "padding", "dilation", "padding_mode")


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
    held: Any = (new._parameters, new._buffers, new._modules, state)
    for name, value in (changes | _derived(module, changes)).items():
        found = next((each for each in held if name in each), None)
        if found is None:
            known = ", ".join([*module._parameters, *module._buffers])
            raise AttributeError(f"{type(module).__name__} has no {name!r}; its tensors: {known}")
        found[name] = _parameter(module, found[name], value) if found is held[0] else value
    return new


def _derived(module: nn.Module, changes: dict[str, Any]) -> dict[str, Any]:
    """What a convolution holds besides that is made of these, such as the padding by each side."""
    kind = next((each for each in _CONVS if isinstance(module, each)), None)
    if kind is None or changes.keys().isdisjoint(_GEOMETRY):
        return {}
    given = {name: changes.get(name, getattr(module, name)) for name in _GEOMETRY}
    made = kind(1, 1, **given, device="meta").__dict__
    return {k: v for k, v in made.items() if isinstance(v, tuple | list) and k in module.__dict__}


def _parameter(
    module: nn.Module, old: nn.Parameter | None, value: torch.Tensor | None
) -> nn.Parameter | None:
    # isinstance() would ask torch's metaclass, in Python.
    if value is None or issubclass(type(value), nn.Parameter):
        return value  # type: ignore[return-value]
    held = (old, *module._parameters.values())
    like = next((each for each in held if each is not None), None)
    wants_grad = like is None or like.requires_grad
    return nn.Parameter(value, wants_grad and (value.is_floating_point() or value.is_complex()))


def same_module(one: nn.Module, other: nn.Module) -> bool:
    """Whether two modules are alike in all they hold, their tensors to the bit if they have any."""
    return one is other or (type(one) is type(other) and _same(one.__dict__, other.__dict__))


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
