"""Which nodes write in place, and which may hand on the storage they were given."""

from __future__ import annotations

import bisect
import functools
import operator
from collections.abc import Iterator
from typing import Any

from torch import fx, nn

from ..dialects.op_table import SPELLINGS
from ..module_utils.subclassing import overridden
from ..module_utils.torch_private import OpOverload, operator_name, written_arguments
from .graph_view import GraphView

IN_PLACE_OPERATORS = {
    getattr(operator, name)
    for name in dir(operator)
    if name.startswith("i") and hasattr(operator, f"__{name}__")
} | {operator.setitem}

_IN_PLACE_METHODS = {f"__{function.__name__}__" for function in IN_PLACE_OPERATORS}

# What is listed here always returns new storage; of anything else that is not assumed.
_FRESH_MODULES = {
    f"torch.nn.modules.{family}"
    for family in ("activation", "batchnorm", "conv", "linear", "normalization", "pooling")
}
_FRESH_CALLS = frozenset(
    "abs add addcmul addmm avg_pool1d avg_pool2d avg_pool3d baddbmm batch_norm bmm cat clone "
    "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d cos div elu exp "
    "gelu group_norm hardsigmoid hardswish hardtanh layer_norm leaky_relu linear log log_softmax "
    "logical_and logical_not logical_or matmul max_pool1d max_pool2d max_pool3d mean mish mm mul "
    "neg pow reciprocal relu relu6 rsqrt rsub scaled_dot_product_attention selu sigmoid silu sin "
    "softmax softplus sqrt stack sub sum tanh true_divide truediv".split()
)

_IN_PLACE_CALLS = {f"{name}_" for name in _FRESH_CALLS}

_HAND_ON = (
    nn.Identity,
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
)


