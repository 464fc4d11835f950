"""Layers whose forward is their own, and does what the layer does to something made of its input.

Such a layer may be given another weight and bias: convolutions that pad by the size of their input,
say. It is shown by all ways that its forward can go, as graphs, and not by the name of its class.
"""

from __future__ import annotations

from typing import Any, TypeVar

import attrs
import torch
from torch import fx, nn
from torch.nn import functional as F

import fxrewrite as fxr
from fxrewrite.helpers import ways

from .norms import Norm

_CALLS: dict[type[nn.Module], Any] = {
    nn.Conv1d: torch.conv1d,
    nn.Conv2d: torch.conv2d,
    nn.Conv3d: torch.conv3d,
    nn.ConvTranspose1d: torch.conv_transpose1d,
    nn.ConvTranspose2d: torch.conv_transpose2d,
    nn.ConvTranspose3d: torch.conv_transpose3d,
    nn.Linear: F.linear,
}
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups")
# What tells of a tensor what another weight or bias of the same shape tells as well.
_ASKED = ("size", "dim", "numel", "shape", "ndim", "dtype", "device")
# What a module may have of its own, and is called by its forward as any other.
_HARMLESS = {"__init__", "__annotate__", "__annotate_func__", "__repr__", "extra_repr", "train"}

L = TypeVar("L", bound=nn.Module)


@attrs.frozen
class Own:
    """What a layer's own forward calls on what the layer makes: a norm, by name, or nothing.

    `rest` is all else that it does, on each way that it can go.
    """

    norm: str | None
    rest: Any = attrs.field(repr=False)


class OwnForward(nn.Conv2d, fxr.Family):
    """A layer with a forward of its own, which is that of the layer, after something else."""

    @staticmethod
    def proof(layer: nn.Module) -> str | None:
        """Why it is not shown that the layer's forward ends with what the layer does, or None."""
        found = own_forward(layer)
        if isinstance(found, str):
            return found
        return found.norm and f"it calls {found.norm} on what the layer makes"


class ForwardedLayer(nn.Conv2d, fxr.Family):
    """A layer that defines a forward, whatever that does."""

    @classmethod
    def member(cls, kind: type[Any]) -> type[nn.Module] | None:
        """The type itself, if it is a layer's and its forward is not the layer's."""
        base = next((each for each in _CALLS if issubclass(kind, each)), None)
        return kind if base is not None and kind.forward is not base.forward else None


def own_forward(layer: nn.Module) -> Own | str:
    """What a layer's own forward does with its weight and bias, or why that is not shown.

    It holds for any weight and bias of these shapes, for a bias where there is none yet, and with
    an identity in the place of the norm.

    >>> class Padded(nn.Conv2d):
    ...     def forward(self, x):
    ...         return F.conv2d(F.pad(x, (0, 1, 0, 1)), self.weight, self.bias)
    >>> own_forward(Padded(3, 4, 2))
    Own(norm=None)
    >>> class Doubled(nn.Conv2d):
    ...     def forward(self, x):
    ...         return super().forward(x) * 2
    >>> own_forward(Doubled(3, 4, 2))
    'what the layer makes is read by mul'
    """
    held = layer._parameters
    if held.get("weight") is None or "bias" not in held:
        return "its weight and bias are no parameters of its own"
    own = _handled_otherwise(type(layer))
    if own is not None:
        return f"it has a {own} of its own"
    bias = None if held["bias"] is None else _Sealed(torch.empty(1))
    try:
        found = _read(fxr.evolve(layer, weight=_Sealed(torch.empty(1)), bias=bias))
        if isinstance(found, str):
            return found
        folded = layer if found.norm is None else without_norm(layer, found.norm)
        sealed = {each: _Sealed(torch.empty(1)) for each in ("weight", "bias")}
        after = _read(fxr.evolve(folded, **sealed), found.norm)
    except fxr.errors.TraceError as error:
        return str(error)
    if after != found:
        return "its forward does something else without a norm, with a bias, or the next time"
    return found


