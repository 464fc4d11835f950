"""Helpers for a module tree: look up, set and delete by qualified name, copy with new tensors."""

from __future__ import annotations

from collections.abc import Container
from typing import Any, TypeVar

import torch
from torch import fx, nn

M = TypeVar("M", bound=nn.Module)

# Where every module keeps its parameters, buffers, children and hooks.
_REGISTRIES = tuple(
    name for name, value in nn.Module().__dict__.items() if isinstance(value, (dict, set))
)


def _parent_name(target: str) -> tuple[str, str]:
    """Split a qualified name into its parent's name and the name below it.

    >>> _parent_name("layer1.0.conv"), _parent_name("conv")
    (('layer1.0', 'conv'), ('', 'conv'))
    """
    parent, _, name = target.rpartition(".")
    return parent, name


def get_submodule(root: nn.Module, target: str) -> nn.Module:
    """The submodule of that qualified name; the empty name is the root itself.

    >>> get_submodule(nn.Sequential(nn.ReLU()), "0")
    ReLU()

    Raises:
        AttributeError: there is no such submodule; the message names the part that is missing.
    """
    module = root
    for depth, name in enumerate(target.split(".") if target else ()):
        found = module._modules.get(name)
        if found is None:
            inside = ".".join(target.split(".")[:depth]) or type(root).__name__
            raise AttributeError(f"{target!r}: {inside} has no submodule {name!r}")
        module = found
    return module


def set_submodule(root: nn.Module, target: str, module: nn.Module) -> None:
    """Put a module in place under that qualified name, whatever was there; its parent must exist.

    >>> model = nn.Sequential(nn.ReLU())
    >>> set_submodule(model, "0", nn.GELU())
    >>> model[0]
    GELU(approximate='none')
    """
    if not target:
        raise ValueError("the root module itself can't be replaced; give a qualified name")
    parent_name, name = _parent_name(target)
    parent = get_submodule(root, parent_name)
    if name in parent._parameters or name in parent._buffers or name in parent.__dict__:
        delattr(parent, name)
    setattr(parent, name, module)


def delete_submodule(root: nn.Module, target: str) -> None:
    """Delete the submodule of that qualified name, and nothing else.

    >>> model = nn.Sequential(nn.ReLU(), nn.GELU())
    >>> delete_submodule(model, "0")
    >>> model
    Sequential(
      (1): GELU(approximate='none')
    )
    """
    if not target:
        raise ValueError("the root module itself can't be deleted; give a qualified name")
    get_submodule(root, target)
    parent, name = _parent_name(target)
    delattr(get_submodule(root, parent), name)


def fresh_name(base: str, taken: Container[str]) -> str:
    """The base name, or else the first of `base_1`, `base_2`, ... that is not taken.

    >>> fresh_name("conv", {"conv", "conv_1"})
    'conv_2'
    """
    name, count = base, 0
    while name in taken:
        count += 1
        name = f"{base}_{count}"
    return name


def replace_node_module(node: fx.Node, modules: dict[str, Any], new_module: nn.Module) -> None:
    """Let the node's target name another module: in its graph module's tree and in `modules`.

    This is the helper that FX passes know from torch. It changes the module tree in place and
    for every caller of that target, so rules don't use it; it serves passes written by hand.

    >>> traced = fx.symbolic_trace(nn.Sequential(nn.ReLU()))
    >>> modules = dict(traced.named_modules())
    >>> replace_node_module(list(traced.graph.nodes)[1], modules, nn.GELU())
    >>> traced.get_submodule("0") is modules["0"]
    True

    Args:
        node: a `call_module` node whose graph is owned by a module.
        modules: modules by qualified name, such as `dict(root.named_modules())`.
        new_module: what the node calls from now on.
    """
    if node.op != "call_module" or not isinstance(node.target, str):
        raise ValueError(f"node {node.name!r} is a {node.op}, not a call_module")
    root = modules.get("", node.graph.owning_module)
    if root is None:
        raise ValueError(f"node {node.name!r}: neither `modules` nor its graph names a root module")
    set_submodule(root, node.target, new_module)
    modules[node.target] = new_module


def evolve(module: M, /, **changes: Any) -> M:
    """A shallow copy of a module with these parameters, buffers, children or attributes changed.

    All that is not named is shared with the original, which is left as it was.

    >>> conv = nn.Conv2d(3, 8, 1, bias=False)
    >>> biased = evolve(conv, bias=torch.zeros(8))
    >>> biased.weight is conv.weight, conv.bias is None, biased.bias.requires_grad
    (True, True, True)

    Args:
        module: the module to copy. Its children are shared.
        changes: by name, a tensor (any shape and dtype) or None for a parameter or buffer, a module
            for a child, or any value for another attribute. A new parameter keeps the
            `requires_grad` of the one it replaces, or else of the module's other parameters.

    Raises:
        AttributeError: the module has nothing of that name.
    """
    new = type(module).__new__(type(module))
    state = new.__dict__
    state.update(module.__dict__)
    for registry in _REGISTRIES:
        state[registry] = state[registry].copy()
    state.pop("_compiled_call_impl", None)
    for name, value in changes.items():
        if name in new._parameters:
            new._parameters[name] = _parameter(module, module._parameters[name], value)
        elif name in new._buffers:
            new._buffers[name] = value
        elif name in new._modules:
            new._modules[name] = value
        elif name in new.__dict__:
            new.__dict__[name] = value
        else:
            known = ", ".join([*module._parameters, *module._buffers])
            raise AttributeError(f"{type(module).__name__} has no {name!r}; its tensors: {known}")
    return new


def _parameter(
    module: nn.Module, old: nn.Parameter | None, value: torch.Tensor | None
) -> nn.Parameter | None:
    # isinstance() would ask torch's metaclass, in Python.
    if value is None or issubclass(type(value), nn.Parameter):
        return value  # type: ignore[return-value]
    like = old
    if like is None:
        like = next((each for each in module._parameters.values() if each is not None), None)
    wants_grad = like is None or like.requires_grad
    return nn.Parameter(value, wants_grad and (value.is_floating_point() or value.is_complex()))


def same_module(one: nn.Module, other: nn.Module) -> bool:
    """Whether two modules are alike in all they hold, their tensors to the bit if they have any."""
    if one is other:
        return True
    mine, theirs = one.__dict__, other.__dict__
    return (
        type(one) is type(other)
        and mine.keys() == theirs.keys()
        and all(_same(mine[name], theirs[name]) for name in mine)
    )


def differs_in_numbers(one: nn.Module, other: nn.Module) -> bool:
    """Whether two modules differ at most in mode, their tensors' numbers, and having a bias."""
    mine, theirs = one.__dict__, other.__dict__
    rest = mine.keys() - {"_parameters", "_buffers", "training"}
    held, given = ({**each._parameters, **each._buffers} for each in (one, other))
    return (
        type(one) is type(other)
        and mine.keys() == theirs.keys()
        and held.keys() == given.keys()
        and all(_same(mine[name], theirs[name]) for name in rest)
        and all(_metadata(held[name]) == _metadata(given[name]) for name in held.keys() - {"bias"})
    )


def _metadata(tensor: torch.Tensor | None) -> Any:
    return None if tensor is None else (tensor.shape, tensor.dtype, tensor.device)


def _same(one: Any, other: Any) -> bool:
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        alike = one.dtype == other.dtype and one.requires_grad == other.requires_grad
        if one.device != other.device or not alike or one.stride() != other.stride():
            return False
        return one.shape == other.shape if one.is_meta else torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, nn.Module):
        return same_module(one, other)
    return isinstance(one, bool | int | float | str | set) and one == other
