"""Holds a rule to its promise: what it is given is compared afterwards, and put back."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn


_ABSENT = object()


class Snapshot:
    """The state of some modules and tensors at one moment: attributes, and what tensors hold."""

    def __init__(self, modules: Iterable[nn.Module], tensors: Iterable[torch.Tensor] = ()) -> None:
        self._modules = [_ModuleState(each) for module in modules for each in module.modules()]
        held = {id(t): t for state in self._modules for t in state.tensors()}
        held.update((id(t), t) for t in tensors)
        self._tensors = {at: _TensorState(each) for at, each in held.items()}

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether this very tensor is part of what was recorded."""
        return id(tensor) in self._tensors

    def difference(self) -> str | None:
        """What has changed since, in words, or None."""
        for module in self._modules:
            if (name := module.difference()) is not None:
                return f"{type(module.module).__name__}.{name}"
        for tensor in self._tensors.values():
            if tensor.differs():
                return f"the {tensor.shape} tensor it was given"
        return None

    def restore(self) -> None:
        """Put everything back as it was."""
        for module in self._modules:
            module.restore()
        for tensor in self._tensors.values():
            if tensor.differs():
                tensor.restore()


class _ModuleState:
    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.attributes = dict(module.__dict__)
        # Parameters, buffers, hooks and children live in registries, which change in place.
        self.registries = [
            (name, value, value.copy())
            for name, value in self.attributes.items()
            if value.__class__ is dict or isinstance(value, (dict, set))
        ]

    def tensors(self) -> list[torch.Tensor]:
        held: list[Any] = [*self.attributes["_parameters"].values()]
        held += self.attributes["_buffers"].values()
        held += self.attributes.values()
        return [each for each in held if isinstance(each, torch.Tensor)]

    def difference(self) -> str | None:
        for name in _changed(self.attributes, self.module.__dict__):
            return name
        for registry_name, registry, before in self.registries:
            for name in _changed(before, registry):
                named = registry_name in ("_parameters", "_buffers", "_modules")
                return str(name) if named else registry_name.strip("_")
        return None

    def restore(self) -> None:
        self.module.__dict__.clear()
        self.module.__dict__.update(self.attributes)
        for _, registry, before in self.registries:
            registry.clear()
            registry.update(before)


class _TensorState:
    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self.shape = tuple(tensor.shape)
        self.requires_grad = tensor.requires_grad
        # Shares the storage, and keeps it when the tensor is given another one.
        self.data = tensor.detach()
        self.copy = None if tensor.is_meta else self.data.clone()

    def differs(self) -> bool:
        now = self.tensor
        if now.requires_grad != self.requires_grad or now.shape != self.data.shape:
            return True
        if self.copy is None:
            return False
        return now.data_ptr() != self.data.data_ptr() or not _equal(now, self.copy)

    def restore(self) -> None:
        self.tensor.data = self.data
        self.tensor.requires_grad_(self.requires_grad)
        if self.copy is not None:
            self.data.copy_(self.copy)


def _changed(before: Any, now: Any) -> list[Any]:
    """The keys whose entries are not the same objects any more."""
    if isinstance(before, set):
        return [*(before ^ now)]
    if len(now) == len(before) and all(now.get(key, _ABSENT) is before[key] for key in before):
        return []
    union = {**before, **now}
    return [key for key in union if before.get(key, _ABSENT) is not now.get(key, _ABSENT)]


def _equal(now: torch.Tensor, before: torch.Tensor) -> bool:
    return torch.equal(now, before) or torch.allclose(now, before, rtol=0, atol=0, equal_nan=True)
