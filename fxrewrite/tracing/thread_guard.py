"""What FX does not see while it traces: other threads, and the state that torch computes under."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import fx

from .containers import keep_types
from .stops import NotInGraphError


def watched(tracer: fx.Tracer) -> fx.Tracer:
    """The same tracer, deaf to other threads, and raising where a graph would lose torch's state.

    FX patches `nn.Module` for the whole process, so a model that runs in another thread meanwhile
    comes through the tracer. And a graph has no autocast region and no `no_grad` block: what a
    forward computes in one would be recorded as if it were outside.

    Args:
        tracer: a tracer of our own, about to trace in this thread. It is changed in place.
    """
    thread, outside = threading.get_ident(), _ambient_state()
    call_module, getattr_, create_node = tracer.call_module, tracer.getattr, tracer.create_node

    def call(module: Any, forward: Any, args: Any, kwargs: Any) -> Any:
        if threading.get_ident() != thread:
            return forward(*args, **kwargs)
        return call_module(module, forward, args, kwargs)

    def get(name: str, value: Any, cache: Any) -> Any:
        return value if threading.get_ident() != thread else getattr_(name, value, cache)

    def create(*args: Any, **kwargs: Any) -> fx.Node:
        if (inside := _ambient_state()) != outside:
            changed = zip(_ambient_names(), inside, outside, strict=True)
            state, value = next((name, now) for name, now, before in changed if now != before)
            raise NotInGraphError(
                f"the forward computes here under {state} = {value}, which a graph does not record"
            )
        return create_node(*args, **kwargs)

    tracer.call_module = call  # type: ignore[method-assign, assignment]
    tracer.getattr = get  # type: ignore[method-assign, assignment]
    tracer.create_node = create  # type: ignore[method-assign]
    keep_types(tracer)
    return tracer


_DEVICES = sorted({"cpu", (torch.accelerator.current_accelerator() or torch.device("cpu")).type})


def _ambient_state() -> tuple[Any, ...]:
    """What decides how torch computes, beside the values themselves."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_default_dtype(),
        *[torch.is_autocast_enabled(name) and torch.get_autocast_dtype(name) for name in _DEVICES],
    )


def _ambient_names() -> tuple[str, ...]:
    """What each of that is called."""
    autocast = [f"autocast on {name}" for name in _DEVICES]
    return "gradients", "inference mode", "default dtype", *autocast
