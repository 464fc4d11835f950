"""Holds a rule to its promise: what it is given is compared afterwards, and put back."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

_ABSENT = object()


class Snapshot:
    """The state of some modules and tensors at one moment: attributes, and what tensors hold."""

    # Every site pays for this twice, so the records are plain tuples.
    def __init__(self, modules: Iterable[nn.Module], tensors: Iterable[torch.Tensor] = ()) -> None:
        self._attributes: list[tuple[nn.Module, dict[str, Any]]] = []
        # Parameters, buffers, hooks and children live in dicts and sets, which change in place.
        self._registries: list[tuple[nn.Module, str, Any, Any]] = []
        held = {id(tensor): tensor for tensor in tensors}
        for module in modules:
            for each in module.modules() if module._modules else (module,):
                self._attributes.append((each, each.__dict__.copy()))
                for name, value in each.__dict__.items():
                    if isinstance(value, (dict, set)):
                        before = value.copy() if value else ()
                        self._registries.append((each, name, value, before))
                for tensor in (*each._parameters.values(), *each._buffers.values()):
                    if tensor is not None:
                        held[id(tensor)] = tensor
        # A detached tensor keeps the storage when the original is given another one.
        self._tensors = [
            (tensor, data := tensor.detach(), data.clone(), tensor.requires_grad)
            for tensor in held.values()
        ]

    def difference(self) -> str | None:
        """What has changed since, in words, or None."""
        for module, before in self._attributes:
            if (name := _changed(before, module.__dict__)) is not None:
                return f"{type(module).__name__}.{name}"
        for module, registry, now, before in self._registries:
            if (now or before) and (name := _changed(before, now)) is not None:
                named = registry in ("_parameters", "_buffers", "_modules")
                return f"{type(module).__name__}.{name if named else registry.strip('_')}"
        for tensor, data, copy, requires_grad in self._tensors:
            if tensor.requires_grad is not requires_grad or not _is_intact(tensor, data, copy):
                return f"the {tuple(data.shape)} tensor it was given"
        return None

    def restore(self) -> None:
        """Put everything back as it was."""
        for module, before in self._attributes:
            module.__dict__.clear()
            module.__dict__.update(before)
        for _, _, registry, before in self._registries:
            registry.clear()
            registry.update(before)
        for tensor, data, copy, requires_grad in self._tensors:
            if not _is_intact(tensor, data, copy):
                tensor.data = data
                data.copy_(copy)
            tensor.requires_grad_(requires_grad)


class ModelState:
    """What tracing a model may change: its modules' attributes, and tensors that FX hands out.

    Args:
        model: the model.
        buffers: whether to guard what buffers hold, too, for a tracer that does not record reads
            of them. Reads of parameters are always recorded.
    """

    def __init__(self, model: nn.Module, *, buffers: bool) -> None:
        self._registries: list[tuple[str, dict[str, Any], dict[str, Any]]] = []
        self._tensors: list[tuple[str, torch.Tensor, torch.Tensor, torch.Tensor]] = []
        for name, module in model.named_modules():
            for registry in (module.__dict__, module._buffers, module._modules):
                if registry:
                    self._registries.append((name, registry, registry.copy()))
            if torch.Tensor in map(type, module.__dict__.values()):
                self._hold(name, module.__dict__)
            if buffers:
                self._hold(name, module._buffers)

    def _hold(self, name: str, registry: dict[str, Any]) -> None:
        for key, value in registry.items():
            if isinstance(value, torch.Tensor):
                data = value.detach()
                self._tensors.append((f"{name}.{key}".strip("."), value, data, data.clone()))

    def restore(self) -> str | None:
        """Put everything back, and name the first thing that was changed."""
        found = None
        for name, registry, before in self._registries:
            if (key := _changed(before, registry)) is not None:
                found = found or f"{name}.{key}".strip(".")
                registry.clear()
                registry.update(before)
        for name, tensor, data, copy in self._tensors:
            if not _is_intact(tensor, data, copy):
                found = found or name
                tensor.data = data
                data.copy_(copy)
        return found


def _changed(before: Any, now: Any) -> str | None:
    """The first key whose entry is not the same object any more."""
    if isinstance(now, set):
        return next(map(str, now.symmetric_difference(before)), None)
    before = before or {}
    same_keys = before.keys() == now.keys()
    if same_keys and all(map(operator.is_, before.values(), now.values())):
        return None
    union = {**before, **now}
    changed = (k for k in union if before.get(k, _ABSENT) is not now.get(k, _ABSENT))
    return next(map(str, changed), None)


def _is_intact(tensor: torch.Tensor, data: torch.Tensor, copy: torch.Tensor) -> bool:
    if data.is_meta:
        return tensor.shape == data.shape
    if tensor.data_ptr() != data.data_ptr():
        return False
    if torch.equal(tensor, copy):
        return True
    same_shape = tensor.shape == copy.shape
    return same_shape and torch.allclose(tensor, copy, rtol=0, atol=0, equal_nan=True)
