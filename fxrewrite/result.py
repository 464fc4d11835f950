"""Where a rewrite goes: a GraphModule that shares with the model all that was not rewritten."""

from __future__ import annotations

import copy

import torch
from torch import fx, nn

from .modules import _parent_name
from .soundness import HOOKS
from .view import GraphView

# Beside the hooks themselves, how torch remembers that they want to be called.
_HOOK_STATE = (
    *HOOKS,
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
    "_is_full_backward_hook",
)


def graph_module(view: GraphView) -> fx.GraphModule:
    """The view's graph and what it uses as a GraphModule; the view's model stays as it is."""
    root, graph = view.root, view.graph
    # Torch's own constructor would look every target up in one root; ours are in two places.
    empty = fx.Graph(tracer_cls=getattr(graph, "_tracer_cls", None))
    made = fx.GraphModule(nn.Module(), empty, class_name=type(root).__name__)
    made.training = root.training
    targets = {str(n.target): n for n in graph.nodes if n.op in ("call_module", "get_attr")}
    for target in sorted(targets, key=lambda target: target.count(".")):
        _install(made, targets[target], view)
    for name in _HOOK_STATE:
        if root.__dict__.get(name) is not None:
            made.__dict__[name] = copy.copy(root.__dict__[name])
    made.meta = dict(getattr(root, "meta", {}))
    made.graph = graph
    graph.lint()
    return made


def _install(made: nn.Module, node: fx.Node, view: GraphView) -> None:
    """Put what a node uses under its qualified name, in containers of our own."""
    parent, name = _parent_name(str(node.target))
    holder, source = made, view.root
    for part in parent.split(".") if parent else ():
        source = getattr(source, part, None)  # type: ignore[assignment]
        inner = holder._modules.get(part)
        if inner is not None and inner is source:
            return  # the model's own module stands here whole, with all that is in it
        if inner is None:
            inner = nn.Module()
            inner.training = getattr(source, "training", made.training)
            holder.add_module(part, inner)
        holder = inner
    value = view.module(node) if node.op == "call_module" else view.attribute(node)
    if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter):
        # What is a buffer in the model, or new, is saved; a constant of the forward never was.
        is_new = node.target in view.placed and node.target not in view.constants
        buffers = getattr(source, "_buffers", {})
        unsaved = getattr(source, "_non_persistent_buffers_set", ())
        saved = is_new or (name in buffers and name not in unsaved)
        holder.register_buffer(name, value, persistent=saved)
    else:
        setattr(holder, name, value)
