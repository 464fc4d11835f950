"""Make a graph of a model: named types are leaves, and what can't be traced is explained."""

from __future__ import annotations

import copy
import operator
import threading
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, TypeAlias

import torch
from torch import fx, nn
from torch.fx.graph import inplace_methods

from . import watching
from .errors import TraceError
from .snapshot import ModelState
from .soundness import has_hooks
from .watching import AmbientStateError, watched

LeafModules: TypeAlias = "Iterable[type[nn.Module] | str]"

# How FX names the tensors and objects that it finds in a forward and keeps on the model.
_CONSTANTS = ("_tensor_constant", "_torchbind_obj")

# While FX traces, it patches nn.Module for all threads.
_tracing = threading.RLock()

_PLAIN_WORDS = {
    "cannot be used as inputs to control flow": "it branches on a value that only a real run has",
    "cannot be iterated": "it iterates over a value whose length only a real run has",
    "'len' is not supported": "it asks for the length of a value that only a real run has",
    "is not a member": "it uses a parameter that belongs to no module of the model",
}


def trace(
    model: nn.Module,
    leaf_modules: LeafModules = (),
    tracer: fx.Tracer | type[fx.Tracer] | None = None,
) -> tuple[fx.Graph, dict[str, Any]]:
    """A graph of the model for the caller to edit, and the constants that tracing found, by name.

    A GraphModule's graph is copied as it is. A module that carries hooks is a leaf, since a hook
    runs only when its module is called.

    Args:
        model: the model, which stays as it is.
        leaf_modules: modules that become one node each, by type (subclasses included) or by
            qualified name.
        tracer: a tracer, or its class, to use instead of `torch.fx.Tracer`.

    Raises:
        TraceError: the model can't be traced; the message names the module and the line.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected an nn.Module, found {type(model).__name__}: {model!r:.80}")
    if isinstance(model, fx.GraphModule):
        return copy_of(model.graph), {}
    _refuse_compiled(model)
    leaves = tuple(leaf_modules)
    with _tracing:
        if tracer is not None:
            return _traced(model, _with_leaves(model, leaves, tracer))
        # Reads of buffers are recorded, so that writes to them are not carried out in tracing.
        # A model that needs a buffer's value then does not trace, and gets a second try without.
        own = _with_leaves(model, leaves, fx.Tracer)
        own.proxy_buffer_attributes = True
        try:
            return _traced(model, own)
        except TraceError:
            return _traced(model, _with_leaves(model, leaves, fx.Tracer))


def copy_of(graph: fx.Graph) -> fx.Graph:
    """A copy of a graph, whose nodes have the same names."""
    copied = copy.deepcopy(graph)
    for node, old in zip(copied.nodes, graph.nodes, strict=True):
        if node.name != old.name:  # what a graph module has itself is a name that FX avoids
            node.name = old.name
    return copied


def _traced(model: nn.Module, tracer: fx.Tracer) -> tuple[fx.Graph, dict[str, Any]]:
    before = ModelState(model, buffers=not tracer.proxy_buffer_attributes)
    known = set(model.__dict__)
    with before, before:  # Ctrl-C may come while the inner one is putting things back
        try:
            graph = tracer.trace(model)
        except Exception as error:
            raise TraceError(_explanation(model, error)) from error
        # A tensor made in the forward becomes a constant, which FX leaves on the model.
        found = {name: model.__dict__[name] for name in model.__dict__.keys() - known}
        constants = {name: each for name, each in found.items() if name.startswith(_CONSTANTS)}
        for name in constants:
            del model.__dict__[name]
        changed = before.restore()
    if changed is not None:
        raise TraceError(
            f"the forward of {type(model).__name__} changes {changed}, which a graph can't do for "
            "it; keep the module that does so as one node with leaf_modules=, or take it out"
        )
    for node in (*graph.find_nodes(op="placeholder"), graph.output_node()):
        if isinstance(node.type, str):  # an annotation not evaluated, which torch.jit can't read
            node.type = None
    return graph, constants


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


def _with_leaves(
    model: nn.Module,
    leaves: tuple[type[nn.Module] | str, ...],
    tracer: fx.Tracer | type[fx.Tracer],
) -> fx.Tracer:
    """A copy of the tracer to which further modules are leaves."""
    base = tracer() if isinstance(tracer, type) else tracer
    types = tuple(each for each in leaves if isinstance(each, type))
    names = {each for each in leaves if isinstance(each, str)}
    for name in names:
        model.get_submodule(name)

    def is_leaf(module: nn.Module, name: str) -> bool:
        named = isinstance(module, types) or name in names
        return named or has_hooks(module) is not None or base.is_leaf_module(module, name)

    own = copy.copy(base)
    own.__dict__ = {name: copy.copy(value) for name, value in vars(base).items()}
    own.is_leaf_module = is_leaf  # type: ignore[method-assign, assignment]
    if type(base).proxy is fx.Tracer.proxy:  # otherwise the user's tracer has values of its own
        own.proxy = lambda node: Proxy(node, own)  # type: ignore[method-assign]
    watched(own)
    return own


class Proxy(fx.Proxy):
    """A value to trace with, whose `x += y` is recorded as the write in place that it is.

    Of FX's own it makes a new value, and whatever else is `x`, or a view of it, misses the write.
    """


def _recorded(write: Any) -> Any:
    def method(self: fx.Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", write, (self, other), {})

    return method


for _name in inplace_methods.keys() - {"setitem"}:  # which FX refuses to trace
    setattr(Proxy, f"__{_name}__", _recorded(getattr(operator, _name)))


def _refuse_compiled(model: nn.Module) -> None:
    kind = type(model).__name__
    if isinstance(model, torch.jit.ScriptModule):
        raise TraceError(f"{kind} is scripted already; rewrite the model before torch.jit")
    if "_orig_mod" in model._modules:
        raise TraceError(f"{kind} is compiled already; rewrite the model before torch.compile")
    if "forward" in model.__dict__:
        raise TraceError(
            f"{kind} has a forward set on the instance, which tracing would pass over; "
            "define it in the class, or pass a GraphModule"
        )


def _explanation(model: nn.Module, error: Exception) -> str:
    names = {id(module): name for name, module in model.named_modules()}
    kind = where = type(model).__name__
    name, line = "", ""
    for frame, lineno in _user_frames(error):
        module = frame.f_locals.get("self")
        if isinstance(module, nn.Module) and id(module) in names:
            name = names[id(module)]
            where = f"{name} ({type(module).__name__})" if name else kind
        at = traceback.FrameSummary(frame.f_code.co_filename, lineno, frame.f_code.co_name)
        line = f"{at.filename}:{at.lineno}: {at.line}"
    reason = next((words for part, words in _PLAIN_WORDS.items() if part in str(error)), None)
    because = f"{reason or 'the forward raised there'} ({type(error).__name__}: {error})"
    if isinstance(error, AmbientStateError):
        because = str(error)
    advice = (
        f"keep that module as one node with leaf_modules=[{name!r}]"
        if name
        else "rewrite those of its submodules that can be traced"
    )
    return (
        f"tracing {kind} stopped in {where}, at\n  {line}\n"
        f"because {because}.\n"
        f"Either {advice}, or pass a tracer= or a GraphModule of your own."
    )


def _user_frames(error: Exception) -> Iterator[tuple[FrameType, int]]:
    """The frames of an error that are of a forward, outermost first."""
    fx_folder = Path(fx.__file__).parent
    not_theirs = (Path(__file__), Path(watching.__file__), Path(nn.modules.module.__file__))
    for frame, lineno in traceback.walk_tb(error.__traceback__):
        path = Path(frame.f_code.co_filename)
        if fx_folder not in path.parents and path not in not_theirs:
            yield frame, lineno
