"""Modules whose forward is one call of a function on their own tensors: layers but in name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ..dialects.lifting import Lifting
from ..ir.graph_view import GraphView
from ..module_utils.hooks import runs_its_forward_alone
from ..rules.rule import Rule
from ..targets.module_copy import copied
from ..tracing.tracer import attempt


class Layered:
    """A copy of a model in which layers of torch stand for modules that do the same.

    A layer has the very tensors of its module, by the same names, and the module's attributes.
    `instead` has the modules by the identity of their layers; there may be none.
    """

    def __init__(self, model: nn.Module, rules: Sequence[Rule[Any]]) -> None:
        found = {name: _layer(each, rules) for name, each in model.named_modules() if name}
        layers = {name: layer for name, layer in found.items() if layer is not None}
        own = {name: model.get_submodule(name) for name in layers}
        self.copy = model
        if layers:
            self.copy = copied(model, {id(own[name]): layer for name, layer in layers.items()})
        self.instead = {id(self.copy.get_submodule(name)): each for name, each in own.items()}


def _layer(module: nn.Module, rules: Sequence[Rule[Any]]) -> nn.Module | None:
    held = {
        k: t for k, t in (*module._parameters.items(), *module._buffers.items()) if t is not None
    }
    # A subclass of a layer of torch is one for rules to look at as it is.
    kind = type(module)
    own = kind.__mro__[: kind.__mro__.index(nn.Module)]
    is_torchs = any(base.__module__.partition(".")[0] == "torch" for base in own)
    is_plain = kind.__call__ is nn.Module.__call__ and runs_its_forward_alone(module)
    if is_torchs or not is_plain or not held or module._modules:
        return None
    traced = attempt(module)
    if not traced.is_whole or traced.graph is None or traced.assumptions or traced.constants:
        return None
    lifting = Lifting(GraphView(module, traced.graph, {}), rules)
    nodes = [n for n in traced.graph.nodes if n.op not in ("placeholder", "get_attr", "output")]
    (lifted,) = lifting.lifted.values() if len(lifting.lifted) == 1 else (None,)
    if lifted is None or nodes != [lifted.node] or lifted.targets != {k: k for k in held}:
        return None
    taken = traced.graph.find_nodes(op="placeholder")
    if len(taken) != 1 or traced.graph.output_node().args != (lifted.node,):
        return None
    layer = lifted.module
    # An attribute of the name of a parameter that is None would hide a new one.
    own_names = {*vars(layer), *layer._parameters, *layer._buffers}
    layer.__dict__.update({k: v for k, v in vars(module).items() if k not in own_names})
    return layer
