"""What calls of functions mean as calls of modules: how arguments and attributes correspond.

Each meaning is stated once, in both directions, for all functions of `dialects` that share it.
"""

from __future__ import annotations

from typing import Any

import attrs
import torch
from torch import nn
from typing_extensions import override

from ..ir.op_traits import CALLS, traits_of_type

Arguments = dict[str, Any]
"""A call's arguments by name, tensors of the model as they are."""

CONVS: tuple[Any, ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED_CONVS: tuple[Any, ...] = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
BATCH_NORMS: tuple[Any, ...] = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
DROPOUTS: tuple[Any, ...] = (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
# How many dimensions there are to a batch of what these read, one type after the other.
_RANKS = (3, 4, 5)
_RANK_OF: dict[Any, int] = {
    kind: rank
    for kinds in (CONVS, TRANSPOSED_CONVS)
    for kind, rank in zip(kinds, _RANKS, strict=True)
}
UNKNOWN_RANK = (
    "whether it is one of 1, 2 or 3 dimensions is not known, since the shape that it reads is not"
)
_BATCH_NORM_OF: dict[int | None, Any] = {
    2: nn.BatchNorm1d,
    **dict(zip(_RANKS, BATCH_NORMS, strict=True)),
}


@attrs.frozen
class Meaning:
    """How the arguments of functions and the attributes of modules follow from each other.

    `kinds` are the types of module that a call may be.
    """

    kinds: tuple[type[nn.Module], ...]

    def lift(self, given: Arguments, rank: int | None) -> nn.Module | str:
        """The module that a call is, around the very tensors it is given, or why it is none.

        `rank` is the number of dimensions of what the call reads, where that is known.
        """
        raise NotImplementedError

    def lower(self, module: nn.Module) -> Arguments | None:
        """The arguments that spell a module of one of the kinds, or None where none do."""
        raise NotImplementedError

    def updates(self, given: Arguments) -> tuple[str, ...]:
        """The names of those tensors that a call with these arguments writes to."""
        return ()


@attrs.frozen(eq=False)
class Transposed:
    """A matrix that a call reads transposed."""

    tensor: torch.Tensor


@attrs.frozen
class ConvMeaning(Meaning):
    """Convolutions of one rank; `padding` is the type that their padding has, if it has to."""

    padding: type[Any] | None = None

    @override
    def lift(self, given: Arguments, rank: int | None) -> nn.Module | str:
        weight, bias = given["weight"], given.get("bias")
        kind: Any = next((each for each in self.kinds if _RANK_OF[each] == weight.dim()), None)
        if kind is None:
            return f"its weight has {weight.dim()} dimensions"
        if rank not in (None, weight.dim()):
            return "its input has no batch dimension"
        groups, inputs = given.get("groups", 1), weight.shape[1]
        is_transposed = issubclass(kind, TRANSPOSED_CONVS)
        channels = weight.shape[0], inputs * groups
        names = ("stride", "padding", "dilation", "output_padding")
        dims = weight.dim() - 2
        geometry = {name: _per_dim(given[name], dims) for name in names if name in given}
        module: nn.Module = kind(
            *(channels if is_transposed else channels[::-1]),
            tuple(weight.shape[2:]),
            groups=groups,
            bias=bias is not None,
            device="meta",
            **geometry,
        )
        return _around(module, weight=weight, bias=bias)

    @override
    def lower(self, module: Any) -> Arguments | None:
        spelt = {name: getattr(module, name) for name in ("stride", "dilation", "groups")}
        spelt.update(weight=module.weight, bias=module.bias, padding=module.padding)
        if isinstance(module.padding, str) and self.padding is not str:
            spelt["padding"] = _amount(module) if self.padding is tuple else module.padding
        fits = self.padding is not str or isinstance(module.padding, str)
        if module.padding_mode != "zeros" or not fits or spelt["padding"] is None:
            return None
        return {**spelt, "output_padding": module.output_padding}


@attrs.frozen
class AnyConvMeaning(Meaning):
    """Convolutions of all ranks, transposed or not, as one function."""

    @override
    def lift(self, given: Arguments, rank: int | None) -> nn.Module | str:
        is_transposed = given["transposed"]
        plain = {k: v for k, v in given.items() if is_transposed or k != "output_padding"}
        return ConvMeaning(TRANSPOSED_CONVS if is_transposed else CONVS).lift(plain, rank)

    @override
    def lower(self, module: nn.Module) -> Arguments | None:
        is_transposed = isinstance(module, TRANSPOSED_CONVS)
        spelt = ConvMeaning(CONVS, padding=tuple).lower(module)
        return None if spelt is None else {**spelt, "transposed": is_transposed}


@attrs.frozen
class LinearMeaning(Meaning):
    """Linear layers."""

    @override
    def lift(self, given: Arguments, rank: int | None) -> nn.Module | str:
        weight, bias = given["weight"], given.get("bias")
        if weight.dim() != 2:
            return f"its weight has {weight.dim()} dimensions"
        outputs, inputs = weight.shape
        module = nn.Linear(inputs, outputs, bias=bias is not None, device="meta")
        return _around(module, weight=weight, bias=bias)

    @override
    def lower(self, module: Any) -> Arguments | None:
        return {"weight": module.weight, "bias": module.bias}


@attrs.frozen
class MatMulMeaning(Meaning):
    """`addmm` with a bias or `mm` without: a linear layer that reads its weight transposed."""

    has_bias: bool

    @override
    def lift(self, given: Arguments, rank: int | None) -> nn.Module | str:
        if not isinstance(given["mat2"], Transposed):
            return "its second matrix is not a transposed tensor of the model"
        if given.get("alpha", 1) != 1 or given.get("beta", 1) != 1:
            return "it scales its operands"
        weight, bias = given["mat2"].tensor, given.get("input")
        if bias is not None and bias.shape != weight.shape[:1]:
            return "it adds something other than one number per feature"
        return LinearMeaning((nn.Linear,)).lift({"weight": weight, "bias": bias}, rank)

    @override
    def lower(self, module: Any) -> Arguments | None:
        if (module.bias is not None) is not self.has_bias:
            return None
        return {"mat2": Transposed(module.weight), "input": module.bias}


@attrs.frozen
class BatchedMatMulMeaning(MatMulMeaning):
    """`bmm` with the same matrix for each of a batch; what replaces it is traced to operators."""

    @override
    def lower(self, module: Any) -> Arguments | None:
        return None


@attrs.frozen
class BatchNormMeaning(Meaning):
    """Batch norms of all ranks."""

    needs_statistics: bool = False

    @override
    def lift(self, given: Arguments, rank: int | None) -> nn.Module | str:
        stats = {name: given.get(name) for name in ("running_mean", "running_var")}
        affine = {name: given.get(name) for name in ("weight", "bias")}
        if self.updates(given):
            return (
                "it is called with training=True, where it normalises by each batch and "
                "updates its statistics; call model.eval() first"
            )
        if rank is None:
            return UNKNOWN_RANK
        sizes = {len(each) for each in (*stats.values(), *affine.values()) if each is not None}
        if rank not in _BATCH_NORM_OF or len(sizes) != 1:
            return f"no batch norm is of {rank} dimensions and {len(sizes)} numbers of features"
        module: nn.Module = _BATCH_NORM_OF[rank](
            sizes.pop(),
            eps=given.get("eps", 1e-5),
            momentum=given.get("momentum", 0.1),
            affine=False,
            track_running_stats=False,
        )
        module.affine = any(each is not None for each in affine.values())  # type: ignore[assignment]
        module.track_running_stats = stats["running_mean"] is not None  # type: ignore[assignment]
        return _around(module.eval(), **affine, **stats)

    @override
    def updates(self, given: Arguments) -> tuple[str, ...]:
        updates = given.get("running_mean") is not None
        return CALLS["batch_norm"].written(given) if updates else ()

    @override
    def lower(self, module: Any) -> Arguments | None:
        has_statistics = module.running_mean is not None
        if module.training or (self.needs_statistics and not has_statistics):
            return None
        names = ("weight", "bias", "running_mean", "running_var", "eps")
        return {
            **{name: getattr(module, name) for name in names},
            "momentum": 0.0 if module.momentum is None else module.momentum,
            "training": not has_statistics,
            "cudnn_enabled": torch.backends.cudnn.enabled,
        }


@attrs.frozen
class DropoutMeaning(Meaning):
    """Dropouts of one type, or of several told apart by rank; `flag` says that it is training."""

    flag: str = "training"
    by_default: bool = True

    @override
    def lift(self, given: Arguments, rank: int | None) -> nn.Module | str:
        kind: Any = self.kinds[0]
        if len(self.kinds) > 1:
            if rank not in _RANKS:
                return UNKNOWN_RANK
            kind = self.kinds[_RANKS.index(rank)]
        module: nn.Module = kind(given.get("p", 0.5), given.get("inplace", False))
        return module.train(given.get(self.flag, self.by_default))

    @override
    def lower(self, module: Any) -> Arguments | None:
        return {"p": module.p, self.flag: module.training, "inplace": module.inplace}


@attrs.frozen
class ActivationMeaning(Meaning):
    """Functions of one value, with the settings that function and module name alike."""

    settings: tuple[str, ...] = ()

    @override
    def lift(self, given: Arguments, rank: int | None) -> nn.Module | str:
        given = {name: value for name, value in given.items() if name != "input"}
        if unknown := [name for name in given if name not in (*self.settings, "inplace")]:
            return f"it is called with a further argument: {unknown[0]}"
        writes = given.pop("inplace", False)
        module = self.kinds[0](**given)
        if writes:  # some functions have a form in place, and their module has no such setting
            module.inplace = True  # type: ignore[assignment]
        return module

    @override
    def lower(self, module: nn.Module) -> Arguments | None:
        spelt = {name: getattr(module, name) for name in self.settings}
        return {**spelt, "inplace": getattr(module, "inplace", False)}


def output_rank(kinds: tuple[Any, ...], input_rank: int | None) -> int | None:
    """How many dimensions the output of a module of one of these types has, where types tell."""
    told = {**_RANK_OF, nn.BatchNorm2d: 4, nn.BatchNorm3d: 5}.get(kinds[0])
    if len(kinds) == 1 and told is not None:
        return told
    return input_rank if all(traits_of_type(kind).keeps for kind in kinds) else None


def _around(module: nn.Module, **tensors: torch.Tensor | None) -> nn.Module:
    """The module with these very tensors, whether they are parameters of the model or not."""
    for name, tensor in tensors.items():
        registry: Any = module._buffers if name in module._buffers else module._parameters
        registry[name] = tensor
    return module


def _per_dim(value: Any, dims: int) -> Any:
    if isinstance(value, list | tuple):
        return tuple(value) * dims if len(value) == 1 else tuple(value)
    return value


def _amount(module: Any) -> tuple[int, ...] | None:
    """The padding, in numbers, that a convolution has by name; None where the sides differ."""
    if module.padding == "valid":
        return (0,) * len(module.kernel_size)
    sizes = zip(module.dilation, module.kernel_size, strict=True)
    total = [dilation * (size - 1) for dilation, size in sizes]
    return None if any(each % 2 for each in total) else tuple(each // 2 for each in total)
