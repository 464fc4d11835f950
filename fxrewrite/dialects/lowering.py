"""Spell the modules that stand for functional calls as functions again.

What no rule touched is put back as it was. What a rule made is spelt in the way of the call that it
replaces, or else in the same dialect.
"""

from __future__ import annotations

import operator
from typing import Any, cast

import torch
from torch import fx, nn

from ..ir.describe import PROVENANCE
from ..ir.fake_values import renew
from ..ir.graph_view import GraphView
from ..module_utils.hooks import has_hooks
from ..module_utils.names import parent_name
from ..module_utils.torch_private import OpOverload, is_erased
from .lifting import REPEATS, TRANSPOSES, Lifted, Lifting
from .op_table import SPELLINGS, Spelling
from .semantics import Transposed


def lower(view: GraphView, lifting: Lifting) -> dict[str, str]:
    """Spell what was lifted, or replaced it, as functions, as far as there are functions for it.

    Gives the name under which each new module stood, with the name that its tensors are below.
    """
    lowering = _Lowering(view, lifting)
    if lifting.lifted:
        lowering.run()
    return lowering.names


class _Lowering:
    def __init__(self, view: GraphView, lifting: Lifting) -> None:
        self._view = view
        self._lifting = lifting
        self.names: dict[str, str] = {}

    def run(self) -> None:
        """Restore or respell each call in the place of one that was lifted."""
        spelt = []
        for node in self._view.graph.nodes:
            module = self._view.module(node)
            own = self._lifting.lifted.get(node)
            lifted = self._lifting.by_module.get(id(module)) or own
            if module is None or lifted is None:
                continue
            if own is not None and own.module is module and self._restore(own):
                continue
            found = _spelling(lifted.spelling, module, node) if _reads_one(node) else None
            if found is not None:
                self._view.count(node, -1)
                spelt.append((node, module, lifted, *found))
        self._erase_leftovers()
        for each in spelt:
            self._respell(*each)

    def _restore(self, lifted: Lifted) -> bool:
        """Put a call back as it was, but for what it reads, if it still stands where it did."""
        node, call = lifted.node, lifted.call
        source = node.all_input_nodes[0]
        if (
            any(is_erased(each) or each > call for each in (*lifted.constants, source))
            or call > node
        ):
            return False
        self._view.count(node, -1)
        data = lifted.given[lifted.spelling.data]

        def moved(each: fx.Node) -> fx.Node:
            return source if each is data else each

        if call is not node:
            node.op, node.target = "call_function", operator.getitem
            node.args = (call, lifted.spelling.item)
        call.op, call.target = lifted.spelling.op, lifted.spelling.function
        call.args, call.kwargs = fx.node.map_arg((lifted.args, lifted.kwargs), moved)
        return True

    def _erase_leftovers(self) -> None:
        """Erase what only served calls that are gone."""
        for lifted in self._lifting.lifted.values():
            served = lifted.constants
            if lifted.call is not lifted.node:
                served.append(lifted.call)
            while served:
                node = served.pop()
                if not node.users and not is_erased(node):
                    served += [each for each in node.all_input_nodes if _is_read(each)]
                    self._view.count(node, -1)
                    self._view.graph.erase_node(node)

    def _respell(
        self,
        node: fx.Node,
        module: nn.Module,
        lifted: Lifted,
        spelling: Spelling,
        spelt: dict[str, Any],
    ) -> None:
        """Make a module's call the call of a function."""
        graph, (source, *_) = self._view.graph, node.all_input_nodes
        with graph.inserting_before(node):
            values = {
                name: self._argument(node, value, spelling.fields.get(name, name), lifted, spelling)
                for name, value in spelt.items()
            }
            values[spelling.data] = source
            args = tuple(values[name] for name in spelling.names)
            kwargs = {name: values[name] for name in spelling.keywords}
            op, function = spelling.op, cast("Any", spelling.function)
            if spelling.item is not None:
                call = graph.call_function(function, args, kwargs)
                call.meta = {k: v for k, v in node.meta.items() if k in PROVENANCE}
                function, args, kwargs = operator.getitem, (call, spelling.item), {}
        node.op, node.target, node.args, node.kwargs = op, function, args, kwargs
        renew(self._view, _below(node, source))
        if isinstance(function, OpOverload):  # and so must be what splits its result
            for user in node.users:
                if user.target is torch.split_with_sizes:
                    user.target = torch.ops.aten.split_with_sizes.default

    def _argument(
        self, node: fx.Node, value: Any, field: str, lifted: Lifted, spelling: Spelling
    ) -> Any:
        if isinstance(value, Transposed):
            read = self._argument(node, value.tensor, field, lifted, spelling)
            permute = torch.ops.aten.permute.default
            return self._view.graph.call_function(permute, (read, *TRANSPOSES[permute]))
        if isinstance(value, torch.Tensor):
            target = self._target(value, field, lifted)
            self.names.setdefault(str(node.target), parent_name(target)[0])
            read = self._view.graph.create_node("get_attr", target)
            self._view.count(read, +1)
            return read
        is_list = isinstance(value, tuple) and isinstance(spelling.function, OpOverload)
        return list(value) if is_list else value

    def _target(self, tensor: torch.Tensor, field: str, lifted: Lifted) -> str:
        """The qualified name of a tensor; a new one takes that of the tensor that it replaces."""
        if id(tensor) in self._lifting.targets:
            return self._lifting.targets[id(tensor)][0]
        view, fields = self._view, lifted.spelling.fields
        old = {fields.get(name, name): target for name, target in lifted.targets.items()}
        beside, target = old.get("weight", next(iter(old.values()), "")), old.get(field)
        if target is None:
            owner, name = parent_name(beside)
            sibling = field if name == "weight" else f"{name}_{field}"
            target = view.free_name(f"{owner}.{sibling}" if owner else sibling)
        elif view.is_used(target):
            target = view.free_name(target)
        is_parameter = not beside or isinstance(view.value(beside), nn.Parameter)
        placed = tensor if is_parameter else tensor.detach()
        view.place(target, placed)
        self._lifting.targets[id(tensor)] = target, tensor
        return target


def _below(node: fx.Node, source: fx.Node) -> list[fx.Node]:
    """What was made for a call, in order, the call last."""
    made = [each for each in node.all_input_nodes if each is not source]
    return [*(inner for each in made for inner in _below(each, source)), node]


def _is_read(node: fx.Node) -> bool:
    """Whether a node gives a tensor of the model, as it is, transposed or repeated."""
    return node.op == "get_attr" or node.target in TRANSPOSES or node.target in REPEATS


def _reads_one(node: fx.Node) -> bool:
    return len(node.args) == 1 and not node.kwargs


def _spelling(
    like: Spelling, module: nn.Module, node: fx.Node
) -> tuple[Spelling, dict[str, Any]] | None:
    """How to spell a module, in the same way if that can be, or else in the same dialect."""
    if has_hooks(module) or "forward" in module.__dict__:
        return None
    known = node.all_input_nodes[0].meta.get("val")
    rank = known.dim() if isinstance(known, torch.Tensor) else like.rank
    same_dialect = (each for each in SPELLINGS.values() if each.dialect == like.dialect)
    for spelling in (like, *same_dialect):
        spelt = spelling.spell(module) if spelling.rank in (None, rank) else None
        if spelt is not None:
            return spelling, spelt
    return None
