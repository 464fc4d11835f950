"""Each row of the table of operation traits, held to what torch does."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from fxrewrite.ir.aliases import is_fresh, written_by
from fxrewrite.ir.graph_view import GraphView
from fxrewrite.ir.op_traits import (
    CALLS,
    MODULES,
    UNKNOWN,
    OpTraits,
    traits_of_function,
    traits_of_method,
    traits_of_type,
)

aten = torch.ops.aten

# The tables that there were before this one, and what each said of its names.
BEFORE: dict[str, tuple[Callable[[OpTraits], bool], str]] = {
    "fresh": (
        lambda row: row.fresh,
        "abs add addcmul addmm avg_pool1d avg_pool2d avg_pool3d baddbmm batch_norm bmm cat clone "
        "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d cos div elu exp "
        "gelu group_norm hardsigmoid hardswish hardtanh layer_norm leaky_relu linear log "
        "log_softmax logical_and logical_not logical_or matmul max_pool1d max_pool2d max_pool3d "
        "mean mish mm mul neg pow reciprocal relu relu6 rsqrt rsub scaled_dot_product_attention "
        "selu sigmoid silu sin softmax softplus sqrt stack sub sum tanh true_divide truediv",
    ),
    "keeps": (
        lambda row: row.keeps == "metadata",
        "alpha_dropout batch_norm clone contiguous detach dropout dropout1d dropout2d dropout3d "
        "elu feature_alpha_dropout gelu hardswish hardtanh leaky_relu mish relu relu6 silu",
    ),
    "pointwise": (
        lambda row: row.pointwise,
        "alpha_dropout batch_norm clone contiguous detach dropout dropout1d dropout2d dropout3d "
        "elu feature_alpha_dropout gelu hardswish hardtanh leaky_relu mish relu relu6 silu add "
        "addcmul clamp copy div exp fill hardsigmoid masked_fill mul neg sigmoid sqrt sub tanh "
        "zero",
    ),
    "pure": (
        lambda row: row.pure,
        "abs add clone contiguous detach div double exp expand float flatten getitem mul neg "
        "permute pow reciprocal reshape rsqrt sigmoid sqrt squeeze sub t tanh to transpose "
        "true_divide truediv unflatten unsqueeze view",
    ),
    "activation": (
        lambda row: row.activation,
        "elu hardsigmoid hardswish hardtanh leaky_relu mish relu relu6 selu sigmoid silu tanh",
    ),
    "any strides": (
        lambda row: row.strides in ("any", "split", "contiguous"),
        "bfloat16 chunk contiguous detach double dropout einsum expand flatten float getitem half "
        "masked_fill movedim narrow permute repeat reshape select split split_with_sizes squeeze "
        "swapaxes t to transpose type unbind unflatten unsqueeze where",
    ),
    "split": (lambda row: row.strides == "split", "chunk split split_with_sizes"),
    "fitting": (lambda row: row.strides == "fitting", "view _unsafe_view"),
    "commutative": (
        lambda row: row.commutative,
        "add mul multiply maximum minimum logical_and logical_or logical_xor and or xor "
        "bitwise_and bitwise_or bitwise_xor",
    ),
    "metadata": (
        lambda row: row.asks == "metadata",
        "size dim ndimension numel nelement sym_size sym_numel len",
    ),
    "like": (lambda row: row.asks == "like", "zeros_like ones_like full_like empty_like"),
    "new": (lambda row: row.asks == "new", "new_zeros new_ones new_full new_empty"),
    "other": (lambda row: row.asks == "other", "expand_as view_as reshape_as type_as to"),
}
# What was in none of these and is in them now, since the rows that it joined say so.
JOINED = {
    "fresh": "celu hardshrink softshrink logical_xor bitwise_and bitwise_or bitwise_xor maximum "
    "minimum multiply",
    "keeps": "celu selu",
    "pointwise": "abs and celu or xor bitwise_and bitwise_or bitwise_xor cos concat floordiv "
    "instance_norm log logical_and logical_not logical_or logical_xor lshift maximum minimum mod "
    "multiply pow reciprocal rshift rsqrt selu setitem sin true_divide truediv "
    "_batch_norm_impl_index cudnn_batch_norm miopen_batch_norm native_batch_norm",
    "activation": "celu gelu",
    "any strides": "alpha_dropout convert_element_type dropout1d dropout2d dropout3d "
    "feature_alpha_dropout",
    "pure": "convert_element_type",
    "metadata": "element_size",
}


@pytest.mark.parametrize("trait", BEFORE)
def test_the_table_says_what_ten_files_said(trait: str) -> None:
    """Of every name the same, and of those of which nothing was said nothing, but for `JOINED`."""
    holds, names = BEFORE[trait]
    assert {name for name, row in CALLS.items() if holds(row)} == {
        *names.split(),
        *JOINED.get(trait, "").split(),
    }
    assert not holds(UNKNOWN)


def test_of_what_is_not_known_anything_is_assumed() -> None:
    """A function of somebody else that has the name of one of torch's has no row."""

    def add(x: Any, y: Any) -> Any:
        return x - y

    with torch.library._scoped_library("op_traits_test", "DEF") as library:
        library.define("add(Tensor x, Tensor y) -> Tensor")
        library.define("update(Tensor x, Tensor(a!) y) -> ()")
        ours = torch.ops.op_traits_test
        assert traits_of_function(ours.add) == traits_of_function(ours.add.default) == UNKNOWN
        assert traits_of_function(ours.update).writes == ("y",)
        assert traits_of_function(ours.update.default).writes == ("y",)
    assert traits_of_function(add) == traits_of_method("of_nobody") == UNKNOWN

    class Doubles(nn.Dropout):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2

    assert traits_of_type(Doubles) == traits_of_type(nn.Module) == UNKNOWN


