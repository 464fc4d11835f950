"""What each operation does, said once: one row for a call's plain name, one for a type of module.

`a + b`, `torch.add`, `a.add`, `a.add_` and `torch.ops.aten.add.Tensor` draw on one row. What has no
row may do anything. Rows hold what torch's documentation says; what its schemas and signatures say
(arguments written to, a flag `inplace`, names ending in `_`) is read from them. `tests` hold each
row to what torch does.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping
from typing import Any, Literal

import attrs
from torch import fx, nn
from torch.nn import modules

from ..module_utils.subclassing import overridden
from ..module_utils.torch_private import (
    OpOverload,
    OpOverloadPacket,
    operator_name,
    written_arguments,
)

FIRST, ALL = "the first argument", "all arguments"


@attrs.frozen(kw_only=True)
class OpTraits:
    """What is known of an operation; by default, what must be assumed of any.

    Args:
        fresh: gives new storage, unless it is told where to write.
        hands_on: gives its first argument itself; a module, in eval mode.
        writes: the arguments that it writes to, by name.
        writes_if: the flag without which it does not, and what that is by default.
        pointwise: changes nothing but numbers where it writes.
        keeps: what its output has of its input: the number of dimensions, or shape, dtype, device.
        pure: its arguments alone decide what it gives, so it may be computed once and for all.
        commutative: gives the same with its first two arguments exchanged.
        activation: makes new storage under the same name without `_`, or without `inplace`.
        layer: shape, dtype and device of its output follow from its input's and its own tensors',
            and it lays them out in one of torch's own formats.
        strides: what the strides of its input change: it may be `observed`, or the same numbers
            come out for `any`, in parts (`split`), if they are `fitting`, or `contiguous`.
        asks: what it reads no number of: the first argument, for its `metadata`, to make another
            tensor `like` it or on its device (`new`), or the second one (`other`).
        gives: the type of its result.
    """

    fresh: bool = False
    hands_on: bool = False
    writes: tuple[str, ...] = ()
    writes_if: tuple[str, bool] | None = None
    pointwise: bool = False
    keeps: Literal["", "rank", "metadata"] = ""
    pure: bool = False
    commutative: bool = False
    activation: bool = False
    layer: bool = False
    strides: Literal["observed", "any", "split", "fitting", "contiguous"] = "observed"
    asks: Literal["", "metadata", "like", "new", "other"] = ""
    gives: Literal["", "tensor", "tensor first", "number", "size", "several"] = ""

    def written(self, given: Mapping[str, Any]) -> tuple[str, ...]:
        """The arguments that a call with these arguments writes to."""
        is_off = self.writes_if is not None and not given.get(*self.writes_if)
        return () if is_off else self.writes


UNKNOWN = OpTraits()
_new = functools.partial(OpTraits, fresh=True, gives="tensor")
_view = functools.partial(OpTraits, strides="any", gives="tensor")
_asks = functools.partial(OpTraits, asks="metadata")
_norm = functools.partial(OpTraits, pointwise=True, writes=("running_mean", "running_var"))

_CALLS = {
    # What computes with numbers.
    "celu elu gelu hardswish hardtanh leaky_relu mish relu relu6 selu silu": _new(
        pointwise=True, keeps="metadata", activation=True
    ),
    "hardsigmoid": _new(pointwise=True, activation=True),
    "sigmoid tanh": _new(pointwise=True, activation=True, pure=True),
    "add mul": _new(pointwise=True, commutative=True, pure=True),
    "abs div exp neg pow reciprocal rsqrt sqrt sub true_divide truediv": _new(
        pointwise=True, pure=True
    ),
    "addcmul cos log logical_not sin": _new(pointwise=True),
    "bitwise_and bitwise_or bitwise_xor logical_and logical_or logical_xor maximum minimum "
    "multiply": _new(pointwise=True, commutative=True),
    # Python's own operators work with other values, too.
    "and or xor": OpTraits(pointwise=True, commutative=True),
    "concat floordiv lshift mod rshift": OpTraits(pointwise=True),
    "setitem": OpTraits(pointwise=True, writes=(FIRST,)),
    "addmm avg_pool1d avg_pool2d avg_pool3d baddbmm bmm cat conv1d conv2d conv3d conv_transpose1d "
    "conv_transpose2d conv_transpose3d group_norm hardshrink layer_norm linear log_softmax matmul "
    "max_pool1d max_pool2d max_pool3d mean mm rsub scaled_dot_product_attention softmax softplus "
    "softshrink stack sum": _new(),
    "clone": _new(pointwise=True, keeps="metadata", pure=True),
    "clamp copy fill zero": OpTraits(pointwise=True),
    "masked_fill": _view(pointwise=True),
    # These update statistics, which only some of their schemas say.
    "batch_norm": _norm(
        fresh=True, gives="tensor", keeps="metadata", writes_if=("training", False)
    ),
    "_batch_norm_impl_index cudnn_batch_norm miopen_batch_norm native_batch_norm": _norm(
        writes_if=("training", False)
    ),
    "instance_norm": _norm(writes_if=("use_input_stats", True)),
    "alpha_dropout dropout dropout1d dropout2d dropout3d feature_alpha_dropout": OpTraits(
        pointwise=True, keeps="metadata", strides="any"
    ),
    # What gives the same numbers, in new storage or a view.
    "detach": _view(pointwise=True, keeps="metadata", pure=True),
    "contiguous": _view(pointwise=True, keeps="metadata", pure=True, strides="contiguous"),
    "double expand flatten float permute reshape squeeze t transpose unflatten unsqueeze": _view(
        pure=True
    ),
    "convert_element_type": _view(pure=True),
    "bfloat16 half movedim narrow repeat select swapaxes": _view(),
    "einsum type where": OpTraits(strides="any"),  # the last two may give no tensor
    "getitem": OpTraits(strides="any", pure=True),
    "to": _view(pure=True, asks="other"),
    "view": _view(pure=True, strides="fitting"),
    "_unsafe_view": _view(strides="fitting"),
    "chunk split split_with_sizes": OpTraits(strides="split", gives="several"),
    "unbind": OpTraits(strides="any", gives="several"),
    "item max min sort tensor_split tolist topk": OpTraits(gives="several"),
    # What asks for metadata alone.
    "size sym_size": _asks(gives="size"),
    "dim element_size len ndimension nelement numel sym_numel": _asks(gives="number"),
    "expand_as reshape_as type_as view_as": OpTraits(asks="other", gives="tensor"),
    "empty_like full_like ones_like zeros_like": OpTraits(asks="like", gives="tensor"),
    "new_empty new_full new_ones new_zeros": OpTraits(asks="new", gives="tensor"),
}
# What `getattr` gives, and whether it is of a tensor's metadata.
_ATTRIBUTES = {
    "shape": _asks(gives="size"),
    "ndim": _asks(gives="number"),
    "device dtype": _asks(),
    "T data": OpTraits(gives="tensor"),
}

_keeping = functools.partial(_new, keeps="metadata")
_MODULES: dict[tuple[type[nn.Module], ...], OpTraits] = {
    (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm): _keeping(),
    (nn.CELU, nn.ELU, nn.GELU, nn.Hardswish, nn.Hardtanh, nn.LeakyReLU, nn.Mish, nn.ReLU, nn.ReLU6,
     nn.SELU, nn.SiLU): _keeping(activation=True),
    (nn.Hardsigmoid, nn.PReLU, nn.Sigmoid, nn.Tanh): _new(keeps="rank", activation=True),
    (nn.Linear,): _new(keeps="rank", layer=True),
    (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d,
     nn.ConvTranspose3d): _new(layer=True),
    (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout,
     nn.FeatureAlphaDropout): OpTraits(keeps="metadata", hands_on=True, strides="any"),
    (nn.Flatten, nn.Unflatten): OpTraits(strides="any"),
    (nn.MultiheadAttention,): OpTraits(fresh=True, gives="several"),
    (nn.RNN, nn.LSTM, nn.GRU): OpTraits(gives="tensor first"),
}  # fmt: skip
# Of these families of torch all types make new storage.
_FAMILIES = {
    modules.activation: _new(activation=True),
    **dict.fromkeys(
        (modules.batchnorm, modules.conv, modules.linear, modules.normalization, modules.pooling),
        _new(),
    ),
}

CALLS = {name: row for names, row in _CALLS.items() for name in names.split()}
ATTRIBUTES = {name: row for names, row in _ATTRIBUTES.items() for name in names.split()}
MODULES: dict[Any, OpTraits] = {
    kind: row
    for family, row in _FAMILIES.items()
    for kind in vars(family).values()
    if isinstance(kind, type) and kind.__module__ == family.__name__
} | {kind: row for kinds, row in _MODULES.items() for kind in kinds}

# By what name the operators of Python are known here that work in place: `iadd`, not `invert`.
_IN_PLACE = {
    name: f"{name[1:]}_"
    for name in dir(operator)
    if name[0] == "i" and hasattr(operator, f"__{name}__")
    if hasattr(operator, name[1:]) or hasattr(operator, f"{name[1:]}_")
}


def traits_of(node: fx.Node, module: nn.Module | None) -> OpTraits:
    """What the operation of a node does, `module` being what it calls, if that is a module."""
    if module is not None:
        return traits_of_module(module)
    if node.op == "call_method":
        return traits_of_method(str(node.target))
    if node.op != "call_function":
        return UNKNOWN
    if node.target is getattr:
        return ATTRIBUTES.get(str(node.args[1]), UNKNOWN) if len(node.args) > 1 else UNKNOWN
    return traits_of_function(node.target)


def traits_of_module(module: nn.Module | None) -> OpTraits:
    """What a module does, by its type."""
    kind: Any = type(module)  # mypy takes the hash of a class for that of its instances
    return traits_of_type(kind)


@functools.lru_cache(maxsize=4096)
def traits_of_type(kind: Any) -> OpTraits:
    """What a type of module does, or the one that it is derived from without any difference."""
    base = next((each for each in kind.__mro__ if each in MODULES), None)
    return MODULES[base] if base is not None and overridden(kind, base) is None else UNKNOWN


@functools.lru_cache(maxsize=4096)
def traits_of_method(name: str) -> OpTraits:
    """What a method of a tensor does."""
    return _named(_of_python(name) if name.startswith("__") else name)


@functools.lru_cache(maxsize=4096)
def traits_of_function(function: Any) -> OpTraits:
    """What a function does, an operator of Python or an overload of torch's."""
    name = base_name(function)
    row = _named(name) if name else _named(getattr(function, "__name__", ""), {})
    if isinstance(function, OpOverload | OpOverloadPacket):
        mutable = _mutable_arguments(function)
        return attrs.evolve(row, writes=row.writes + mutable, writes_if=None) if mutable else row
    code = getattr(function, "__code__", None)
    if not row.writes and code is not None and "inplace" in code.co_varnames[: code.co_argcount]:
        return attrs.evolve(row, writes=(FIRST,), writes_if=("inplace", False))
    return row


