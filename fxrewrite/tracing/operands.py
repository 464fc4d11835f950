"""The values that a traced function is about to ask about, found from outside of it."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from types import FrameType, FunctionType, ModuleType
from typing import Any

from torch import fx, nn

from .questions import Instruction

_OPAQUE = (nn.Module, FunctionType, ModuleType, type)
_DEPTH = 4


class Unclear(Exception):
    """What a value is can't be told without running the code again."""


def lookup(frame: FrameType, name: str) -> Any:
    """The value of a variable in a frame, None if it has none yet."""
    for scope in (frame.f_locals, frame.f_globals, frame.f_builtins):
        if name in scope:
            return scope[name]
    return None


def holds_proxy(value: Any, depth: int = _DEPTH) -> bool:
    """Whether a value is one of the trace, or holds such a one."""
    if isinstance(value, fx.Proxy):
        return True
    if not depth or isinstance(value, _OPAQUE):
        return False
    if isinstance(value, list | tuple | set | frozenset):
        return any(holds_proxy(each, depth - 1) for each in value)
    inside = value if isinstance(value, Mapping) else getattr(value, "__dict__", {})
    return any(holds_proxy(each, depth - 1) for each in [*inside.values()])


def evaluate(code: Sequence[Instruction], frame: FrameType, graph: fx.Graph) -> Any:
    """What instructions have just made, where that can be told by looking.

    Args:
        code: the instructions that made it.
        frame: the frame that carried them out.
        graph: the graph that is traced into, whose last node they may have made.

    Raises:
        Unclear: they called something, say.
    """
    stack: list[Any] = []
    for each in code:
        if each.variable is not None:
            stack.append(lookup(frame, each.variable))
        elif each.name in ("LOAD_CONST", "LOAD_SMALL_INT"):
            stack.append(each.value)
        elif each.name == "LOAD_ATTR" and not isinstance(stack[-1], fx.Proxy):
            stack.append(getattr(stack.pop(), str(each.value)))
        elif each.name == "BINARY_SUBSCR":
            key = stack.pop()
            stack.append(_item(stack.pop(), key, graph))
        elif each.name == "BUILD_TUPLE":
            stack[len(stack) - each.value :] = [tuple(stack[len(stack) - each.value :])]
        else:
            raise Unclear
    return stack.pop()


def _item(owner: Any, key: Any, graph: fx.Graph) -> Any:
    if isinstance(owner, list | tuple | dict | nn.ModuleList | nn.ModuleDict):
        return owner[key]
    last = next(reversed(graph.nodes))
    is_read = last.target is operator.getitem
    if isinstance(owner, fx.Proxy) and is_read and last.args == (owner.node, key):
        return owner.tracer.proxy(last)
    raise Unclear


def spelt(code: Sequence[Instruction]) -> str:
    """Instructions as the expression that they were."""
    stack: list[str] = []
    for each in code:
        if each.variable is not None:
            stack.append(each.variable)
        elif each.name == "LOAD_ATTR":
            stack.append(f"{stack.pop()}.{each.value}")
        elif each.name == "BINARY_SUBSCR":
            key = stack.pop()
            stack.append(f"{stack.pop()}[{key}]")
        elif each.name == "BUILD_TUPLE":
            parts = stack[len(stack) - each.value :]
            stack[len(stack) - each.value :] = [f"({', '.join(parts)})"]
        elif each.name.startswith("LOAD_"):
            stack.append(repr(each.value))
        else:
            return "a value"
    return stack.pop()
