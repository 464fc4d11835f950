"""Activations that write in place where they could as well make new storage, and let them do so."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..module_utils.evolve import evolve
from ..module_utils.hooks import runs_its_forward_alone
from ..module_utils.torch_private import OpOverload
from .aliases import is_fresh_module, written_by
from .describe import name_of
from .op_traits import base_name, traits_of
from .overlay import Overlay


def can_be_out_of_place(reader: fx.Node, value: fx.Node, view: Overlay) -> bool:
    """Whether a node is such an activation, and alone reads the value that it writes to."""
    if list(value.users) != [reader] or reader.all_input_nodes != [value]:
        return False
    return written_by(reader, view) == [value] and _out_of_place(reader, view) is not None


def make_out_of_place(reader: fx.Node, view: Overlay) -> None:
    """Let it make new storage."""
    other = _out_of_place(reader, view)
    assert other is not None
    target, kwargs = other
    if reader.op == "call_module":
        old, name = view.module(reader), name_of(reader)
        name = name if old is not None and view.users(old) == 1 else view.name_beside(name)
        view.count(reader, -1)
        reader.target = name
        view.place(name, target)
        view.count(reader, +1)
    else:
        reader.target = target
    if kwargs is not None:
        reader.args, reader.kwargs = reader.args[:1], kwargs


def _out_of_place(reader: fx.Node, view: Overlay) -> tuple[Any, dict[str, Any] | None] | None:
    """What it would call instead, and its arguments by keyword where they change."""
    module, target = view.module(reader), reader.target
    if not traits_of(reader, module).activation:
        return None
    if module is not None:
        if "inplace" not in module.__dict__ or module._modules or module.training:
            return None
        new = evolve(module, inplace=False)
        return (new, None) if runs_its_forward_alone(module) and is_fresh_module(new) else None
    if reader.op == "call_method":
        return str(target).removesuffix("_"), None
    name = base_name(target).removesuffix("_")
    if isinstance(target, OpOverload):
        return getattr(torch.ops.aten, name).default, None
    kwargs = {k: v for k, v in view.arguments(reader).items() if k != "input"}
    if target is getattr(torch.nn.functional, name, None) and kwargs.get("inplace") is True:
        # By keyword, since the flag may have been given by position.
        is_first = reader.args[:1] == tuple(reader.all_input_nodes)
        return (target, {**kwargs, "inplace": False}) if is_first else None
    return (getattr(torch, name), None) if target is getattr(torch, f"{name}_", None) else None
