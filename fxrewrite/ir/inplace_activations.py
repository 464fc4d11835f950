"""Activations that write in place where they could as well make new storage, and let them do so."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..module_utils.evolve import evolve
from ..module_utils.hooks import runs_its_forward_alone
from ..module_utils.torch_private import OpOverload
from .aliases import base_name, is_fresh_module, written_by
from .describe import name_of
from .graph_view import GraphView

# Functions of one value that keep its shape and type; settings are plain numbers.
_ACTIVATIONS = frozenset(
    "elu hardsigmoid hardswish hardtanh leaky_relu mish relu relu6 selu sigmoid silu tanh".split()
)


def can_be_calmed(reader: fx.Node, value: fx.Node, view: GraphView) -> bool:
    """Whether a node is such an activation, and alone reads the value that it writes to."""
    if list(value.users) != [reader] or reader.all_input_nodes != [value]:
        return False
    return written_by(reader, view) == [value] and _calm(reader, view) is not None


def calm(reader: fx.Node, view: GraphView) -> None:
    """Let it make new storage."""
    calmed = _calm(reader, view)
    assert calmed is not None
    target, kwargs = calmed
    if reader.op == "call_module":
        old, name = view.module(reader), name_of(reader)
        name = name if old is not None and view.only_user(old) else view.free_name(name)
        view.count(reader, -1)
        reader.target = name
        view.place(name, target)
        view.count(reader, +1)
    else:
        reader.target = target
    if kwargs is not None:
        reader.args, reader.kwargs = reader.args[:1], kwargs


def _calm(reader: fx.Node, view: GraphView) -> tuple[Any, dict[str, Any] | None] | None:
    """What it would call instead, and its arguments by keyword where they change."""
    module = view.module(reader)
    if module is not None:
        if "inplace" not in module.__dict__ or module._modules or module.training:
            return None
        quiet = evolve(module, inplace=False)
        is_activation = type(module).__module__ == torch.nn.modules.activation.__name__
        is_plain = is_activation and runs_its_forward_alone(module)
        return (quiet, None) if is_plain and is_fresh_module(quiet) else None
    if reader.op == "call_method":
        name = str(reader.target).removesuffix("_")
        return (name, None) if name in _ACTIVATIONS else None
    target, name = reader.target, base_name(reader.target).removesuffix("_")
    if name not in _ACTIVATIONS:
        return None
    if isinstance(target, OpOverload):
        return getattr(torch.ops.aten, name).default, None
    kwargs = {k: v for k, v in view.arguments(reader).items() if k != "input"}
    if target is getattr(torch.nn.functional, name, None) and kwargs.get("inplace") is True:
        # By keyword, since the flag may have been given by position.
        is_first = reader.args[:1] == tuple(reader.all_input_nodes)
        return (target, {**kwargs, "inplace": False}) if is_first else None
    return (getattr(torch, name), None) if target is getattr(torch, f"{name}_", None) else None