def test_all_spellings_of_an_operation_draw_on_one_row() -> None:
    row = CALLS["add"]
    assert traits_of_function(operator.add) == traits_of_function(torch.add) == row
    assert traits_of_function(aten.add.Tensor) == traits_of_method("add") == row
    assert traits_of_method("__add__") == row
    in_place = traits_of_method("add_")
    assert in_place == traits_of_function(operator.iadd) == traits_of_method("__iadd__")
    assert in_place.writes
    assert in_place.hands_on
    assert not in_place.fresh
    for function in (operator.and_, operator.not_, operator.invert, operator.index):
        assert not traits_of_function(function).writes


# What each name is called with. `x` is the first argument unless one is a list or a mask.
def rand(*size: int) -> torch.Tensor:
    return torch.rand(*size) + 0.1


def same(*size: int) -> Any:
    return lambda: (rand(*size), rand(*size))


def ints() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.arange(8).view(2, 4), torch.arange(8).flip(0).view(2, 4)


def kernel(dims: int) -> Any:
    return lambda: (rand(1, 2, *[4] * dims), rand(2, 2, *[1] * dims))


def stats(*more: Any) -> Any:
    return lambda: (rand(2, 4, 3), *more, torch.zeros(4), torch.ones(4))


ARGS: dict[str, Callable[[], tuple[Any, ...]]] = {
    **{
        name: same(2, 4)
        for name in "add mul sub div true_divide truediv pow maximum minimum multiply rsub "
        "logical_and logical_or logical_xor copy floordiv mod expand_as reshape_as type_as "
        "view_as".split()
    },
    **dict.fromkeys("and or xor bitwise_and bitwise_or bitwise_xor lshift rshift".split(), ints),
    **{f"conv{i}d": kernel(i) for i in (1, 2, 3)},
    **{f"conv_transpose{i}d": kernel(i) for i in (1, 2, 3)},
    **{
        f"{kind}_pool{i}d": lambda i=i: (rand(1, 2, *[4] * i), 1)
        for kind in ("avg", "max")
        for i in (1, 2, 3)
    },
    "addcmul": lambda: (rand(2, 4), rand(2, 4), rand(2, 4)),
    "addmm": lambda: (rand(2, 3), rand(2, 4), rand(4, 3)),
    "baddbmm": lambda: (rand(1, 2, 3), rand(1, 2, 4), rand(1, 4, 3)),
    "bmm": lambda: (rand(1, 2, 4), rand(1, 4, 3)),
    "mm": lambda: (rand(2, 4), rand(4, 3)),
    "matmul": lambda: (rand(2, 4), rand(4, 3)),
    "linear": lambda: (rand(2, 4), rand(3, 4)),
    "group_norm": lambda: (rand(2, 4), 2),
    "layer_norm": lambda: (rand(2, 4), (4,)),
    "softmax": lambda: (rand(2, 4), -1),
    "log_softmax": lambda: (rand(2, 4), -1),
    "scaled_dot_product_attention": lambda: (rand(1, 2, 4), rand(1, 2, 4), rand(1, 2, 4)),
    "cat": lambda: ([rand(2, 4), rand(2, 4)],),
    "stack": lambda: ([rand(2, 4), rand(2, 4)],),
    "concat": lambda: ([1], [2]),
    "setitem": lambda: (rand(2, 4), 0, 1.0),
    "clamp": lambda: (rand(2, 4), 0.3, 0.6),
    "fill": lambda: (rand(2, 4), 1.0),
    "masked_fill": lambda: (rand(2, 4), rand(2, 4) > 0.5, 1.0),
    "batch_norm": stats(),
    "instance_norm": stats(),
    **dict.fromkeys(
        "dropout alpha_dropout feature_alpha_dropout".split(), lambda: (rand(2, 4), 0.5, False)
    ),
    **{f"dropout{i}d": lambda i=i: (rand(1, 2, *[3] * i), 0.5, False) for i in (1, 2, 3)},
    "expand": lambda: (rand(2, 4), (3, 2, 4)),
    "permute": lambda: (rand(2, 4), (1, 0)),
    "reshape": lambda: (rand(2, 4), (8,)),
    "transpose": lambda: (rand(2, 4), 0, 1),
    "unflatten": lambda: (rand(2, 4), 1, (2, 2)),
    "unsqueeze": lambda: (rand(2, 4), 0),
    "movedim": lambda: (rand(2, 4), 0, 1),
    "narrow": lambda: (rand(2, 4), 1, 0, 2),
    "repeat": lambda: (rand(2, 4), (2, 1)),
    "select": lambda: (rand(2, 4), 1, 0),
    "swapaxes": lambda: (rand(2, 4), 0, 1),
    "einsum": lambda: ("ij->ji", rand(2, 4)),
    "convert_element_type": lambda: (rand(2, 4), torch.float64),
    "type": lambda: (rand(2, 4), torch.float64),
    "where": lambda: (rand(2, 4) > 0.5, rand(2, 4), rand(2, 4)),
    "getitem": lambda: (rand(2, 4), 0),
    "to": same(2, 4),
    "view": lambda: (rand(2, 4), (8,)),
    "_unsafe_view": lambda: (rand(2, 4), (8,)),
    "chunk": lambda: (rand(2, 4), 2),
    "split": lambda: (rand(2, 4), 1),
    "split_with_sizes": lambda: (rand(2, 4), [1, 1]),
    "item": lambda: (rand(1),),
    "max": lambda: (rand(2, 4), 0),
    "min": lambda: (rand(2, 4), 0),
    "tensor_split": lambda: (rand(2, 4), 2),
    "topk": lambda: (rand(2, 4), 1),
    "full_like": lambda: (rand(2, 4), 2.0),
    "new_full": lambda: (rand(2, 4), (2,), 2.0),
    **dict.fromkeys("new_empty new_ones new_zeros".split(), lambda: (rand(2, 4), (2,))),
}
# Statistics and their flags are named differently by each; a test of its own has them.
OF_STATISTICS = [name for name, row in CALLS.items() if row.writes_if is not None]
SAMPLED = [name for name in CALLS if name not in OF_STATISTICS]


