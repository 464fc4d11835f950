"""The values that a forward is traced with."""

from __future__ import annotations

import dis
import functools
import operator
import sys
from collections.abc import Iterator
from types import CodeType
from typing import Any

from torch import fx
from torch.fx.graph import inplace_methods

from .forward_code import is_of_a_forward
from .stops import NotInGraphError


class Proxy(fx.Proxy):
    """A value to trace with.

    Its `x += y` is recorded as the write in place that it is; of FX's own it makes a new value, and
    whatever else is `x`, or a view of it, misses the write. A forward that asks is told the type
    that it stands for.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        """Set what FX sets; what a forward sets would be lost with this value."""
        if name not in ("node", "tracer") and is_of_a_forward(sys._getframe(1).f_code):
            raise NotInGraphError(
                f"it sets the attribute {name} of a tensor, which a graph does not"
            )
        super().__setattr__(name, value)

    def __iter__(self) -> Iterator[Any]:
        """Its items where a forward unpacks so many; FX would read all of its code each time."""
        frame = sys._getframe(1)
        count = _unpacked(frame.f_code).get(frame.f_lasti)
        if count is None:
            return self.tracer.iter(self)
        return (self[i] for i in range(count))  # type: ignore[index]

    def __hash__(self) -> int:
        """Its identity; a forward that looks it up somewhere by that is noted."""
        watch = getattr(self.tracer, "watch", None)
        if watch is not None:
            watch.uses_as_key(self, sys._getframe(1))
        return id(self)

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        """A tensor's, to a forward that asks; FX and torch must see what it is."""
        watch = getattr(self.tracer, "watch", None)
        kind = None if watch is None else watch.class_for(sys._getframe(1), self.node)
        return kind or Proxy


@functools.lru_cache(maxsize=4096)
def _unpacked(code: CodeType) -> dict[int, int]:
    """How many values each instruction of a function unpacks, by its offset."""
    found = (each for each in dis.get_instructions(code) if each.opname == "UNPACK_SEQUENCE")
    return {each.offset: each.argval for each in found}


def _recorded(write: Any) -> Any:
    def method(self: fx.Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", write, (self, other), {})

    return method


for _name in inplace_methods.keys() - {"setitem"}:  # which FX refuses to trace
    setattr(Proxy, f"__{_name}__", _recorded(getattr(operator, _name)))
