"""Where a rewrite goes: a GraphModule that shares with the model all that was not rewritten."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import fx, nn

from ..ir.graph_view import GraphView
from ..module_utils.names import parent_name
from ..module_utils.torch_private import HOOK_STATE, tracer_class, unsaved_buffers


def graph_module(view: GraphView) -> fx.GraphModule:
    """The view's graph and what it uses as a GraphModule; the view's model stays as it is."""
    root, graph = view.root, view.graph
    # Torch's own constructor would look every target up in one root; ours are in two places.
    made = fx.GraphModule(
        nn.Module(), fx.Graph(tracer_cls=tracer_class(graph)), type(root).__name__
    )
    made.training = root.training
    used = {str(n.target): n for n in graph.nodes if n.op in ("call_module", "get_attr")}
    holders = _Holders(made, root)
    for target, node in used.items():
        _install(target, node, holders, view)
    for name in HOOK_STATE:
        if root.__dict__.get(name) is not None:
            made.__dict__[name] = copy.copy(root.__dict__[name])
    if isinstance(root, fx.GraphModule):  # whose hooks may read what else it was given
        made.__dict__ = {**root.__dict__, **made.__dict__}
    made.meta = dict(getattr(root, "meta", {}))
    made.graph = graph
    graph.lint()
    return made


class _Holders:
    """The containers of the result by qualified name, each with the model's own of that name."""

    def __init__(self, made: nn.Module, root: nn.Module) -> None:
        self._known: dict[str, tuple[nn.Module, Any] | None] = {"": (made, root)}

    def at(self, name: str) -> tuple[nn.Module, Any] | None:
        """The container, made where there is none; None inside what stands there whole."""
        if name not in self._known:
            self._known[name] = self._make(*parent_name(name))
        return self._known[name]

    def _make(self, parent: str, name: str) -> tuple[nn.Module, Any] | None:
        outer = self.at(parent)
        if outer is None:
            return None
        source = getattr(outer[1], name, None)
        holder = outer[0]._modules.get(name)
        if holder is not None and holder is source:
            return None
        if source is not None and not isinstance(source, nn.Module):
            # A graph may read an attribute of a tensor, such as `scale.T`.
            _put(outer[0], outer[1], name, source)
            return None
        if holder is None:
            holder = nn.Module()
            holder.training = getattr(source, "training", outer[0].training)
            outer[0].add_module(name, holder)
        return holder, source


def _install(target: str, node: fx.Node, holders: _Holders, view: GraphView) -> None:
    """Put what a node uses under its qualified name, in containers of our own."""
    parent, name = parent_name(target)
    place = holders.at(parent)
    if place is None:
        return
    holder, source = place
    module = view.module(node)
    if module is not None:
        # Only the graph module itself has names that would clash; add_module() looks for them.
        if isinstance(holder, fx.GraphModule):
            holder.add_module(name, module)
        else:
            holder._modules[name] = module
        return
    is_new = target in view.placed and target not in view.constants
    _put(holder, source, name, view.attribute(node), is_new=is_new)


def _put(holder: nn.Module, source: Any, name: str, value: Any, *, is_new: bool = False) -> None:
    """Give a container the attribute that the model's own has, or a new one."""
    if hasattr(holder, name):
        return
    if not isinstance(value, torch.Tensor) or isinstance(value, nn.Parameter):
        setattr(holder, name, value)
        return
    # What is a buffer in the model, or new, is saved; a constant of the forward never was.
    is_buffer = isinstance(source, nn.Module) and name in source._buffers
    saved = is_new or (is_buffer and name not in unsaved_buffers(source))
    holder.register_buffer(name, value, persistent=saved)
