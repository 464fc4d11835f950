"""What is known of torch's operations: one row for each, and caution for what has none.

A row is found by an operation's plain name, whether it is called as a function of torch, an
operator of Python, a method or an ATen overload; `relu_` and `operator.iadd` have the rows of
`relu` and `add`. The facts are those of torch's documentation. The tests hold each row to what
torch does.
"""

from __future__ import annotations

import enum
import functools
import operator
from collections.abc import Mapping
from typing import Any

from torch import fx, nn

from ..module_utils.subclassing import overridden
from ..module_utils.torch_private import OpOverload, operator_name


class Trait(enum.Flag):
    """What an operation does; an operation that lacks a trait may do otherwise."""

    NONE = 0
    FRESH = enum.auto()  # gives new storage, unless it writes in place
    KEEPS = (
        enum.auto()
    )  # gives the shape, dtype and device of what it reads, or raises; under autocast, too
    IN_PLACE_KEEPS = enum.auto()  # where it writes in place, it changes numbers alone
    PURE = enum.auto()  # depends on nothing but its arguments, and writes to none of them
    COMMUTATIVE = enum.auto()  # the order of its two operands makes no difference
    ACTIVATION = (
        enum.auto()
    )  # a function of each number of one value by itself; its settings are plain numbers
    ANY_STRIDES = (
        enum.auto()
    )  # gives the same numbers whatever the strides are, in new storage or a view
    VIEW = enum.auto()  # gives a view, and raises where the strides allow none
    SPLITS = enum.auto()  # gives parts of what it reads
    ASKS = enum.auto()  # reads nothing of a tensor but its metadata, and gives no tensor
    LIKE = (
        enum.auto()
    )  # gives a new tensor with the shape, dtype, device and strides of what it reads
    NEW = enum.auto()  # gives a new tensor with the dtype and device of what it reads
    AS_OTHER = enum.auto()  # takes from its second argument what the first is to become
    UPDATES = enum.auto()  # in training mode it writes to the running statistics that it is given
    HANDS_ON = enum.auto()  # in eval mode it returns its very input
    LAYER = enum.auto()  # the weight decides all but the leading sizes of what it gives


_T = Trait
_STEADY = _T.KEEPS | _T.IN_PLACE_KEEPS
_POINTWISE = _T.FRESH | _T.IN_PLACE_KEEPS
_SHAPED = _T.ANY_STRIDES | _T.PURE

_OPERATIONS: tuple[tuple[Trait, str], ...] = (
    (_T.FRESH, "addmm avg_pool1d avg_pool2d avg_pool3d baddbmm bmm cat cos gelu group_norm log"),
    (
        _T.FRESH,
        "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d layer_norm",
    ),
    (_T.FRESH, "linear log_softmax logical_not matmul max_pool1d max_pool2d max_pool3d mean mm"),
    (_T.FRESH, "scaled_dot_product_attention sin softmax softplus stack sum"),
    (_T.FRESH | _T.PURE, "abs pow reciprocal rsqrt truediv true_divide"),
    (_T.FRESH | _T.COMMUTATIVE, "logical_or logical_and"),
    (_T.COMMUTATIVE, "multiply maximum minimum logical_xor and_ or_ xor"),
    (_T.COMMUTATIVE, "bitwise_and bitwise_or bitwise_xor"),
    (_POINTWISE, "addcmul"),
    (_POINTWISE | _T.PURE, "div exp neg sqrt sub"),
    (_POINTWISE | _T.PURE | _T.COMMUTATIVE, "add mul"),
    (_T.FRESH, "rsub"),
    (_T.IN_PLACE_KEEPS, "clamp copy fill zero"),
    (_T.IN_PLACE_KEEPS | _T.ANY_STRIDES, "masked_fill"),
    (_T.FRESH | _T.ACTIVATION, "selu"),
    (_POINTWISE | _T.ACTIVATION, "hardsigmoid"),
    (_POINTWISE | _T.ACTIVATION | _T.PURE, "sigmoid tanh"),
    (_T.FRESH | _STEADY | _T.ACTIVATION, "elu hardswish hardtanh leaky_relu mish relu relu6 silu"),
    (_STEADY, "gelu alpha_dropout dropout1d dropout2d dropout3d feature_alpha_dropout"),
    (_STEADY | _T.ANY_STRIDES, "dropout"),
    (_T.FRESH | _STEADY | _T.UPDATES, "batch_norm"),
    (_T.UPDATES, "native_batch_norm cudnn_batch_norm miopen_batch_norm"),
    (_T.FRESH | _STEADY | _T.PURE, "clone"),
    (_STEADY | _SHAPED, "contiguous detach"),
    (_SHAPED, "double expand flatten float getitem permute reshape squeeze t transpose"),
    (_SHAPED, "unflatten unsqueeze"),
    (_SHAPED | _T.AS_OTHER, "to"),
    (
        _T.ANY_STRIDES,
        "bfloat16 einsum half movedim narrow repeat select swapaxes type unbind where",
    ),
    (_T.ANY_STRIDES | _T.SPLITS, "chunk split split_with_sizes"),
    (_T.VIEW | _T.PURE, "view"),
    (_T.VIEW, "_unsafe_view"),
    (_T.AS_OTHER, "expand_as view_as reshape_as type_as"),
    (_T.ASKS, "size dim ndimension numel nelement sym_size sym_numel __len__"),
    (_T.LIKE, "zeros_like ones_like full_like empty_like"),
    (_T.NEW, "new_zeros new_ones new_full new_empty"),
)

