"""How a value gets from the call that makes it to one that reads it: by which code."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, TypeAlias

import attrs
import torch
from torch import fx, nn

from ..module_utils.hooks import has_hooks

_TORCH = Path(torch.__file__).parent
# What calls a forward for torch or FX, and us, passes a value on as it is.
_PASSED_OVER = (
    *(f"{_TORCH}/{name}" for name in ("fx/", "_", "functional.py", "overrides.py", "utils/_")),
    *(f"{_TORCH}/nn/{name}" for name in ("functional.py", "modules/module.py")),
    f"{Path(__file__).parent.parent}/",
)


@attrs.frozen
class Passage:
    """What a value does in one call of a function.

    `begin` is the instruction that gives it, or the parameter that it comes in by; `end` is the
    instruction that takes it, or None where the function returns it. `owner` is the module whose
    method the function is, if it is one, and `variables` are the function's global ones.
    """

    code: CodeType
    begin: int | str
    end: int | None
    owner: nn.Module | None = None
    variables: Mapping[str, Any] = attrs.field(factory=dict, eq=False, repr=False)


@attrs.frozen(eq=False)
class _Place:
    """Where a call of a function is just now; the frame is held, so that its id stays its own."""

    frame: FrameType
    code: CodeType
    at: int


Stack = list[_Place]


def stack(until: FrameType | None = None) -> Stack:
    """The calls of user code that are under way, outermost first, below a frame of ours."""
    found = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame is not until:
        if not is_passed_over(frame.f_code):
            found.append(_Place(frame, frame.f_code, frame.f_lasti))
        frame = frame.f_back
    return found[::-1]


def passages(
    giving: Stack, taking: Stack, is_value: Callable[[Any], bool]
) -> tuple[Passage, ...] | None:
    """The code by which a value goes from a call to another one that is under way now.

    Args:
        giving: the calls that were under way when the value was given.
        taking: those that are now.
        is_value: whether something is the value.

    Returns:
        A passage for each function that the value goes through, or None where that is not known.
    """
    common = 0
    for one, other in zip(giving, taking, strict=False):
        if one.frame is not other.frame:
            break
        common += 1
    if not common:
        return None
    found = [_passage(each, each.at, None) for each in giving[common:]]
    here = taking[common - 1]
    found.append(_passage(here, giving[common - 1].at, here.at))
    for each in taking[common:]:
        names = [name for name, value in _parameters(each.frame) if _holds(value, is_value)]
        if len(names) != 1:
            return None
        found.append(_passage(each, names[0], each.at))
    around = (*giving[common:], *taking[common:])
    return None if any(map(_is_hooked, around)) else tuple(found)


Passages: TypeAlias = "Mapping[tuple[str, str], tuple[Passage, ...] | None]"


class Recorder:
    """Records the passages of all values while a tracer of ours traces, by the nodes' names."""

    def __init__(self, tracer: fx.Tracer) -> None:
        self.passages: dict[tuple[str, str], tuple[Passage, ...] | None] = {}
        self._stacks: dict[fx.Node, Stack] = {}
        self._outside = sys._getframe(1)
        self._create_node = tracer.create_node
        tracer.create_node = self._create  # type: ignore[method-assign]

    def _create(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = self._create_node(*args, **kwargs)
        now = self._stacks[node] = stack(self._outside)
        for each in node.all_input_nodes:

            def is_value(value: Any, each: fx.Node = each) -> bool:
                return isinstance(value, fx.Proxy) and value.node is each

            self.passages[each.name, node.name] = passages(self._stacks[each], now, is_value)
        return node


def _parameters(frame: FrameType) -> Iterator[tuple[str, Any]]:
    code, values = frame.f_code, frame.f_locals
    count = code.co_argcount + code.co_kwonlyargcount
    count += bool(code.co_flags & 4) + bool(code.co_flags & 8)  # *args and **kwargs
    yield from ((name, values.get(name)) for name in code.co_varnames[:count])


def _holds(value: Any, is_value: Callable[[Any], bool]) -> bool:
    if isinstance(value, tuple):
        return any(map(is_value, value))
    if isinstance(value, dict):
        return any(map(is_value, value.values()))
    return is_value(value)


def _passage(place: _Place, begin: int | str, end: int | None) -> Passage:
    return Passage(place.code, begin, end, _owner(place), place.frame.f_globals)


def _owner(place: _Place) -> nn.Module | None:
    first = place.code.co_varnames[0] if place.code.co_argcount else None
    owner = place.frame.f_locals.get(first) if first else None
    return owner if isinstance(owner, nn.Module) else None


def _is_hooked(place: _Place) -> bool:
    owner = _owner(place)
    return owner is not None and has_hooks(owner) is not None


def is_passed_over(code: CodeType) -> bool:
    """Whether a function hands values on for torch, FX or us, and is no code of a user's."""
    return _is_passed_over(code.co_filename)  # which is quicker to look up than the code


@functools.lru_cache(maxsize=4096)
def _is_passed_over(path: str) -> bool:
    return path.startswith(_PASSED_OVER)
