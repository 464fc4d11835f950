"""Keep what a graph has recorded of its values true for the nodes that a rewrite makes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from ..module_utils.evolve import evolve
from ..module_utils.torch_private import FakeTensor, FakeTensorMode, pytree, tensor_metadata
from .op_traits import traits_of_module
from .overlay import Overlay

# Of how many dimensions a batch norm takes a value, and gives one of the same shape.
_BATCH_NORMS: dict[type[nn.Module], tuple[int, ...]] = {
    nn.BatchNorm1d: (2, 3),
    nn.BatchNorm2d: (4,),
    nn.BatchNorm3d: (5,),
    nn.SyncBatchNorm: (),  # which asks more of it
}


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
    if isinstance(function, nn.Module) and len(args) == 1 and not kwargs:
        quick = layer_on_fake(function, args[0])
        if quick is not None:
            return quick

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


def layer_on_fake(module: nn.Module, value: Any) -> FakeTensor | None:
    """What a layer of torch gives for a fake tensor; None where only running it can tell.

    A fake tensor makes each operation many times slower, as torch looks for what it may do besides.
    """
    meta = meta_like(value)
    if meta is None:
        return None
    dims = next((dims for kind, dims in _BATCH_NORMS.items() if isinstance(module, kind)), None)
    if dims is not None and value.dim() not in dims:
        return None
    traits = traits_of_module(module)
    if traits.keeps != "metadata":
        held = {name: each for name, each in module._parameters.items() if each is not None}
        here = value.device, value.dtype
        if (
            not traits.layer
            or module._modules
            or any(not _is_plain(e, here) for e in held.values())
        ):
            return None
        changes = {name: torch.empty_like(each, device="meta") for name, each in held.items()}
        meta = type(module).forward(evolve(module, **changes), meta)
    return FakeTensor(value.fake_mode, meta, value.device)


def function_on_fakes(
    function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> FakeTensor | None:
    """What a function that computes one new tensor gives for fake ones; or None, as above."""
    leaves, spec = pytree.tree_flatten((args, dict(kwargs)))
    fakes: list[Any] = [each for each in leaves if isinstance(each, torch.Tensor)]
    metas = {id(each): meta_like(each) for each in fakes}
    devices = {each.device for each in fakes}
    if len(devices) != 1 or any(each is None for each in metas.values()):
        return None
    try:
        args, kwargs = pytree.tree_unflatten([metas.get(id(e), e) for e in leaves], spec)
        made = function(*args, **kwargs)
    except Exception:
        return None
    is_plain = type(made) is torch.Tensor and made.is_meta and made.is_contiguous()
    return FakeTensor(fakes[0].fake_mode, made, fakes[0].device) if is_plain else None


def meta_like(value: Any) -> torch.Tensor | None:
    """A meta tensor like a fake one of numbers that lie in the usual order, or None."""
    if not isinstance(value, FakeTensor) or not all(type(size) is int for size in value.shape):
        return None
    is_cast = torch.is_autocast_enabled(value.device.type)
    if is_cast or not value.is_floating_point() or not value.is_contiguous():
        return None
    meta = torch.empty(value.shape, dtype=value.dtype, device="meta")
    return meta if type(meta) is torch.Tensor else None  # a mode may be active


def _is_plain(tensor: torch.Tensor, here: tuple[torch.device, torch.dtype]) -> bool:
    return (tensor.device, tensor.dtype) == here and tensor.is_contiguous()