def callees(name: str) -> Iterator[Any]:
    """Everything that has that name: of torch, of tensors, of Python, and overloads."""
    holders = (torch, F, torch.Tensor, operator)
    names = (name, f"{name}_") if name in ("and", "or") else (name,)
    if name == "len":
        yield len
    for holder in holders:
        for each in names:
            if callable(found := getattr(holder, each, None)) and not isinstance(found, type):
                yield found
    for packet in (getattr(aten, name, None), getattr(torch.ops.prims, name, None)):
        for overload in packet.overloads() if packet is not None else ():
            if "out" not in overload:
                yield getattr(packet, overload)


def runs(name: str) -> Iterator[tuple[Any, tuple[Any, ...], Any]]:
    """Each callee of a name that takes the sample, with it and what it gives."""
    for callee in callees(name):
        torch.manual_seed(0)
        args = ARGS.get(name, lambda: (rand(2, 4),))()
        try:
            yield callee, args, callee(*copied(args))
        except (RuntimeError, TypeError, NotImplementedError):
            continue


def copied(value: Any) -> Any:
    return pytree.tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, value)


def tensors(value: Any) -> list[torch.Tensor]:
    return [each for each in pytree.tree_leaves(value) if isinstance(each, torch.Tensor)]


def storages(value: Any) -> set[int]:
    return {each.untyped_storage().data_ptr() for each in tensors(value)}