# A row of a module's type holds for subclasses that override nothing of it.
_MODULES: tuple[tuple[Trait, tuple[type[nn.Module], ...]], ...] = (
    (_T.KEEPS, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)),
    (_T.KEEPS, (nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Mish)),
    (_T.KEEPS, (nn.Hardswish,)),
    (_T.KEEPS | _T.HANDS_ON, (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)),
    (_T.KEEPS | _T.HANDS_ON, (nn.AlphaDropout, nn.FeatureAlphaDropout)),
    (_T.LAYER, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)),
    (_T.LAYER, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)),
    (_T.ANY_STRIDES, (nn.Flatten, nn.Unflatten)),
)
_FRESH_FAMILIES = frozenset(
    f"torch.nn.modules.{family}"
    for family in ("activation", "batchnorm", "conv", "linear", "normalization", "pooling")
)

METADATA = frozenset({"shape", "dtype", "device", "ndim"})
"""The attributes of a tensor that say nothing of its numbers."""

IN_PLACE_OPERATORS = {
    getattr(operator, name)
    for name in dir(operator)
    if name.startswith("i") and hasattr(operator, f"__{name}__")
} | {operator.setitem}
_IN_PLACE_METHODS = {f"__{function.__name__}__" for function in IN_PLACE_OPERATORS}
# An operator of Python is called as no function of torch is, even where it does the same.
_SAME_AS = {"iadd": "add", "imul": "mul"}


def _rows() -> dict[str, Trait]:
    rows: dict[str, Trait] = {}
    for traits, names in _OPERATIONS:
        for name in names.split():
            rows[name] = rows.get(name, Trait.NONE) | traits
    return rows


BY_NAME = _rows()
BY_TYPE: dict[Any, Trait] = {kind: traits for traits, kinds in _MODULES for kind in kinds}


def traits_of_name(name: str) -> Trait:
    """What is known of a method, or of another operation by its plain name, called out of place.

    >>> Trait.FRESH in traits_of_name("relu"), traits_of_name("relu_")
    (True, <Trait.NONE: 0>)
    """
    return BY_NAME.get(name, Trait.NONE)


@functools.lru_cache(maxsize=4096)
def traits_of_function(function: Any) -> Trait:
    """What is known of a function of torch or an operator of Python, called out of place."""
    return traits_of_name(base_name(function)) if is_torch(function) else Trait.NONE


def traits_in_place(name: str) -> Trait:
    """What is known of the operation whose form in place has this name, `relu_` or `iadd`."""
    name = _SAME_AS.get(name, name)
    return traits_of_name(name if name in BY_NAME else name.removesuffix("_"))


def traits_of_module(module: nn.Module | None) -> Trait:
    """What is known of calling a module, as far as its forward is that of a type of torch."""
    kind: Any = type(module)  # mypy takes the hash of a class for that of its instances
    return _traits_of_type(kind)


@functools.lru_cache(maxsize=4096)
def _traits_of_type(kind: type[Any]) -> Trait:
    base = next((each for each in kind.__mro__ if each in BY_TYPE), None)
    traits = BY_TYPE[base] if base is not None and overridden(kind, base) is None else Trait.NONE
    family = next((each for each in kind.__mro__ if each.__module__ in _FRESH_FAMILIES), None)
    is_fresh = family not in (None, nn.Identity) and overridden(kind, family) is None
    return traits | Trait.FRESH if is_fresh else traits


def is_commutative(node: fx.Node) -> bool:
    """Whether a node calls a function for which the order of two operands makes no difference."""
    is_function = node.op == "call_function" and is_torch(node.target)
    return is_function and Trait.COMMUTATIVE in traits_in_place(base_name(node.target))


def updated_statistics(arguments: Mapping[str, Any]) -> tuple[str, ...]:
    """The arguments of a batch norm that a call with these arguments writes to."""
    is_updating = arguments.get("training", False) and arguments.get("running_mean") is not None
    return ("running_mean", "running_var") if is_updating else ()


def base_name(function: Any) -> str:
    """What a function or operator is called, without its namespace and overload."""
    if isinstance(function, OpOverload):
        return operator_name(function).rpartition("::")[2]
    return getattr(function, "__name__", "")


def called_name(node: fx.Node) -> str:
    """The name of a method, or of a function of torch; empty for anything else."""
    if node.op == "call_method":
        return str(node.target)
    is_known = node.op == "call_function" and is_torch(node.target)
    return base_name(node.target) if is_known else ""


@functools.lru_cache(maxsize=4096)
def is_torch(function: Any) -> bool:
    """Whether a function is one of torch, or an operator of Python."""
    module = getattr(function, "__module__", None) or "torch"
    return module == "_operator" or module.partition(".")[0] == "torch"


def is_in_place_name(name: str) -> bool:
    """Whether a method or function of that name writes in place."""
    return (name.endswith("_") and not name.endswith("__")) or name in _IN_PLACE_METHODS


@functools.lru_cache(maxsize=4096)
def writes_first_argument(function: Any) -> bool:
    """Whether a function writes to its first argument, by what it is called."""
    return function in IN_PLACE_OPERATORS or is_in_place_name(getattr(function, "__name__", ""))


@functools.lru_cache(maxsize=4096)
def has_inplace_argument(function: Any) -> bool:
    """Whether a Python function has a flag that makes it write in place."""
    code = getattr(function, "__code__", None)
    return code is not None and "inplace" in code.co_varnames[: code.co_argcount]