def without_norm(layer: L, name: str) -> L:
    """The layer with an identity in the place of a module inside it, by qualified name."""
    child, _, rest = name.partition(".")
    inner = without_norm(layer.get_submodule(child), rest) if rest else nn.Identity()
    return fxr.evolve(layer, **{child: inner})


def _handled_otherwise(kind: type[nn.Module]) -> str | None:
    """A method by which torch handles modules that a layer's type overrides, or None."""
    base = next(each for each in kind.__mro__ if each in _CALLS)
    own = {n: v for each in kind.__mro__[: kind.__mro__.index(base)] for n, v in vars(each).items()}
    names = (own.keys() & vars(nn.Module).keys()) - _HARMLESS - {"forward"}
    return next((name for name in sorted(names) if callable(own[name])), None)


class _Sealed(nn.Parameter):
    """A parameter that a trace reads by its name, and that nothing else can read."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise TypeError("it reads a parameter otherwise than by the name of weight or bias")


def _read(layer: nn.Module, gone: str | None = None) -> Own | str:
    """What all ways through a layer's forward have in common; `gone` is a norm that was there."""
    found = []
    for graph, constants in ways(layer, (Norm,)):
        way = _read_way(layer, graph, gone) if not constants else "it makes a tensor of its own"
        if isinstance(way, str):
            return way
        found.append(way)
    norm, *others = dict.fromkeys(way.norm for way in found)
    if others:
        return "what it calls on what the layer makes depends on its input"
    return Own(norm, [way.rest for way in found])


def _read_way(layer: nn.Module, graph: fx.Graph, gone: str | None) -> Own | str:
    """What one way through a layer's forward does."""
    function = next(made for kind, made in _CALLS.items() if isinstance(layer, kind))
    calls = graph.find_nodes(op="call_function", target=function)
    read = graph.find_nodes(op="get_attr")
    by_name = {node.target: node for node in read}
    weight, bias = by_name.get("weight"), by_name.get("bias")
    given = [dict(zip(_ARGUMENTS, each.args, strict=False)) | each.kwargs for each in calls]
    found = [i for i, each in enumerate(given) if each.get("weight") is weight is not None]
    if len(by_name) != len(read) or len(found) != 1 or given[found[0]].get("bias") is not bias:
        return f"it does not call {function.__name__}() once, with its weight and bias"
    call, arguments = calls[found[0]], given[found[0]]
    if isinstance(layer, _TRANSPOSED) and arguments.get("groups", 1) != layer.groups:
        return f"it calls {function.__name__}() with groups of its own"
    for name, node in (("weight", weight), ("bias", bias)):
        for user in () if node is None else node.users:
            if user is not call and not _asks(user):
                return f"its {name} is also read by {_named(user)}"
        if list(arguments.values()).count(node) > 1:
            return f"its {name} is read twice"
    readers = [user for user in call.users if not _asks(user)]
    if len(readers) != 1:
        return "what the layer makes is not read once"
    (reader,) = readers
    norm = None
    if reader.op == "call_module" and reader.args == (call,) and not reader.kwargs:
        module = layer.get_submodule(str(reader.target))
        norm = str(reader.target) if isinstance(module, Norm) or reader.target == gone else None
    if norm is None and (reader.op != "output" or reader.args != (call,)):
        return f"what the layer makes is read by {_named(reader)}"
    if norm is not None and sum(node.target == norm for node in graph.nodes) > 1:
        return f"it calls {norm} more than once"
    rest = [
        (node.op, node.target, str(node.args), str(node.kwargs))
        for node in graph.nodes
        if node not in (bias, call)
    ]
    plain = {name: str(value) for name, value in arguments.items() if name != "bias"}
    return Own(norm, (rest, plain))


def _asks(node: fx.Node) -> bool:
    """Whether a node asks for what tensors of one shape, type and device have in common."""
    if node.op == "call_method":
        return node.target in _ASKED
    return node.target is getattr and node.args[1] in _ASKED


def _named(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", node.target))
