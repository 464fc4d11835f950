"""Which modules a tracer keeps as one node, and which can't be traced at all."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import TypeAlias

import torch
from torch import fx, nn

from ..module_utils.hooks import has_hooks
from ..module_utils.torch_private import is_torch_compiled
from .proxies import Proxy

LeafModules: TypeAlias = "Iterable[type[nn.Module] | str]"


def checked_leaves(leaf_modules: LeafModules) -> tuple[type[nn.Module] | str, ...]:
    """The leaves as a tuple; raises TypeError where one is no module type and no name."""
    is_many = isinstance(leaf_modules, Iterable) and not isinstance(leaf_modules, str | nn.Module)
    leaves = tuple(leaf_modules) if is_many else ()
    for each in leaves:
        is_type = isinstance(each, type) and issubclass(each, nn.Module)
        is_many = is_many and (is_type or isinstance(each, str))
    if not is_many:
        raise TypeError(
            f"leaf_modules is a list of module types and qualified names, not {leaf_modules!r:.80}"
        )
    return leaves


def keeps_whole(
    tracer: fx.Tracer | type[fx.Tracer], types: tuple[type[nn.Module], ...], names: set[str]
) -> Callable[[nn.Module, str], bool]:
    """Whether a module is a leaf for a tracer, or of these types, or of these names."""
    base = tracer() if isinstance(tracer, type) else tracer

    def keeps(module: nn.Module, name: str) -> bool:
        return base.is_leaf_module(module, name) or name in names or isinstance(module, types)

    return keeps


def with_leaves(
    tracer: fx.Tracer | type[fx.Tracer], types: tuple[type[nn.Module], ...], names: set[str]
) -> fx.Tracer:
    """A copy of the tracer to which further modules are leaves."""
    base = tracer() if isinstance(tracer, type) else tracer
    keeps = keeps_whole(base, types, names)
    own = copy.copy(base)
    own.__dict__ = {name: copy.copy(value) for name, value in vars(base).items()}
    own.is_leaf_module = lambda module, name: (  # type: ignore[method-assign, assignment]
        keeps(module, name) or has_hooks(module) is not None
    )
    if type(base).proxy is fx.Tracer.proxy:  # otherwise the user's tracer has values of its own
        own.proxy = lambda node: Proxy(node, own)  # type: ignore[method-assign]
    return own


def is_compiled(module: nn.Module) -> bool:
    """Whether a module is what torch.jit or torch.compile made of another."""
    return isinstance(module, torch.jit.ScriptModule) or is_torch_compiled(module)


def not_there(model: nn.Module) -> str | None:
    """Why a module's forward is not there to be traced, or None."""
    if isinstance(model, torch.jit.ScriptModule):
        return "it is scripted already; rewrite the model before torch.jit"
    if is_compiled(model):
        return "it is compiled already; rewrite the model before torch.compile"
    if "forward" in model.__dict__:
        return (
            "it has a forward set on the instance, which tracing would pass over; "
            "define it in the class, or pass a GraphModule"
        )
    return None
