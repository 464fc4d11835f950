"""Strategies for the modules of a chain, one per type, given the shape of what they read."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import attrs
import torch
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from .own_forwards import HoldsNorm, PadsBySize, PadsOneSide

Shape: TypeAlias = tuple[int, ...]

ANY_RANK = (2, 3, 4)


@attrs.frozen(eq=False)
class Maker:
    """How to draw a module, or a call's arguments, for an input of some shape.

    `ranks` are the numbers of dimensions that the input may have, the batch included; `indices`
    says that it holds integers, as an embedding's does.
    """

    draw: Callable[[Shape], st.SearchStrategy[Any]]
    ranks: tuple[int, ...] = ANY_RANK
    indices: bool = False


_makers: dict[Any, Maker] = {}


def register_strategy(
    target: type[nn.Module] | Callable[..., Any] | str,
    strategy: Callable[[Shape], st.SearchStrategy[Any]],
    *,
    ranks: Iterable[int] = ANY_RANK,
    indices: bool = False,
) -> None:
    """Say how `models_around` draws a module of a type, or the arguments of a function or method.

    >>> class Scale(nn.Module):
    ...     def __init__(self, channels: int) -> None:
    ...         super().__init__()
    ...         self.factor = nn.Parameter(torch.ones(channels))
    >>> register_strategy(Scale, lambda shape: st.builds(Scale, st.just(shape[-1])), ranks=[2])

    Args:
        target: a module type, a function, or the name of a tensor method.
        strategy: from the shape of the input to a strategy. For a module type it draws modules,
            for a function or method a dict of the arguments after the chain's value, by name.
        ranks: the numbers of dimensions that an input may have, the batch included.
        indices: the input holds small integers, as that of an embedding does.
    """
    _makers[target] = Maker(strategy, tuple(ranks), indices)


def maker_of(target: Any) -> Maker | None:
    """What is registered for a module type, function or method; otherwise None."""
    return _makers.get(target)


def kinds_of(declared: type[nn.Module]) -> list[type[nn.Module]]:
    """The types to draw a module from: the declared one, or the known members of a family."""
    if declared in _makers:
        return [declared]
    if getattr(declared, "proof", None) is not None:  # what overrides something, and stands for it
        return [PadsBySize, PadsOneSide]
    known = [k for k in _makers if isinstance(k, type) and issubclass(k, declared)]
    return known or [declared]


def ranks_of(kind: type[nn.Module]) -> tuple[int, ...]:
    """The numbers of dimensions that an input of such a module may have."""
    maker = _makers.get(kind)
    return ANY_RANK if maker is None else maker.ranks


def modules(kind: type[nn.Module], shape: Shape) -> st.SearchStrategy[nn.Module]:
    """Modules of a type for inputs of a shape; without a registered strategy, by its signature."""
    maker = _makers.get(kind)
    return by_signature(kind, shape) if maker is None else maker.draw(shape)


_COUNTS = ("channels", "features", "size", "dim", "shape", "width", "hidden")


@st.composite
def by_signature(draw: st.DrawFn, kind: type[nn.Module], shape: Shape) -> nn.Module:
    """A module whose constructor's arguments are drawn by their names, annotations and defaults."""
    sizes = st.sampled_from([*shape[1:][::-1], 1, 2] if len(shape) > 1 else [1, 2, 4])
    given: dict[str, Any] = {}
    for parameter in inspect.signature(kind).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        annotation, default = parameter.annotation, parameter.default
        by_type = annotation if isinstance(annotation, type) else type(default)
        is_required = default is parameter.empty
        named = any(count in parameter.name for count in _COUNTS)
        if is_required and (by_type is int or annotation in ("int", parameter.empty) or named):
            given[parameter.name] = draw(sizes)
        elif by_type is bool:
            given[parameter.name] = draw(st.booleans())
        elif by_type is float or annotation == "float":
            usual = [] if is_required else [default]
            given[parameter.name] = draw(st.sampled_from([*usual, 0.5, 0.1, 2.0]))
        elif is_required:
            given[parameter.name] = draw(st.from_type(annotation))
    return kind(**given)


# The strategies for torch's own layers. Sizes stay small, and options are drawn such that torch
# takes nearly all of them.


