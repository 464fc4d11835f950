"""The values that a forward is traced with."""

from __future__ import annotations

import operator
from typing import Any

from torch import fx
from torch.fx.graph import inplace_methods


class Proxy(fx.Proxy):
    """A value to trace with, whose `x += y` is recorded as the write in place that it is.

    Of FX's own it makes a new value, and whatever else is `x`, or a view of it, misses the write.
    """


def _recorded(write: Any) -> Any:
    def method(self: fx.Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", write, (self, other), {})

    return method


for _name in inplace_methods.keys() - {"setitem"}:  # which FX refuses to trace
    setattr(Proxy, f"__{_name}__", _recorded(getattr(operator, _name)))