def changes(before: Any, after: Any) -> list[int]:
    """Which tensors, by number, have other values now."""
    pairs = zip(tensors(before), tensors(after), strict=True)
    return [i for i, (one, other) in enumerate(pairs) if not torch.equal(one, other)]


def metadata(x: torch.Tensor) -> Any:
    return x.shape, x.dtype, x.device


def alike(one: Any, other: Any) -> None:
    torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", SAMPLED)
def test_what_a_row_says_is_so(name: str) -> None:
    """By each of its spellings that takes the sample."""
    row, ran = CALLS[name], 0
    for callee, args, _ in runs(name):
        ran += 1
        given = copied(args)
        before = copied(given)
        result = callee(*given)
        changed = changes(before, given)
        assert changed == ([0] if row.writes else []), "it writes to something else"
        if row.fresh:
            assert not storages(result) & storages(given), "it shares storage"
        if row.keeps == "metadata":
            assert metadata(result) == metadata(given[0])
        if row.commutative:
            alike(callee(*reversed(copied(args))), callee(*copied(args)))
        if row.pure:
            alike(callee(*copied(args)), callee(*copied(args)))
        if row.gives == "tensor":
            assert isinstance(result, torch.Tensor)
        if row.gives == "several":
            assert not isinstance(result, torch.Tensor)
        if row.gives in ("number", "size"):
            assert not tensors(result), "it gives a tensor"
        check_strides(callee, args, row)
        check_questions(callee, args, row)
    assert ran, "no spelling takes the sample"


def check_strides(callee: Any, args: tuple[Any, ...], row: OpTraits) -> None:
    """The numbers are the same where those that it reads lie in memory in another way."""
    if not row.fresh and row.strides == "observed":
        return

    def spread(x: Any) -> Any:
        if not isinstance(x, torch.Tensor) or x.dim() == 0:
            return x
        return x.new_zeros((*x.shape, 2))[..., 0].copy_(x)

    try:
        found = callee(*pytree.tree_map(spread, args))
    except RuntimeError:
        assert row.strides == "fitting"
        return
    alike(found, callee(*copied(args)))
    if row.strides == "contiguous":
        assert found.is_contiguous()


def check_questions(callee: Any, args: tuple[Any, ...], row: OpTraits) -> None:
    """What is said to read no number gives the same whatever the numbers are."""
    if not row.asks:
        return
    at = 1 if row.asks == "other" else 0
    other = [each + 1 if i == at else each for i, each in enumerate(copied(args))]
    found, expected = callee(*other), callee(*copied(args))
    if isinstance(found, torch.Tensor) and "empty" in getattr(callee, "__name__", ""):
        found, expected = metadata(found), metadata(expected)
    elif isinstance(found, torch.Tensor):
        alike(found, expected)
        found, expected = metadata(found), metadata(expected)
    assert found == expected