class Effects:
    """The in-place writes of a graph, in order.

    `written_values` are the values that they reach, and `written_tensors` the identities of the
    model's tensors among those. `held_inside` are those of buffers that a called module has and one
    that is kept whole has inside of it, whose code may write to them.
    """

    def __init__(self, view: GraphView) -> None:
        self._view = view
        self._writes = [node for node in view.graph.nodes if written_by(node, view)]
        self._live = set(self._writes)
        self.written_values = {
            origin
            for write in self._writes
            for value in written_by(write, view)
            for origin in self.storage(value)
        }
        self.written_tensors = {
            id(view.attribute(each)) for each in self.written_values if each.op == "get_attr"
        }
        # What a layer updates in training mode may be read by another one, in eval mode.
        modules = dict.fromkeys(view.module(node) for node in view.graph.nodes)
        called = [module for module in modules if module is not None]
        training = (module for module in called if module.training)
        self.written_tensors.update(id(each) for module in training for each in module.buffers())
        inner = (child for module in called if module._modules for child in module.children())
        inside = {id(each) for child in inner for each in child.buffers()}
        own = {id(each) for module in called for each in module._buffers.values()}
        self.held_inside = own & inside

    def note(self, node: fx.Node) -> None:
        """Note a new node, or one that calls something else now."""
        if written_by(node, self._view):
            self._live.add(node)
            bisect.insort(self._writes, node)

    def forget(self, node: fx.Node) -> None:
        """Note that a node is gone."""
        self._live.discard(node)

    def writes_between(self, first: fx.Node, last: fx.Node) -> list[fx.Node]:
        """The writes strictly between two nodes, in graph order."""
        if not self._live:
            return []
        start = bisect.bisect_right(self._writes, first)
        stop = bisect.bisect_left(self._writes, last)
        return [node for node in self._writes[start:stop] if node in self._live]

    def storage(self, value: fx.Node) -> set[fx.Node]:
        """The values whose storage this one may share: itself, and what it may be a view of."""
        pending, seen = [value], {value}
        while pending:
            node = pending.pop()
            sources = lends(node, self._view)
            pending += [source for source in sources if source not in seen]
            seen.update(sources)
        return seen

    def later_write(self, value: fx.Node, after: fx.Node) -> fx.Node | None:
        """A node after another that writes to this value, or to what may be a view of it."""
        if not self._live:
            return None
        writes = (
            reader
            for node, reader in self._readers(value)
            if after < reader and node in written_by(reader, self._view)
        )
        return next(writes, None)

    def is_returned(self, value: fx.Node) -> bool:
        """Whether the graph returns this value, or what may be a view of it."""
        return any(reader.op == "output" for _, reader in self._readers(value))

    def _readers(self, value: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
        """Each reader of a value, or of what may be a view of it, with the node that it reads."""
        pending, seen = [value], {value}
        while pending:
            node = pending.pop()
            for reader in node.users:
                yield node, reader
                if reader not in seen and node in lends(reader, self._view):
                    seen.add(reader)
                    pending.append(reader)


def written_by(node: fx.Node, view: GraphView) -> list[fx.Node]:
    """The values that a node writes to in place."""
    target = node.target
    if node.op == "call_module":
        return node.all_input_nodes[:1] if writes_in_place(view.module(node)) else []
    if node.op == "call_method":
        return node.all_input_nodes[:1] if _is_in_place_name(str(target)) else []
    if node.op != "call_function":
        return []
    if isinstance(target, OpOverload):
        names, inputs = _written_arguments(target), view.inputs(node)
        return [each for name, each in inputs.items() if names is None or name in names]
    written: list[fx.Node] = []
    if target in SPELLINGS:  # a functional batch norm in training mode updates its statistics
        inputs = view.inputs(node)
        updated = SPELLINGS[target].meaning.updates(view.arguments(node))
        written += [inputs[name] for name in updated if name in inputs]
    fx.node.map_arg(node.kwargs.get("out"), written.append)
    if _writes_first_argument(target) or (
        _has_inplace_argument(target) and view.arguments(node).get("inplace")
    ):
        written += node.all_input_nodes[:1]
    return written


def lends(node: fx.Node, view: GraphView) -> list[fx.Node]:
    """The values whose storage a node's output may share."""
    if is_fresh(node, view):
        return []
    return written_by(node, view) if _returns_what_it_writes(node) else node.all_input_nodes


def _returns_what_it_writes(node: fx.Node) -> bool:
    if node.op == "call_function":
        known = node.target in IN_PLACE_OPERATORS and node.target is not operator.setitem
        return known or (base_name(node.target) in _IN_PLACE_CALLS and is_torch(node.target))
    return node.op == "call_method" and node.target in _IN_PLACE_CALLS


def is_fresh(node: fx.Node, view: GraphView) -> bool:
    """Whether a node's output is sure to share no storage with its inputs."""
    if node.op == "call_module":
        return is_fresh_module(view.module(node))
    if node.op == "call_function":
        return is_fresh_function(node.target) and not written_by(node, view)
    return node.op != "call_method" or node.target in _FRESH_CALLS


def is_fresh_function(function: Any) -> bool:
    """Whether a function gives new storage, unless it is told where to write."""
    return base_name(function) in _FRESH_CALLS and is_torch(function)


def is_fresh_module(module: nn.Module | None) -> bool:
    """Whether a module's output is sure to share no storage with its input."""
    kind: Any = type(module)  # mypy takes the hash of a class for that of its instances
    return _is_fresh_kind(kind) and not writes_in_place(module)


@functools.lru_cache(maxsize=4096)
def _is_fresh_kind(kind: type[Any]) -> bool:
    known = (each for each in kind.__mro__ if each.__module__ in _FRESH_MODULES)
    base = next(known, None)
    return base is not None and base is not nn.Identity and overridden(kind, base) is None


def hands_on(module: nn.Module | None) -> bool:
    """Whether a module in eval mode is sure to return its very input."""
    return isinstance(module, _HAND_ON)


def writes_in_place(module: nn.Module | None) -> bool:
    """Whether a module, or one in it, says that it writes to its input."""
    if module is None or not module._modules:
        return module is not None and module.__dict__.get("inplace") is True
    return any(each.__dict__.get("inplace") is True for each in module.modules())


def base_name(function: Any) -> str:
    """What a function or operator is called, without its namespace and overload."""
    if isinstance(function, OpOverload):
        return operator_name(function).rpartition("::")[2]
    return getattr(function, "__name__", "")


@functools.lru_cache(maxsize=4096)
def is_torch(function: Any) -> bool:
    """Whether a function is one of torch, or an operator of Python."""
    module = getattr(function, "__module__", None) or "torch"
    return module == "_operator" or module.partition(".")[0] == "torch"


@functools.lru_cache(maxsize=4096)
def _written_arguments(overload: OpOverload) -> tuple[str, ...] | None:
    names = written_arguments(overload)
    return names and tuple("input" if name == "self" else name for name in names)


def _is_in_place_name(name: str) -> bool:
    return (name.endswith("_") and not name.endswith("__")) or name in _IN_PLACE_METHODS


@functools.lru_cache(maxsize=4096)
def _writes_first_argument(function: Any) -> bool:
    return function in IN_PLACE_OPERATORS or _is_in_place_name(getattr(function, "__name__", ""))


@functools.lru_cache(maxsize=4096)
def _has_inplace_argument(function: Any) -> bool:
    code = getattr(function, "__code__", None)
    return code is not None and "inplace" in code.co_varnames[: code.co_argcount]
