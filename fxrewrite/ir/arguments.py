"""A node's arguments by name, however the call was spelt."""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch.fx.operator_schemas import get_signature_for_torch_op

from ..module_utils.torch_private import OpOverload, OpOverloadPacket, boolean_dispatched

_TORCH_NAME = {
    operator.truediv: "true_divide",
    operator.itruediv: "true_divide",
    operator.floordiv: "floor_divide",
    operator.ifloordiv: "floor_divide",
    operator.iadd: "add",
    operator.isub: "sub",
    operator.imul: "mul",
}


def arguments(node: fx.Node, callee: Callable[..., Any] | str | type) -> dict[str, Any]:
    """The arguments that a node gives, by name; `0`, `1`, ... where the callee's names are unknown.

    Torch's own functions, operators and methods share names: `a + b`, `torch.add(a, b)` and
    `a.add(b)` all give `input` and `other`.
    """
    spelt = [node.args]
    if node.op == "call_method" and len(node.args) > 1:
        # Some methods take a list item by item: x.permute(1, 0).
        spelt.append((node.args[0], node.args[1:]))
    for args in spelt:
        for signature in _signatures(callee):
            try:
                bound = signature.bind(*args, **node.kwargs)
            except TypeError:
                continue
            return _flat(signature, bound)
    return {**{str(i): value for i, value in enumerate(node.args)}, **node.kwargs}


def is_default(callee: Callable[..., Any] | str | type, name: str, value: Any) -> bool:
    """Whether an argument is given as what it would be anyway.

    >>> is_default(torch.add, "alpha", 1), is_default(torch.add, "alpha", 2)
    (True, False)
    """
    parameters = (each.parameters.get(name) for each in _signatures(callee))
    known = [each.default for each in parameters if each is not None]
    return bool(known) and all(type(each) is type(value) and each == value for each in known)


def _flat(signature: inspect.Signature, bound: inspect.BoundArguments) -> dict[str, Any]:
    named: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            named.update(value)
        elif kind is inspect.Parameter.VAR_POSITIONAL:
            named.update({str(len(named) + i): each for i, each in enumerate(value)})
        else:
            named["input" if name == "self" else name] = value
    return named


@functools.lru_cache(maxsize=4096)
def _signatures(callee: Callable[..., Any] | str | type) -> tuple[inspect.Signature, ...]:
    if isinstance(callee, str):
        return _torch_signatures(getattr(torch.ops.aten, callee, None))
    # Other types are called as functions are: a data class or an OrderedDict that is returned.
    if isinstance(callee, type) and issubclass(callee, nn.Module):
        forward = inspect.signature(callee.forward)
        return (forward.replace(parameters=list(forward.parameters.values())[1:]),)
    if (by_flag := boolean_dispatched.get(callee)) is not None:  # F.max_pool2d and its like
        return _python_signature(by_flag["if_false"])
    if isinstance(callee, OpOverload | OpOverloadPacket):
        return _torch_signatures(callee)
    if getattr(callee, "__module__", None) == "_operator":
        name = _TORCH_NAME.get(callee, callee.__name__)
        return _torch_signatures(getattr(torch, name, None)) or _python_signature(callee)
    return _python_signature(callee) or _torch_signatures(callee)


def _python_signature(callee: Callable[..., Any]) -> tuple[inspect.Signature, ...]:
    try:
        return (inspect.signature(callee),)
    except (TypeError, ValueError):
        return ()


def _torch_signatures(op: Any) -> tuple[inspect.Signature, ...]:
    try:
        return tuple(get_signature_for_torch_op(op) or ()) if op is not None else ()
    except Exception:  # not a torch operator; torch says so in several ways
        return ()