IN_PLACE = [name for name, row in CALLS.items() if row.pointwise or row.activation]


@pytest.mark.parametrize("name", [each for each in SAMPLED if each in IN_PLACE])
def test_the_form_in_place_changes_numbers_alone(name: str) -> None:
    """It writes to its first argument, which it gives, and an activation gives the same without."""
    _, args, expected = next(iter(runs(name)), (None, None, None))
    forms = [getattr(holder, f"{name}_", None) for holder in (torch.Tensor, torch, F)]
    forms.append(getattr(operator, f"i{name}", None))
    packet = getattr(aten, f"{name}_", None)
    if packet is not None:
        forms += [getattr(packet, overload) for overload in packet.overloads()]
    for form in filter(None, forms):
        given = copied(args)
        before = metadata(given[0]) if isinstance(given[0], torch.Tensor) else None
        values = copied(given)
        try:
            result = form(*given)
        except (RuntimeError, TypeError):
            continue
        if before is None:
            continue
        assert traits_of_function(form).writes
        assert result is given[0]
        assert metadata(given[0]) == before
        assert set(changes(values, given)) <= {0}
        if CALLS[name].activation:
            alike(result, expected)


def test_what_updates_statistics_is_called_so_by_torch() -> None:
    assert all(hasattr(aten, name) for name in OF_STATISTICS)


NORMS: list[tuple[Any, str]] = [
    (F.batch_norm, "x, mean, var, training={}"),
    (F.instance_norm, "x, mean, var, use_input_stats={}"),
    (torch.batch_norm, "x, None, None, mean, var, {}, 0.1, 1e-5, False"),
    (torch.instance_norm, "x, None, None, mean, var, {}, 0.1, 1e-5, False"),
    (torch.native_batch_norm, "x, None, None, mean, var, {}, 0.1, 1e-5"),
    (aten.batch_norm.default, "x, None, None, mean, var, {}, 0.1, 1e-5, False"),
    (aten.batch_norm, "x, None, None, mean, var, {}, 0.1, 1e-5, False"),
    (aten.instance_norm.default, "x, None, None, mean, var, {}, 0.1, 1e-5, False"),
    (aten.native_batch_norm.default, "x, None, None, mean, var, {}, 0.1, 1e-5"),
    (aten._batch_norm_impl_index.default, "x, None, None, mean, var, {}, 0.1, 1e-5, False"),
    (aten._native_batch_norm_legit.default, "x, None, None, mean, var, {}, 0.1, 1e-5"),
]


@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize(("function", "spelt"), NORMS, ids=lambda each: torch.typename(each)[:40])
def test_statistics_that_are_updated_are_written(function: Any, spelt: str, flag: bool) -> None:
    """Though some schemas do not say so, nor do version counters."""
    graph = fx.Graph()
    nodes = {name: graph.placeholder(name) for name in ("x", "mean", "var")}
    args, kwargs = eval(f"call({spelt.format(flag)})", {"call": lambda *a, **k: (a, k), **nodes})
    node = graph.call_function(function, args, kwargs)
    graph.output(node)
    values = {"x": rand(2, 4, 3), "mean": torch.zeros(4), "var": torch.ones(4)}
    before = copied(values)
    fx.Interpreter(fx.GraphModule(nn.Module(), graph)).run(*values.values())
    changed = {name for name, each in values.items() if not torch.equal(each, before[name])}
    claimed = {each.name for each in written_by(node, GraphView(nn.Module(), graph, {}))}
    assert changed == ({"mean", "var"} if flag else set())
    assert claimed == changed or function is aten._native_batch_norm_legit.default


