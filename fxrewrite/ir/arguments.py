"""A node's arguments by name, however the call was spelt."""

from __future__ import annotations

import functools
import inspect
import numbers
import typing
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch.fx.operator_schemas import get_signature_for_torch_op

from ..module_utils.torch_private import OpOverload, OpOverloadPacket, boolean_dispatched
from .op_traits import base_name, traits_of

_TORCH_NAME = {"truediv": "true_divide", "floordiv": "floor_divide"}
# Which constants an overload takes, by the types in its schema, where those say it.
_TAKES: dict[Any, Any] = {
    **{each: each for each in (torch.Tensor, bool, str, type(None))},
    **dict.fromkeys((float, complex, numbers.Number), numbers.Number),
    int: (int, torch.dtype, torch.layout, torch.memory_format),
    list: (int, list, tuple),
}


def arguments(node: fx.Node, callee: Callable[..., Any] | str | type) -> dict[str, Any]:
    """The arguments that a node gives, by name; `0`, `1`, ... where the callee's names are unknown.

    Torch's own functions, operators and methods share names: `a + b`, `torch.add(a, b)` and
    `a.add(b)` all give `input` and `other`. Of overloads, the first counts that takes such values.
    """
    spelt, bindings = [node.args], []
    if node.op == "call_method" and len(node.args) > 1:
        # Some methods take a list item by item: x.permute(1, 0).
        spelt.append((node.args[0], node.args[1:]))
    for args in spelt:
        for signature in _signatures(callee):
            try:
                bound = signature.bind(*args, **node.kwargs)
            except TypeError:
                continue
            if all(_fits(e, signature.parameters[k]) for k, e in bound.arguments.items()):
                return _flat(signature, bound)
            bindings.append((signature, bound))
    if bindings:
        return _flat(*bindings[0])
    return {**{str(i): value for i, value in enumerate(node.args)}, **node.kwargs}


def _fits(value: Any, parameter: inspect.Parameter) -> bool:
    """Whether an overload takes this argument; what a node gives is a tensor, for all one knows."""
    wanted = parameter.annotation
    several = typing.get_args(wanted) if typing.get_origin(wanted) is typing.Union else (wanted,)
    kinds = [typing.get_origin(each) or each for each in several]
    if isinstance(value, fx.Node):
        asks = traits_of(value, None).asks == "metadata"
        return any(e not in _TAKES or (e is torch.Tensor) is not asks for e in kinds)
    return any(isinstance(value, _TAKES.get(each, object)) for each in kinds)


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
        name = base_name(callee).removesuffix("_")
        torchs = getattr(torch, _TORCH_NAME.get(name, name), None)
        return _torch_signatures(torchs) or _python_signature(callee)
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
