"""Keep the types of dictionaries in a graph, where FX would make plain ones of them."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from typing import Any

from torch import fx
from torch.fx import immutable_collections

from .proxies import Proxy

_PLAIN = (dict, immutable_collections.immutable_dict)


def keep_types(tracer: fx.Tracer) -> None:
    """Let a tracer record an ordered dictionary, and one that is a dataclass, as what it is.

    A forward that returns such a one would give a plain dictionary after tracing, and a caller who
    reads attributes of it would fail. Any other subclass of `dict` can't be recorded, and raises.

    Args:
        tracer: a tracer of our own. It is changed in place.
    """
    create_arg = tracer.create_arg
    is_plain = type(tracer).create_arg is fx.Tracer.create_arg

    def create(value: Any) -> Any:
        kind = type(value)  # isinstance() would ask a value of the trace what it stands for
        if is_plain and kind is Proxy:  # FX would find the same, last of all
            return value.node
        if kind in _PLAIN or not issubclass(kind, dict):
            return create_arg(value)
        if dataclasses.is_dataclass(value):
            names = [each.name for each in dataclasses.fields(value)]
            fields = {name: create(getattr(value, name)) for name in names}
            return tracer.create_node("call_function", kind, (), fields)
        if kind is OrderedDict:
            pairs = [(create(key), create(each)) for key, each in value.items()]
            return tracer.create_node("call_function", OrderedDict, (pairs,), {})
        raise TypeError(f"a graph can't make a dictionary of the type {kind.__name__}")

    tracer.create_arg = create  # type: ignore[method-assign, assignment]