def test_what_a_list_holds_is_written_by_what_takes_a_list() -> None:
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    node = graph.call_function(torch._foreach_add_, ([x, y], 1))
    view = GraphView(nn.Module(), graph, {})
    assert written_by(node, view) == [x, y]
    assert not is_fresh(node, view)


# How each type of module is made; one that has none here is abstract or is made when called.
def made(kind: Any) -> tuple[nn.Module, torch.Tensor] | None:
    name = kind.__name__
    dims = next((int(each) for each in name if each.isdigit() and f"{each}d" in name), 0)
    image = rand(2, 4, *[6] * dims)
    if name.startswith(("_", "Lazy")) or name in ("NonDynamicallyQuantizableLinear",):
        return None
    special: dict[str, tuple[Any, tuple[int, ...]]] = {
        "Linear": ((4, 3), (2, 4)), "Bilinear": None, "Threshold": ((0.0, 1.0), (2, 4)),
        "Softmax2d": ((), (1, 2, 3, 3)), "GLU": ((), (2, 4)), "MultiheadAttention": None,
        "RMSNorm": ((4,), (2, 4)), "LayerNorm": ((4,), (2, 4)), "GroupNorm": ((2, 4), (2, 4)),
        "LocalResponseNorm": ((2,), (2, 4, 3)), "CrossMapLRN2d": ((2,), (2, 4, 3, 3)),
        "SyncBatchNorm": ((4,), (2, 4)), "Softmax": ((-1,), (2, 4)), "Softmin": ((-1,), (2, 4)),
        "LogSoftmax": ((-1,), (2, 4)), "Flatten": ((0,), (2, 4)),
        "Unflatten": ((1, (2, 2)), (2, 4)), "RNN": None, "LSTM": None, "GRU": None,
    }  # fmt: skip
    if name in special:
        if special[name] is None:
            return None
        settings, size = special[name]
        return kind(*settings), rand(*size)
    if "Conv" in name:
        return kind(4, 3, 1), image
    if "BatchNorm" in name:
        return kind(4), image if dims != 1 else rand(2, 4, 3)
    if "Unpool" in name:
        return None
    if "FractionalMaxPool" in name:
        return kind(2, output_size=3), image
    if "Adaptive" in name:
        return kind(6), image
    if "LPPool" in name:
        return kind(2, 1), image
    if "Pool" in name:
        return kind(1), image
    return kind(), image if dims else rand(2, 4)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", [each for each in MODULES if issubclass(each, nn.Module)])
@pytest.mark.filterwarnings("ignore")
def test_what_a_row_says_of_a_type_is_so(kind: Any, training: bool) -> None:
    """In eval mode and in training mode, but for what hands on its input."""
    row, sample = MODULES[kind], made(kind)
    if sample is None:
        return
    module, x = sample
    module.train(training)
    if kind is nn.SyncBatchNorm and training:
        return
    try:
        y = module(x)
    except RuntimeError as error:
        pytest.skip(str(error))
    if row.fresh:
        assert not storages(y) & storages(x)
    if row.hands_on and not training:
        assert y is x
    if row.keeps:
        assert y.dim() == x.dim()
    if row.keeps == "metadata":
        assert metadata(y) == metadata(x)
    if row.gives == "tensor":
        assert isinstance(y, torch.Tensor)
    if row.strides == "any" and not training:
        alike(module(x.mT.contiguous().mT), y)
    if row.activation and "inplace" in module.__dict__ and not training:
        module.inplace = True
        given = x.clone()
        assert module(given) is given
        alike(given, y)


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU, nn.MultiheadAttention])
def test_of_several_values_the_first_is_told_where_it_is_a_tensor(kind: Any) -> None:
    """The others may be nested, or nothing."""
    x = rand(2, 4)
    given = (x, x, x) if kind is nn.MultiheadAttention else (x,)
    result = kind(4, 2)(*given)
    assert isinstance(result, tuple)
    assert isinstance(result[0], torch.Tensor)
    assert traits_of_type(kind).gives in ("tensor first", "several")
    assert not (traits_of_type(kind).fresh and storages(result) & storages(x))
