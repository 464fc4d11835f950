"""Keep what a graph has recorded of its values true for the nodes that a rewrite makes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from ..module_utils.torch_private import FakeTensor, FakeTensorMode, pytree, tensor_metadata
from .overlay import Overlay


def renew(view: Overlay, nodes: Iterable[fx.Node], mode: FakeTensorMode | None = None) -> None:
    """Record `meta["val"]` of these nodes, in order, where the graph has fake tensors for others.

    `meta["tensor_meta"]` is renewed with it where there is one. What can't be run on tensors
    without data keeps what was recorded for the value that it replaces.
    """
    nodes = list(nodes)
    read = [each for node in nodes for each in (node, *node.all_input_nodes)]
    mode = mode or mode_of(*(each.meta["val"] for each in read if "val" in each.meta))
    for node in nodes if mode is not None else ():
        try:
            value = value_on_fakes(view, node, mode)  # type: ignore[arg-type]
        except Exception:
            continue
        node.meta["val"] = value
        if "tensor_meta" in node.meta and isinstance(value, torch.Tensor):
            del node.meta["tensor_meta"]
            if (known := tensor_metadata(value)) is not None:
                node.meta["tensor_meta"] = known


def run_on_fakes(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What a function or module gives for fake tensors; its own tensors are made fake as well."""
    mode = mode_of(*pytree.tree_leaves((args, dict(kwargs))))
    if mode is None:
        raise ValueError("none of its arguments is a fake tensor")

    def fake(leaf: Any) -> Any:
        is_real = isinstance(leaf, torch.Tensor) and not isinstance(leaf, FakeTensor)
        return mode.from_tensor(leaf, static_shapes=True) if is_real else leaf

    args, kwargs = pytree.tree_map(fake, (tuple(args), dict(kwargs)))
    with mode, torch.no_grad():
        if not isinstance(function, nn.Module):
            return function(*args, **kwargs)
        tensors = {**dict(function.named_parameters()), **dict(function.named_buffers())}
        fakes = {name: fake(tensor) for name, tensor in tensors.items()}
        return torch.func.functional_call(function, fakes, args, dict(kwargs))


def value_on_fakes(
    view: Overlay, node: fx.Node, mode: FakeTensorMode, known: Mapping[fx.Node, Any] | None = None
) -> Any:
    """What a node gives for the fake tensors that are recorded, or for others that are known."""
    if node.op == "get_attr":
        return mode.from_tensor(view.attribute(node), static_shapes=True)

    def value(each: fx.Node) -> Any:
        return known[each] if known and each in known else recorded(view, each, mode)

    args, kwargs = fx.node.map_arg((node.args, node.kwargs), value)
    if node.op == "call_method":
        return run_on_fakes(getattr(torch.Tensor, str(node.target)), args, kwargs)
    return run_on_fakes(view.module(node) or node.target, args, kwargs)


def recorded(view: Overlay, node: fx.Node, mode: FakeTensorMode) -> Any:
    """What is recorded of a node; a tensor of the model can be made fake at any time."""
    if "val" not in node.meta and node.op == "get_attr":
        return mode.from_tensor(view.attribute(node), static_shapes=True)
    return node.meta["val"]


def mode_of(*values: Any) -> FakeTensorMode | None:
    """The mode of the first fake tensor among these."""
    leaves = pytree.tree_leaves(values) if values else ()
    return next((each.fake_mode for each in leaves if isinstance(each, FakeTensor)), None)
