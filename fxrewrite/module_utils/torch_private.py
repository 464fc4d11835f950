"""Every private name of torch that fxrewrite uses: what for, and what happens without it.

Torch may rename any of them. None is missed in silence: an import says which is gone, or what needs
it takes another way, or whoever asks is given the answer that stops a rewrite.

Only the registries of `nn.Module` are used elsewhere as well, by `module._parameters`,
`module._buffers`, `module._modules` and `module._forward_pre_hooks`. They have been at that place
since the first release of torch, and its public iterators are many times slower.
"""

from __future__ import annotations

import contextlib
import importlib
import weakref
from collections.abc import Container, Iterator
from itertools import repeat
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn
from torch.nn.modules import module as nn_module

__all__ = [
    "DEPENDS_ON_DATA",
    "CustomGraphPass",
    "FakeTensor",
    "FakeTensorMode",
    "HigherOrderOperator",
    "OpOverload",
    "OpOverloadPacket",
    "TorchDispatchMode",
    "boolean_dispatched",
    "disable_current_modes",
    "lookup_backend",
    "pytree",
]

NEEDED = {
    "torch.utils._pytree": "values in nested tuples, lists and dictionaries",
    "torch._ops.OpOverload": "which nodes call an operator of torch",
    "torch._ops.OpOverloadPacket": "the same, of a name without an overload",
    "torch._ops.HigherOrderOperator": "the same, for operators that take functions",
    "torch._subclasses.fake_tensor.FakeTensor": "values of a graph that have a shape and no data",
    "torch._subclasses.fake_tensor.FakeTensorMode": "running a graph on such values",
    "torch._subclasses.fake_tensor.DataDependentOutputException": "what can't be run on them",
    "torch._subclasses.fake_tensor.DynamicOutputShapeException": "the same",
    "torch._subclasses.fake_tensor.UnsupportedFakeTensorException": "the same",
    "torch.utils._python_dispatch.TorchDispatchMode": "what is computed while a model is traced",
    "torch.nn.Module._parameters": "a module's own tensors",
    "torch.nn.Module._buffers": "the same",
    "torch.nn.Module._modules": "the modules in it",
    "torch.nn.Module._forward_hooks": "what a rewrite would bypass",
    "torch.nn.Module._forward_pre_hooks": "the same; also the older weight_norm and spectral_norm",
    "torch.nn.Module._backward_hooks": "the same",
    "torch.nn.Module._backward_pre_hooks": "the same",
    "torch.nn.Module._compiled_call_impl": "what a changed copy of a module must not take over",
}
"""Without one of these fxrewrite can't be imported; the error names it."""

NEEDED_TO_COMPILE = {
    "torch._dynamo.lookup_backend": "the backend that compiles what rules leave",
    "torch._inductor.custom_graph_pass.CustomGraphPass": "the type of inductor's passes",
    "torch.utils._python_dispatch._disable_current_modes": "computing real tensors meanwhile",
}
"""Without one of these `backend` or `inductor_pass` raises an error that names it."""

REPLACED = {
    "torch.nn.modules.module._global_forward_hooks": "what a rewrite would bypass",
    "torch.nn.modules.module._global_forward_pre_hooks": "the same",
    "torch.nn.modules.module._global_backward_hooks": "the same",
    "torch.nn.modules.module._global_backward_pre_hooks": "the same",
    "torch.Tensor._backward_hooks": "the same",
    "torch.Tensor._post_accumulate_grad_hooks": "the same",
    "torch.Tensor._version": "whether a tensor was written to",
    "torch._ops.OpOverload._schema": "which arguments an operator writes to",
    "torch._jit_internal.boolean_dispatched": "names of the arguments of F.max_pool2d and its like",
    "torch.fx.passes.shape_prop._extract_tensor_metadata": "what other passes read of a new node",
    "torch.fx.Node._erased": "whether a node is in a graph no more",
    "torch.fx.Graph._tracer_cls": "which tracer a pickled graph module goes through",
    "torch.fx.Tracer._tensor_constant": "which attributes are tensors that a forward made",
    "torch.fx.Tracer._torchbind_obj": "the same, for objects of C++",
    "torch.nn.Module._non_persistent_buffers_set": "which buffers a state dict leaves out",
    "torch._dynamo.OptimizedModule._orig_mod": "which modules are compiled already",
    "torch._dynamo._dynamo_static_input_type": "which inputs of a compiled graph are buffers",
}
"""Without one of these something below takes another way, which is said there."""

NAMES = {**NEEDED, **NEEDED_TO_COMPILE, **REPLACED}


@contextlib.contextmanager
def _needed() -> Iterator[None]:
    try:
        yield
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"fxrewrite needs a private name that torch {torch.__version__} does not have: {error}"
        ) from error