def _named(name: str, rows: Mapping[str, OpTraits] = CALLS) -> OpTraits:
    """The row of a name; a name with `_` behind it is the form that writes to what it reads."""
    if name in rows or not name.endswith("_") or name.endswith("__"):
        return rows.get(name, UNKNOWN)
    row = rows.get(name[:-1], UNKNOWN)
    return attrs.evolve(
        row,
        fresh=False,
        hands_on=row.fresh or row.pointwise,
        writes=(FIRST,),
        writes_if=None,
        pure=False,
        strides="observed",
        asks="",
        gives="",
    )


def base_name(function: Any) -> str:
    """What torch calls one of its functions, without namespace and overload; "" of any other."""
    if isinstance(function, OpOverload | OpOverloadPacket):
        namespace, _, name = operator_name(_overloads(function)[0]).partition("::")
        return name if namespace in ("aten", "prims") else ""
    name = getattr(function, "__name__", "")
    if function is len or getattr(function, "__module__", None) == "_operator":
        return _of_python(name)
    return name if is_torch(function) else ""


def _of_python(name: str) -> str:
    plain = name.strip("_")
    return _IN_PLACE.get(plain, plain)


@functools.lru_cache(maxsize=4096)
def is_torch(function: Any) -> bool:
    """Whether a function is one of torch, or an operator of Python."""
    module = getattr(function, "__module__", None) or "torch"
    return module == "_operator" or module.partition(".")[0] == "torch"


def _overloads(operator: OpOverload | OpOverloadPacket) -> list[OpOverload]:
    if isinstance(operator, OpOverload):
        return [operator]
    return [getattr(operator, name) for name in operator.overloads()]  # type: ignore[no-untyped-call]


def _mutable_arguments(operator: OpOverload | OpOverloadPacket) -> tuple[str, ...]:
    """The arguments that a schema says are written to, by any overload where that is not told."""
    told = [written_arguments(each) for each in _overloads(operator)]
    names = [name for each in told for name in ((ALL,) if each is None else each)]
    return tuple("input" if name == "self" else name for name in names)
