"""Helpers for a module tree: look up, set, replace and delete by qualified name."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from .names import parent_name


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
    owner, name = parent_name(target)
    parent = get_submodule(root, owner)
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
    parent, name = parent_name(target)
    delattr(get_submodule(root, parent), name)


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
