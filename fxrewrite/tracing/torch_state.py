"""The state that torch computes under, which a forward may change and a graph does not record."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from ..module_utils.torch_private import global_hooks

_Setting = tuple[str, Callable[[], Any], Callable[[Any], object] | None]


class TorchState:
    """What torch computes under at one moment, beside the values, to compare with later.

    >>> before = TorchState()
    >>> torch.set_default_dtype(torch.float64)
    >>> before.difference()
    'default dtype = torch.float64'
    >>> before.restore()
    >>> torch.get_default_dtype()
    torch.float32
    """

    def __init__(self) -> None:
        self._values = [get() for get in _GETTERS]
        self._hooks = [(each, each.copy()) for each in global_hooks() if each is not None]

    def difference(self) -> str | None:
        """The first thing that is different now, in words, or None."""
        now = [get() for get in _GETTERS]
        if now == self._values:
            return None
        found = zip(_SETTINGS, now, self._values, strict=True)
        return next(f"{name} = {value}" for (name, *_), value, was in found if value != was)

    def restore(self) -> None:
        """Set what can be set as it was."""
        for (_, get, put), was in zip(_SETTINGS, self._values, strict=True):
            if put is not None and get() != was:
                put(was)
        for registry, was in self._hooks:
            if registry != was:
                registry.clear()
                registry.update(was)


def _of_autocast(device: str) -> list[_Setting]:
    enable = functools.partial(torch.set_autocast_enabled, device)
    put_dtype = functools.partial(torch.set_autocast_dtype, device)
    return [
        (f"autocast on {device}", functools.partial(torch.is_autocast_enabled, device), enable),
        (
            f"autocast dtype on {device}",
            functools.partial(torch.get_autocast_dtype, device),
            put_dtype,
        ),
    ]


_DEVICES = sorted({"cpu", (torch.accelerator.current_accelerator() or torch.device("cpu")).type})
_SETTINGS: list[_Setting] = [
    ("gradients", torch.is_grad_enabled, torch.set_grad_enabled),
    ("inference mode", torch.is_inference_mode_enabled, None),
    ("default dtype", torch.get_default_dtype, torch.set_default_dtype),
    (
        "deterministic debug mode",
        torch.get_deterministic_debug_mode,
        torch.set_deterministic_debug_mode,
    ),
    ("global module hooks", lambda: sum(map(len, filter(None, global_hooks()))), None),
    *(setting for device in _DEVICES for setting in _of_autocast(device)),
]
_GETTERS = [get for _, get, _ in _SETTINGS]
