"""The state of a model's parts at one moment, to compare with later and to put back."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

_ABSENT = object()
_IMMUTABLE = frozenset({bool, int, float, str, tuple, type(None)})
_OF_EVERY_MODULE = frozenset(nn.Module().__dict__)
_REGISTRIES = ("_parameters", "_buffers", "_modules")


class Snapshot:
    """All that is reached from some modules and tensors, down to what tensors hold.

    It holds a rule to its promise to change nothing that it is given. As a context, it puts
    everything back when an error leaves it.
    """

    def __init__(self, things: Iterable[Any]) -> None:
        self._classes: list[tuple[str, nn.Module, type[nn.Module]]] = []
        self._containers: list[tuple[str, Any, Any]] = []
        self._tensors: list[tuple[str, _Tensor]] = []
        self._seen: dict[int, Any] = {}
        for each in things:
            self._visit(type(each).__name__, each)

    def _visit(self, name: str, value: Any) -> None:
        if id(value) in self._seen:
            return
        if isinstance(value, nn.Module):
            self._classes.append((name, value, type(value)))
            inner: Iterable[tuple[Any, Any]] = [("", value.__dict__)]
        elif isinstance(value, torch.Tensor):
            self._tensors.append((name, _Tensor(value)))
            inner = [("", value.__dict__), ("grad", value.grad)]
        elif isinstance(value, dict | list | set):
            self._containers.append((name, value, value.copy()))
            inner = value.items() if isinstance(value, dict) else [("", each) for each in value]
        elif isinstance(value, tuple):
            inner = [("", each) for each in value]
        else:
            return
        self._seen[id(value)] = value
        for key, each in inner:
            shown = "" if key in _REGISTRIES else str(key)
            self._visit(f"{name}.{shown}".rstrip("."), each)

    def __enter__(self) -> Snapshot:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is not None:
            self.restore()

    def difference(self) -> str | None:
        """What has changed since, in words, or None."""
        for name, module, kind in self._classes:
            if type(module) is not kind:
                return f"the class of {name}"
        for name, now, before in self._containers:
            if (key := _changed(before, now)) is not None:
                return f"{name}.{key}".removesuffix(".")
        for name, tensor in self._tensors:
            if tensor.differs():
                return f"the tensor {name}"
        return None

    def restore(self) -> None:
        """Put everything back as it was."""
        for _, module, kind in self._classes:
            object.__setattr__(module, "__class__", kind)
        for _, now, before in self._containers:
            _refill(now, before)
        for _, tensor in self._tensors:
            tensor.restore()


class ModelState:
    """What tracing a model may change: its modules' attributes, and tensors that FX hands out.

    As a context, it puts everything back when an error leaves it.

    Args:
        model: the model.
        buffers: whether to guard what buffers hold, too, for a tracer that does not record reads
            of them. Reads of parameters are always recorded.
    """

    def __init__(self, model: nn.Module, *, buffers: bool) -> None:
        self._registries: list[tuple[str, Any, Any]] = []
        self._tensors: list[tuple[str, _Tensor]] = []
        for name, module in model.named_modules():
            for registry in (module.__dict__, module._buffers, module._modules):
                if registry:
                    self._registries.append((name, registry, registry.copy()))
            for key, value in module.__dict__.items():
                if key not in _OF_EVERY_MODULE and type(value) not in _IMMUTABLE:
                    self._hold(f"{name}.{key}", value)
            for key in module._buffers if buffers else ():
                self._hold(f"{name}.{key}", module._buffers[key])

    def __enter__(self) -> ModelState:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is not None:
            self.restore()

    def _hold(self, name: str, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            self._tensors.append((name.strip("."), _Tensor(value)))
        elif isinstance(value, dict | list | set):
            self._registries.append((name, value, value.copy()))
            for each in value.values() if isinstance(value, dict) else value:
                self._hold(name, each)

    def restore(self) -> list[str]:
        """Put everything back, and name the things that were changed."""
        found = []
        for name, registry, before in self._registries:
            if (key := _changed(before, registry)) is not None:
                found.append(f"{name}.{key}".strip("."))
                _refill(registry, before)
        for name, tensor in self._tensors:
            # A forward that writes what is there already may write something else next time.
            if tensor.was_written() or tensor.differs():
                found.append(name)
                tensor.restore()
        return found


class _Tensor:
    """A tensor with its storage, geometry, content, gradient and hooks of one moment."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self.requires_grad, self.grad = tensor.requires_grad, tensor.grad
        self.hooks = tensor._backward_hooks
        self.hooked = dict(self.hooks or {})
        # A detached tensor keeps the storage when the original is given another one.
        self.data = tensor.detach()
        self.is_dense = tensor.layout is torch.strided and not (
            tensor.is_quantized or tensor.is_nested or tensor.is_meta
        )
        self.geometry = _geometry(tensor) if self.is_dense else None
        self.copy = self.data.clone()
        self.version = 0 if tensor.is_inference() else tensor._version

    def differs(self) -> bool:
        now = self.tensor
        if now.requires_grad is not self.requires_grad or now.grad is not self.grad:
            return True
        if now._backward_hooks is not self.hooks or dict(self.hooks or {}) != self.hooked:
            return True
        if not self.is_dense:  # of other layouts, torch tells only what goes through its functions
            return self.was_written()
        if _geometry(now) != self.geometry:
            return True
        same_place = now.data_ptr() == self.data.data_ptr()
        return not same_place or not torch.equal(_bytes(now), _bytes(self.copy))

    def was_written(self) -> bool:
        return not self.tensor.is_inference() and self.tensor._version != self.version

    def restore(self) -> None:
        if not self.differs():
            return
        self.tensor.data = self.data
        if self.geometry is not None:
            self.tensor.data = self.data.as_strided(*self.geometry[:2])
        self.tensor.data.copy_(self.copy)
        self.tensor.requires_grad_(self.requires_grad)
        self.tensor.grad = self.grad
        if self.hooks is not None:
            self.hooks.clear()
            self.hooks.update(self.hooked)
        self.tensor._backward_hooks = self.hooks


def _refill(container: Any, before: Any) -> None:
    container.clear()
    if isinstance(container, list):
        container.extend(before)
    else:
        container.update(before)


def _changed(before: Any, now: Any) -> str | None:
    """The first key whose entry is not the same object any more."""
    if isinstance(now, set):
        return None if now == before else ""
    if isinstance(now, list):
        same = len(now) == len(before) and all(map(operator.is_, now, before))
        return None if same else ""
    if list(now) == list(before) and all(map(operator.is_, before.values(), now.values())):
        return None
    union = {**before, **now}
    changed = (k for k in union if before.get(k, _ABSENT) is not now.get(k, _ABSENT))
    return next(map(str, changed), "")


def _geometry(tensor: torch.Tensor) -> Any:
    return tensor.shape, tensor.stride(), tensor.dtype


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """What a tensor holds, bit for bit: NaN is itself, and zero is not minus zero."""
    plain = tensor.detach().resolve_conj().resolve_neg()
    return plain.flatten().contiguous().view(torch.uint8)
