"""Compare two runs, value by value, and tell what rounding explains from what it does not."""

from __future__ import annotations

import enum
import math
from collections.abc import Iterator
from typing import Any, TypeGuard

import attrs
import torch

from ..module_utils.nested import Container, flatten
from ..module_utils.running import Run, short, widened

# A rewrite may round otherwise than its original, and a few times as much. How much the original
# does, a float64 run of it tells. That can be little by chance, and there may be no such run, so
# these are the relative errors that rounding makes in a model's output in any case.
_TIMES_OWN_ERROR = 4
_NOISIEST = 0.1
_USUAL = {torch.float64: 1e-10, torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, enum.Enum)


@attrs.frozen
class TensorCheck:
    """One tensor of a run's values, original against rewritten.

    Each relative error is `max|a - b| / max|a|`, `a` being the reference (where that is zero, it
    is `max|b|`). For `difference` and for `absolute`, which is `max|a - b|`, the reference is the
    original's value. For `original_error` and `rewritten_error` it is that of a float64 run of the
    original, for `float64_difference` that run is compared with one of the rewritten model; these
    are None where there is no such run. `at` is the index where the difference is largest.

    `mismatch` is what no rounding explains; `note` is a difference that changes no value.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    limit: float = 0.0
    absolute: float = 0.0
    difference: float = 0.0
    original_error: float | None = None
    rewritten_error: float | None = None
    float64_difference: float | None = None
    at: tuple[int, ...] = ()
    mismatch: str = ""
    note: str = ""
    is_empty: bool = attrs.field(default=False, repr=False)

    @property
    def error(self) -> float:
        """The error that is held against the limit."""
        return self.difference if self.rewritten_error is None else self.rewritten_error

    @property
    def same(self) -> bool:
        """Whether rounding explains all that is different."""
        return not self.mismatch and self.error <= self.limit

    @property
    def is_noise(self) -> bool:
        """Whether the error is over the limit and the rewrite need not be wrong for that.

        So it is if both models are much closer in float64, or the original's own error leaves
        nothing to compare.
        """
        if self.mismatch or self.same:
            return False
        usual = usual_error(getattr(torch, self.dtype))
        exact = self.float64_difference
        agrees = exact is not None and exact <= min(usual, self.error / 10)
        return agrees or (self.original_error is not None and self.original_error > _NOISIEST)

    @property
    def excess(self) -> float:
        """How close the error comes to the limit, as a fraction of it; infinite for a mismatch."""
        if self.mismatch:
            return math.inf
        return self.error / self.limit if self.limit else math.inf if self.error else 0.0

    def __str__(self) -> str:
        """The errors in words."""
        if self.mismatch:
            return self.mismatch
        at = f", largest at {list(self.at)}" if not self.same and self.at else ""
        if self.original_error is None:
            return f"relative difference {self.error:.1e} (allowed {self.limit:.1e}){at}"
        return (
            f"relative error {self.error:.1e} against a float64 run, "
            f"the original's is {self.original_error:.1e} (allowed {self.limit:.1e}){at}"
        )


def usual_error(dtype: torch.dtype) -> float:
    """The relative error that rounding makes in any model of this type; 0 for whole numbers."""
    if not (dtype.is_floating_point or dtype.is_complex):
        return 0.0
    return _USUAL.get(dtype.to_real(), _NOISIEST)


def pairs(original: Run, rewritten: Run) -> Iterator[tuple[str, Any, Any]]:
    """What there is to compare of two runs, by name; a value that one run lacks is None there.

    That is all of the output, and the inputs and buffers that either run wrote to. A buffer that
    only one model has is no difference: a rewrite may do without.
    """
    ours, theirs = original.values, rewritten.values
    for name in dict.fromkeys((*ours, *theirs)):
        is_output = name.startswith("output")
        untouched = name in original.untouched and name in rewritten.untouched
        if not is_output and (untouched or name not in ours or name not in theirs):
            continue
        yield name, ours.get(name), theirs.get(name)


def difference(expected: Any, found: Any, rtol: float, path: str = "output") -> str | None:
    """How two values differ by more than rounding, in words, or None, however they are nested.

    Args:
        expected: what there should be.
        found: what there is.
        rtol: the largest error of an element allowed, relative to its tensor's largest; all else
            that `check` looks at must be equal.
        path: what the values are called.
    """
    given = dict(flatten(found, path))
    for name, a in flatten(expected, path):  # what is only in the other makes its container another
        b = given.get(name)
        if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
            said = mismatch(a, b)
        else:
            checked = check(name, a, b, None, rtol, 0.0)
            said = checked.mismatch
            if not checked.same and not said:
                off = f"{checked.error:.1e} of its largest value"
                said = f"is off by {off}, allowed {rtol:.0e}"
        if said:
            return f"{name} {said}"
    return None


def mismatch(a: Any, b: Any) -> str:
    """How two values that are not both tensors differ; empty where they do not."""
    if isinstance(a, Container) or isinstance(b, Container):
        return "" if a == b else f"was {_described(a)} and became {_described(b)}"
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return f"was {_described(a)} and became {_described(b)}"
    if not isinstance(a, _PLAIN):
        return f"is of type {type(a).__name__}, which can't be compared"
    same = type(a) is type(b) and (a == b or (a != a and b != b))  # NaN is not itself
    return "" if same else f"was {a!r} and became {b!r}"


def check(
    name: str, a: torch.Tensor, b: torch.Tensor, reference: Any, rtol: float | None, coarsest: float
) -> TensorCheck:
    """Compare two tensors.

    Args:
        name: what they are called.
        a: the original's.
        b: the rewritten model's.
        reference: that of a float64 run of the original; anything else if there is none.
        rtol: the relative error to allow; by default it follows from dtype and reference.
        coarsest: the usual error of the coarsest dtype in the model, where there is no reference.
    """
    base = TensorCheck(name, short(a.dtype), tuple(a.shape))
    if (a.dtype, a.shape, a.device, a.layout) != (b.dtype, b.shape, b.device, b.layout):
        was, became = _described(a), _described(b)
        return attrs.evolve(base, mismatch=f"was {was} and became {became}")
    if a.is_meta:
        return attrs.evolve(base, is_empty=True)
    note = "" if _layout(a) == _layout(b) else f"was {_layout(a)} and became {_layout(b)}"
    a, b = _dense(a), _dense(b)
    if a.shape != b.shape:
        return attrs.evolve(base, mismatch=f"was {list(a.shape)} and became {list(b.shape)}")
    if not is_inexact(a):
        different = a != b
        wrong, total = int(different.sum()), a.numel()
        said = f"differs in {wrong} of {total} elements, first at {_first(different)}"
        return attrs.evolve(base, mismatch=said if wrong else "", note=note, is_empty=not total)
    if (odd := _other_places(a, b)) is not None:
        return attrs.evolve(base, mismatch=odd, note=note)
    absolute, difference, at = _errors(a, b)
    base = attrs.evolve(base, absolute=absolute, difference=difference, at=at, note=note)
    base = attrs.evolve(base, is_empty=not bool(torch.isfinite(a).any()))
    usual = usual_error(a.dtype)
    if not isinstance(reference, torch.Tensor):
        limit = _TIMES_OWN_ERROR * max(coarsest, usual) if rtol is None else rtol
        return attrs.evolve(base, limit=limit)
    reference = _dense(reference)
    own = relative_error(reference, a)
    limit = min(max(_TIMES_OWN_ERROR * own, usual), _NOISIEST) if rtol is None else rtol
    error = relative_error(reference, b)
    return attrs.evolve(base, original_error=own, rewritten_error=error, limit=limit)


def relative_error(reference: torch.Tensor, value: torch.Tensor) -> float:
    """`max|a - b| / max|a|` over what is finite in both, in float64."""
    return _errors(_dense(reference), _dense(value))[1]


def is_inexact(value: Any) -> TypeGuard[torch.Tensor]:
    """Whether it is a tensor of floating-point or complex numbers."""
    return isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())


def _errors(a: torch.Tensor, b: torch.Tensor) -> tuple[float, float, tuple[int, ...]]:
    """The largest absolute and relative error, and where that is."""
    both = torch.isfinite(a) & torch.isfinite(b)
    if not both.any():
        apart = bool(torch.isfinite(a).any() or torch.isfinite(b).any())
        return (math.inf, math.inf, ()) if apart else (0.0, 0.0, ())
    a, b = (torch.where(both, widened(each), 0) for each in (a, b))
    wrong = (a - b).abs()
    error = float(wrong.max())
    at = torch.unravel_index(wrong.argmax(), wrong.shape) if wrong.dim() else ()
    return error, error / (float(a.abs().max()) or 1.0), tuple(map(int, at))


def _other_places(a: torch.Tensor, b: torch.Tensor) -> str | None:
    """Where one tensor holds NaN or an infinity and the other something else, in words."""
    if a.is_complex():
        a, b = (torch.view_as_real(each.resolve_conj()) for each in (a, b))
    # What is finite becomes 0, NaN 1, and infinities the largest and the smallest number.
    odd_a, odd_b = (torch.where(torch.isfinite(x), 0, x).nan_to_num(nan=1) for x in (a, b))
    different = odd_a != odd_b
    if not different.any():
        return None
    at = _first(different)
    return (
        f"has NaN or infinities in other places: {int(different.sum())} of {a.numel()}, "
        f"first at {at}, where {a[tuple(at)].item():g} became {b[tuple(at)].item():g}"
    )


def _first(where: torch.Tensor) -> list[int]:
    return [int(i) for i in where.nonzero()[0]] if where.any() else []


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    """The numbers of a tensor, however they are stored."""
    tensor = tensor.detach()
    if tensor.is_nested:
        return torch.cat([each.reshape(-1) for each in tensor.unbind()])
    if tensor.is_quantized:
        return tensor.dequantize()
    return tensor if tensor.layout == torch.strided else tensor.to_dense()


def _layout(tensor: torch.Tensor) -> str:
    """A tensor's memory format in words, without what a dimension of size 1 leaves open."""
    if tensor.layout != torch.strided or tensor.is_nested:
        return str(tensor.layout)
    if tensor.is_contiguous():
        return "contiguous"
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    known = formats.get(tensor.dim())
    if known is not None and tensor.is_contiguous(memory_format=known):
        return str(known).removeprefix("torch.")
    return f"of strides {list(tensor.stride())}"


def _described(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return (
            str(value)
            if isinstance(value, Container)
            else f"a value of type {type(value).__name__}"
        )
    on = "" if value.device.type == "cpu" else f" on {value.device}"
    layout = (
        "" if value.layout == torch.strided else f" ({str(value.layout).removeprefix('torch.')})"
    )
    size = list(value.shape) if not value.is_nested else "nested"
    return f"{short(value.dtype)} {size}{layout}{on}"