with _needed():
    from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
    from torch._subclasses.fake_tensor import (
        DataDependentOutputException,
        DynamicOutputShapeException,
        FakeTensor,
        FakeTensorMode,
        UnsupportedFakeTensorException,
    )
    from torch.utils import _pytree as pytree
    from torch.utils._python_dispatch import TorchDispatchMode

    _module = nn.Module()
    for _name in (each for each in NEEDED if each.startswith("torch.nn.Module.")):
        getattr(_module, _name.rpartition(".")[2])

DEPENDS_ON_DATA = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
)

if TYPE_CHECKING:
    from torch._dynamo import lookup_backend
    from torch._inductor.custom_graph_pass import CustomGraphPass
    from torch.utils._python_dispatch import _disable_current_modes as disable_current_modes
else:

    def __getattr__(name: str) -> Any:
        for place in NEEDED_TO_COMPILE:  # some of which take seconds to import
            module, _, private = place.rpartition(".")
            if private.lstrip("_") == name:
                with _needed():
                    return getattr(importlib.import_module(module), private)
        raise AttributeError(name)


HOOK_STATE = tuple(name for name in _module.__dict__ if "hook" in name)
"""A module's hooks, and what it remembers of how they want to be called; later kinds included."""

HOOKS = tuple(
    sorted((n for n in HOOK_STATE if n.endswith("_hooks")), key=lambda n: n[:4] != "_for")
)
"""The registries of a module's hooks, those of its forward first."""

TENSOR_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")
_GLOBAL_HOOKS = tuple(n.rpartition(".")[2] for n in REPLACED if "._global_" in n)

COMPILED_CALL = "_compiled_call_impl"
"""The attribute in which `nn.Module.compile` leaves what it made of the module."""

FX_CONSTANTS = ("_tensor_constant", "_torchbind_obj")
"""How FX begins the names of what a forward made. By other names they are changes to the model."""

try:
    from torch._jit_internal import boolean_dispatched
except ImportError:  # then such functions have arguments without names, and match no step
    boolean_dispatched = weakref.WeakKeyDictionary()


def global_hooks() -> list[dict[int, Any] | None]:
    """The registries of hooks that torch calls for every module; None for one that it lacks."""
    return [getattr(nn_module, name, None) for name in _GLOBAL_HOOKS]


def global_hook_refusal() -> str | None:
    """Why no module may be rewritten: torch calls some hook for every module, or does not tell."""
    registries = global_hooks()
    if None in registries:
        return f"torch {torch.__version__} does not tell whether there are global module hooks"
    if any(registries):
        return "a global module hook is registered, which a rewrite would bypass; remove it first"
    return None


def has_tensor_hook(tensor: torch.Tensor) -> bool:
    """Whether a tensor's gradient goes through a hook, or torch does not tell."""
    # This is asked of every tensor of every match; a generator would take twice as long.
    return any(map(getattr, repeat(tensor), TENSOR_HOOKS, repeat(True)))


def version_of(tensor: torch.Tensor) -> object:
    """What is equal at two times only if torch wrote nothing to the tensor in between.

    Inference tensors do not count writes. Where torch does not tell, each tensor was written to.
    """
    try:
        return tensor._version
    except (AttributeError, RuntimeError):
        return 0 if tensor.is_inference() else object()


def operator_name(operator: OpOverload) -> str:
    """An operator's name with its namespace and without its overload."""
    return str(operator.name()).partition(".")[0]  # type: ignore[no-untyped-call]


def written_arguments(operator: OpOverload) -> tuple[str, ...] | None:
    """The names of the arguments that an operator writes to; None where torch does not tell."""
    schema = getattr(operator, "_schema", None)
    if schema is None:
        return None
    return tuple(a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write)


def tensor_metadata(value: torch.Tensor) -> Any:
    """What passes of torch record as `meta["tensor_meta"]`; None where that can't be made."""
    try:
        from torch.fx.passes.shape_prop import _extract_tensor_metadata
    except ImportError:
        return None
    return _extract_tensor_metadata(value)


def is_erased(node: fx.Node) -> bool:
    """Whether a node was erased from its graph; without torch's mark, the graph is searched."""
    erased = getattr(node, "_erased", None)
    return all(each is not node for each in node.graph.nodes) if erased is None else erased


def tracer_class(graph: fx.Graph) -> type[fx.Tracer] | None:
    """The tracer that a pickled graph module goes through; None, the usual one, if not known."""
    return getattr(graph, "_tracer_cls", None)


def unsaved_buffers(module: nn.Module) -> Container[str]:
    """The names of a module's buffers that its state dict leaves out."""
    known: Container[str] | None = getattr(module, "_non_persistent_buffers_set", None)
    return module._buffers.keys() - module.state_dict().keys() if known is None else known


def is_torch_compiled(module: nn.Module) -> bool:
    """Whether a module is what `torch.compile` made of another."""
    return "_orig_mod" in module._modules or type(module).__module__.startswith("torch._dynamo.")


def is_static_input(node: fx.Node) -> bool:
    """Whether dynamo marks an input of a graph as a model's buffer; else it is like any other."""
    return node.meta.get("tensor_dict", {}).get("_dynamo_static_input_type") is not None