@st.composite
def convolutions(
    draw: st.DrawFn, kind: type[Any], shape: Shape, *, transposed: bool = False
) -> nn.Module:
    """Any convolution over an input of shape (N, C, ...): grouped, padded, strided, dilated."""
    channels, *sizes = shape[1:]
    groups = draw(st.sampled_from([1, *(g for g in (channels, 2, 3) if channels % g == 0)]))
    out = groups * draw(st.sampled_from([1, 2, max(4 // groups, 1)]))
    dilation = tuple(draw(st.sampled_from([1, 1, 2])) for _ in sizes)
    kernel = tuple(
        draw(st.integers(1, max(1, min(3, (n - 1) // d + 1))))
        for n, d in zip(sizes, dilation, strict=True)
    )
    options: dict[str, Any] = {"groups": groups, "bias": draw(st.booleans()), "dilation": dilation}
    if transposed:
        stride = tuple(draw(st.integers(1, 2)) for _ in sizes)
        options["output_padding"] = tuple(draw(st.integers(0, s - 1)) for s in stride)
        padding: Any = tuple(draw(st.integers(0, k // 2)) for k in kernel)
    else:
        padding = draw(st.sampled_from(["same", "valid", None]))
        strides = st.just(1) if padding == "same" else st.integers(1, 2)
        stride = tuple(draw(strides) for _ in sizes)
        if padding is None:
            padding = tuple(draw(st.integers(0, min(2, n - 1))) for n in sizes)
        modes = ["zeros", "reflect", "replicate", "circular"]
        options["padding_mode"] = draw(st.sampled_from(modes))
    return kind(channels, out, kernel, stride=stride, padding=padding, **options)  # type: ignore[no-any-return]


@st.composite
def batch_norms(draw: st.DrawFn, kind: type[Any], shape: Shape) -> nn.Module:
    """Any batch norm that keeps statistics, and now and then one that does not."""
    affine = draw(
        st.sampled_from([{}, {"affine": False}, {"affine": True, "bias": False}]),
    )
    eps = draw(st.sampled_from([1e-5, 1e-3, 1e-12, 1.0]))
    keeps = draw(st.sampled_from([True] * 7 + [False]))
    return kind(shape[1], eps=eps, track_running_stats=keeps, **affine)  # type: ignore[no-any-return]


@st.composite
def pools(draw: st.DrawFn, kind: type[Any], shape: Shape) -> nn.Module:
    """A pooling whose windows may overlap and reach into the padding."""
    kernel = draw(st.integers(1, min(2, *shape[2:])))
    stride = draw(st.sampled_from([None, 1, 2]))
    return kind(kernel, stride=stride, padding=draw(st.integers(0, kernel // 2)))  # type: ignore[no-any-return]


@st.composite
def trailing_norms(draw: st.DrawFn, kind: type[Any], shape: Shape) -> nn.Module:
    """A norm over the last dimensions, as LayerNorm and RMSNorm are."""
    normalised = shape[-draw(st.integers(1, max(1, len(shape) - 2))) :]
    eps = draw(st.sampled_from([1e-5, 1e-2]))
    return kind(normalised, eps=eps, elementwise_affine=draw(st.booleans()))  # type: ignore[no-any-return]


@st.composite
def own_forwards(draw: st.DrawFn, kind: type[Any], shape: Shape) -> nn.Module:
    """A convolution with a forward of its own, which may hold a batch norm."""
    out, kernel, stride = draw(_small), draw(st.integers(1, 2)), draw(st.integers(1, 2))
    options: dict[str, Any] = {"stride": stride, "bias": draw(st.booleans())}
    if kind is HoldsNorm:
        options["norm"] = draw(batch_norms(nn.BatchNorm2d, (1, out)))
    return kind(shape[1], out, kernel, **options)  # type: ignore[no-any-return]


def _divisors(n: int) -> list[int]:
    return [g for g in range(1, n + 1) if n % g == 0]


def _by_rank(module: str, draw: Any, **options: Any) -> None:
    for dims in (1, 2, 3):
        kind = getattr(nn, f"{module}{dims}d")
        _makers[kind] = Maker(lambda s, k=kind: draw(k, s, **options), (dims + 2,))  # type: ignore[misc]


def _register(
    kind: Any, *arguments: Any, ranks: tuple[int, ...] = ANY_RANK, **by_name: Any
) -> None:
    """A maker whose constructor's arguments are strategies, or functions of the shape."""

    def draw(shape: Shape) -> st.SearchStrategy[Any]:
        args = [a(shape) if inspect.isfunction(a) else a for a in arguments]
        kwargs = {k: a(shape) if inspect.isfunction(a) else a for k, a in by_name.items()}
        return st.builds(kind, *args, **kwargs)

    _makers[kind] = Maker(draw, ranks)


_flags = st.booleans()
_slopes = st.sampled_from([0.01, 0.5, -0.25, 1.0])
_chances = st.sampled_from([0.5, 0.1, 0.0])
_small = st.sampled_from([4, 1, 2, 3])

_by_rank("Conv", convolutions)
_by_rank("ConvTranspose", convolutions, transposed=True)
_by_rank("BatchNorm", batch_norms)
_by_rank("MaxPool", pools)
_by_rank("AvgPool", pools)
_makers[nn.BatchNorm1d] = attrs.evolve(_makers[nn.BatchNorm1d], ranks=(3, 2))
for _dims in (1, 2, 3):
    _ranks = (_dims + 2,)
    _register(getattr(nn, f"AdaptiveAvgPool{_dims}d"), st.integers(1, 2), ranks=_ranks)
    _register(getattr(nn, f"AdaptiveMaxPool{_dims}d"), st.integers(1, 2), ranks=_ranks)
    _register(getattr(nn, f"Dropout{_dims}d"), _chances, inplace=_flags, ranks=_ranks)
    _register(
        getattr(nn, f"InstanceNorm{_dims}d"),
        lambda s: st.just(s[1]),
        affine=_flags,
        track_running_stats=_flags,
        ranks=_ranks,
    )
_register(nn.Linear, lambda s: st.just(s[-1]), _small, bias=_flags)
_each: Any
for _each in (nn.LayerNorm, nn.RMSNorm):
    _makers[_each] = Maker(lambda s, k=_each: trailing_norms(k, s))  # type: ignore[misc]
_register(
    nn.GroupNorm,
    lambda s: st.sampled_from(_divisors(s[1])),
    lambda s: st.just(s[1]),
    affine=_flags,
)
_makers[nn.Embedding] = Maker(
    lambda s: st.builds(nn.Embedding, st.integers(4, 6), _small), (1, 2, 3), indices=True
)
for _each in (nn.ReLU, nn.ReLU6, nn.SiLU, nn.Mish, nn.Hardswish, nn.Hardsigmoid, nn.SELU):
    _register(_each, inplace=_flags)
for _each in (nn.Sigmoid, nn.Tanh, nn.Softplus, nn.Softsign, nn.Identity, nn.LogSigmoid):
    _register(_each)
for _each in (nn.Dropout, nn.AlphaDropout, nn.FeatureAlphaDropout):
    _register(_each, _chances, inplace=_flags)
for _each in (nn.ELU, nn.CELU):
    _register(_each, st.sampled_from([1.0, 0.5, 2.0]), inplace=_flags)
_register(nn.LeakyReLU, _slopes, inplace=_flags)
_register(nn.PReLU, lambda s: st.sampled_from([1, s[1]]), _slopes)
_register(nn.GELU, approximate=st.sampled_from(["none", "tanh"]))
_register(nn.Hardtanh, st.just(-1.0), st.sampled_from([1.0, 0.5]), inplace=_flags)
_register(nn.Softmax, st.sampled_from([-1, 1]))
_register(nn.LogSoftmax, st.sampled_from([-1, 1]))
_register(nn.Flatten, start_dim=st.sampled_from([1, -2]))
_register(
    nn.Unflatten,
    st.just(1),
    lambda s: st.sampled_from([(g, s[1] // g) for g in _divisors(s[1])]),
    ranks=(2, 3),
)
_register(
    nn.PixelShuffle, lambda s: st.sampled_from([r for r in (2, 1) if s[1] % r**2 == 0]), ranks=(4,)
)
_register(nn.Upsample, scale_factor=st.just(2), ranks=(3, 4))
_register(nn.ZeroPad2d, st.integers(0, 1), ranks=(4,))
for _dims in (1, 2, 3):
    for _name in ("ReflectionPad", "ReplicationPad", "CircularPad"):
        _register(getattr(nn, f"{_name}{_dims}d"), st.integers(0, 1), ranks=(_dims + 2,))
for _each in (PadsBySize, PadsOneSide, HoldsNorm):
    _makers[_each] = Maker(lambda s, k=_each: own_forwards(k, s), (4,))  # type: ignore[misc]
for _each in (torch.flatten, "flatten", torch.ops.aten.flatten.using_ints):
    _makers[_each] = Maker(
        lambda s: st.fixed_dictionaries(
            {"start_dim": st.sampled_from([0, 0, 1]), "end_dim": st.sampled_from([1, -2, -1])}
        )
    )
# What moves values, averages them or pads them with one another.
_aten, _modes = torch.ops.aten, st.sampled_from(["reflect", "replicate", "circular", "constant"])
for _each in (torch.mean, "mean", _aten.mean.dim):
    _makers[_each] = Maker(
        lambda s: st.fixed_dictionaries(
            {"dim": st.sampled_from([tuple(range(2, len(s))), (-1,), (1, -1)]), "keepdim": _flags}
        )
    )
for _each in (torch.permute, "permute", _aten.permute.default):
    _makers[_each] = Maker(
        lambda s: st.fixed_dictionaries(
            {"dims": st.sampled_from([(0, *range(2, len(s)), 1), tuple(range(len(s)))])}
        )
    )
for _each in (torch.transpose, "transpose", _aten.transpose.int):
    _makers[_each] = Maker(
        lambda s: st.fixed_dictionaries({"dim0": st.just(1), "dim1": st.sampled_from([-1, 1])})
    )
for _each in (F.pad, _aten.pad.default):
    _makers[_each] = Maker(
        lambda s: st.fixed_dictionaries({"pad": st.just((1, 0)), "mode": _modes})
    )
for _dims in (1, 2, 3):
    _name = f"adaptive_avg_pool{_dims}d"
    for _each in (getattr(F, _name), getattr(_aten, _name).default):
        _makers[_each] = Maker(
            lambda s: st.fixed_dictionaries(
                {"output_size": st.sampled_from([[1] * (len(s) - 2), [2] * (len(s) - 2)])}
            )
        )
for _each in ("contiguous", "clone", torch.clone, _aten.contiguous.default, _aten.clone.default):
    _makers[_each] = Maker(lambda s: st.just({}))
# Random arguments to these end the process.
for _each in ("to", "type", torch.ops.aten.to.dtype, torch.ops.aten._to_copy.default):
    _makers[_each] = Maker(
        lambda s: st.fixed_dictionaries({"dtype": st.sampled_from([torch.float64, torch.float32])})
    )
