"""What type of value a node of a trace gives, as far as that can be told."""

from __future__ import annotations

import builtins
import math
import operator
from typing import Any

import torch
from torch import fx, nn

from ..ir.op_traits import OpTraits, is_torch, traits_of, traits_of_module

_ARITHMETIC = {
    getattr(operator, name) for name in "abs add sub mul floordiv truediv mod pow neg".split()
}
_ROUNDING = {math.ceil, math.floor}
_NUMBERS = (int, float)

Kind = tuple[type[Any] | None, bool]
_UNKNOWN: Kind = (None, False)


class Kinds:
    """The types that the nodes of a model's trace are taken to give, and whether that is sure.

    The model's arguments are taken for tensors, which is not sure; what is made of them may be
    told `as_of_tensors`. None is where nothing can be told: what a call gives may be a tuple, or
    None, as well as a tensor.
    """

    def __init__(self, model: nn.Module, *, as_of_tensors: bool = False) -> None:
        self._model, self._as_of_tensors = model, as_of_tensors
        self._known: dict[fx.Node, Kind] = {}

    def of(self, node: fx.Node) -> Kind:
        """The type, and whether it is sure."""
        path = [node]
        while path[-1] not in self._known and (source := _source(path[-1])) is not None:
            path.append(source)
        for each in reversed(path):
            if each not in self._known:
                source = _source(each)
                kind = self._known[source] if source else _UNKNOWN
                if self._as_of_tensors and source is not None and source.op == "placeholder":
                    kind = kind[0], True
                self._known[each] = self._told(each, kind)
        return self._known[node]

    def is_never_none(self, node: fx.Node) -> bool:
        """Whether a value is sure to be something."""
        kind, is_sure = self.of(node)
        if kind is not None and is_sure:
            return True
        if node.target is operator.getitem:  # of an LSTM, say
            source = node.all_input_nodes[0]
            return source.op == "call_module" and self._is_of_torch(source)
        if node.op == "call_module":
            return self._is_of_torch(node)
        is_read = node.target is builtins.getattr
        return node.op == "call_function" and is_torch(node.target) and not is_read

    def _is_of_torch(self, node: fx.Node) -> bool:
        module = self._model.get_submodule(str(node.target))
        is_known = type(module).__module__.startswith("torch.nn.modules.")
        is_plain = not isinstance(module, (nn.MultiheadAttention, nn.Sequential))
        return is_known and is_plain

    def _is_recurrent(self, node: fx.Node) -> bool:
        source = node.all_input_nodes[0]
        if source.op != "call_module":
            return False
        module = self._model.get_submodule(str(source.target))
        return traits_of_module(module).gives == "tensor first"

    def _told(self, node: fx.Node, source: Kind) -> Kind:
        if node.op == "placeholder":
            stars = len(str(node.target)) - len(str(node.target).lstrip("*"))
            return ((torch.Tensor, False), (tuple, True), (dict, True))[stars]
        if node.op == "get_attr":
            return torch.Tensor, True
        if node.op == "call_module":
            module = self._model.get_submodule(str(node.target))
            if type(module) is nn.Identity:
                return source
            is_one = traits_of_module(module).gives == "tensor"
            several = getattr(module, "return_indices", False)
            return (torch.Tensor, True) if is_one and not several else _UNKNOWN
        if node.op == "call_method":
            return _of_method(node, source)
        if node.target is operator.getitem and node.args[1] == 0 and self._is_recurrent(node):
            return torch.Tensor, True
        return _of_function(node, source)


def _source(node: fx.Node) -> fx.Node | None:
    """The value that decides what a node gives."""
    is_call = node.op in ("call_module", "call_method", "call_function")
    return node.all_input_nodes[0] if is_call and node.all_input_nodes else None


def _of_method(node: fx.Node, source: Kind) -> Kind:
    (kind, is_sure), traits = source, traits_of(node, None)
    if kind is None and traits.gives in ("size", "number"):
        kind = torch.Tensor  # most likely: what has a size
    return _given(node, traits, is_sure) if kind is torch.Tensor else _UNKNOWN


def _given(node: fx.Node, traits: OpTraits, is_sure: bool) -> Kind:
    """What an attribute of a tensor gives, a method, or a function that is called with one."""
    if traits.gives == "several":
        return _UNKNOWN
    if traits.gives == "size":
        is_one = node.target is not builtins.getattr and len(node.args) + len(node.kwargs) > 1
        return (int if is_one else torch.Size), is_sure
    if traits.gives == "number":
        return int, is_sure
    return torch.Tensor, is_sure and traits.gives == "tensor"


def _of_function(node: fx.Node, source: Kind) -> Kind:
    (kind, is_sure), target = source, node.target
    if target is builtins.getattr:
        traits = traits_of(node, None)
        if not traits.gives:
            return _UNKNOWN
        if kind is None and traits.gives in ("size", "number"):
            kind = torch.Tensor
        return _given(node, traits, is_sure) if kind is torch.Tensor else _UNKNOWN
    if target is operator.getitem:
        if kind is torch.Size:
            return (int if isinstance(node.args[1], int) else torch.Size), is_sure
        return (torch.Tensor, is_sure) if kind is torch.Tensor else _UNKNOWN
    if target in _ROUNDING and kind in _NUMBERS:
        return int, is_sure
    if target in _ARITHMETIC and kind in _NUMBERS:
        is_alone = len(node.all_input_nodes) == 1
        return (float if target is operator.truediv else kind), is_sure and is_alone
    if target in _ARITHMETIC:
        return source if kind is torch.Tensor else _UNKNOWN
    traits = traits_of(node, None)
    if traits.fresh and "return_indices" not in node.kwargs:
        return torch.Tensor, True
    if traits.gives in ("several", "size", "number"):
        return _given(node, traits, is_sure) if kind is torch.Tensor else _UNKNOWN
    return (torch.Tensor, False) if is_torch(target) else _UNKNOWN
