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
from .op_traits import Trait, base_name, traits_of_name
from .overlay import Overlay


def can_be_out_of_place(reader: fx.Node, value: fx.Node, view: Overlay) -> bool:
    """Whether a node is such an activation, and alone reads the value that it writes to."""
    if list(value.users) != [reader] or reader.all_input_nodes != [value]:
        return False
    return written_by(reader, view) == [value] and _out_of_place(reader, view) is not None


def make_out_of_place(reader: fx.Node, view: Overlay) -> None:
    """Let it make new storage."""
    changed = _out_of_place(reader, view)
    assert changed is not None
    target, kwargs = changed
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


def _out_of_place(reader: fx.Node, view: Overlay) -> tuple[Any, dict[str, Any] | None] | None:
    """What it would call instead, and its arguments by keyword where they change."""
    module = view.module(reader)
    if module is not None:
        if "inplace" not in module.__dict__ or module._modules or module.training:
            return None
        out_of_place = evolve(module, inplace=False)
        is_activation = type(module).__module__ == torch.nn.modules.activation.__name__
        is_plain = is_activation and runs_its_forward_alone(module)
        return (out_of_place, None) if is_plain and is_fresh_module(out_of_place) else None
    if reader.op == "call_method":
        name = str(reader.target).removesuffix("_")
        return (name, None) if Trait.ACTIVATION in traits_of_name(name) else None
    target, name = reader.target, base_name(reader.target).removesuffix("_")
    if Trait.ACTIVATION not in traits_of_name(name):
        return None
    if isinstance(target, OpOverload):
        return getattr(torch.ops.aten, name).default, None
    kwargs = {k: v for k, v in view.arguments(reader).items() if k != "input"}
    if target is getattr(torch.nn.functional, name, None) and kwargs.get("inplace") is True:
        # By keyword, since the flag may have been given by position.
        is_first = reader.args[:1] == tuple(reader.all_input_nodes)
        return (target, {**kwargs, "inplace": False}) if is_first else None
    return (getattr(torch, name), None) if target is getattr(torch, f"{name}_", None) else None
