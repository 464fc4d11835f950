"""What FX does not see while it traces: other threads, and the state that torch computes under."""

from __future__ import annotations

import threading
from typing import Any

from torch import fx

from .containers import keep_types
from .stops import NotInGraphError
from .torch_state import TorchState


def watched(tracer: fx.Tracer, outside: TorchState) -> fx.Tracer:
    """The same tracer, deaf to other threads, and raising where a graph would lose torch's state.

    FX patches `nn.Module` for the whole process, so a model that runs in another thread meanwhile
    comes through the tracer. And a graph has no autocast region and no `no_grad` block: what a
    forward computes in one would be recorded as if it were outside.

    Args:
        tracer: a tracer of our own, about to trace in this thread. It is changed in place.
        outside: the state of torch around the trace.
    """
    thread = threading.get_ident()
    call_module, getattr_, create_node = tracer.call_module, tracer.getattr, tracer.create_node

    def call(module: Any, forward: Any, args: Any, kwargs: Any) -> Any:
        if threading.get_ident() != thread:
            return forward(*args, **kwargs)
        return call_module(module, forward, args, kwargs)

    def get(name: str, value: Any, cache: Any) -> Any:
        return value if threading.get_ident() != thread else getattr_(name, value, cache)

    def create(*args: Any, **kwargs: Any) -> fx.Node:
        if (state := outside.difference()) is not None:
            raise NotInGraphError(
                f"the forward computes here under {state}, which a graph does not record"
            )
        return create_node(*args, **kwargs)

    tracer.call_module = call  # type: ignore[method-assign, assignment]
    tracer.getattr = get  # type: ignore[method-assign, assignment]
    tracer.create_node = create  # type: ignore[method-assign]
    keep_types(tracer)
    return tracer
