"""Compare what a rewritten model gives with what its original gives."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import attrs
import torch
from torch import nn
from torch.utils import _pytree as pytree

from .errors import FxRewriteError

Inputs = tuple[torch.Tensor, ...]

SEED = 0

# A rewrite may round otherwise than its original, and a few times as much. How much the original
# does, a float64 run of it tells. That can be little by chance, and there may be no such run, so
# these are the relative errors that rounding makes in a model's output in any case.
_TIMES_OWN_ERROR = 4
_NOISIEST = 0.1
_USUAL = {torch.float64: 1e-10, torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


class InputError(FxRewriteError):
    """The original model can't be run on the given inputs."""


@attrs.frozen
class TensorCheck:
    """One floating-point tensor of the outputs, original against rewritten.

    Each error is `max|a - b| / max|a|`, `a` being the reference: `difference` has the original's
    output for `a`, the other two that of a float64 run of the original (None where there is none).
    """

    name: str
    difference: float
    original_error: float | None
    rewritten_error: float | None
    limit: float

    @property
    def error(self) -> float:
        """The error that is held against the limit."""
        return self.difference if self.rewritten_error is None else self.rewritten_error

    @property
    def same(self) -> bool:
        """Whether the error is one that rounding explains."""
        return self.error <= self.limit

    def __str__(self) -> str:
        """The errors in words."""
        if self.original_error is None:
            return f"relative difference {self.error:.1e} (allowed {self.limit:.1e})"
        return (
            f"relative error {self.error:.1e} against a float64 run, "
            f"the original's is {self.original_error:.1e} (allowed {self.limit:.1e})"
        )


@attrs.frozen
class Verification:
    """Whether a rewritten model gives what its original gives.

    `mismatch` says what no rounding can explain, and is empty otherwise; `no_reference` says why
    the original was not run in float64, and is empty where it was.
    """

    tensors: tuple[TensorCheck, ...] = ()
    mismatch: str = ""
    no_reference: str = ""

    @property
    def same(self) -> bool:
        """Whether the outputs are the same up to rounding."""
        return not self.mismatch and all(each.same for each in self.tensors)

    @property
    def worst(self) -> TensorCheck | None:
        """The tensor whose error comes closest to its limit, or exceeds it the most."""
        return max(self.tensors, key=lambda each: each.error / each.limit, default=None)

    def __str__(self) -> str:
        """The verdict's grounds in one line."""
        if self.mismatch or self.worst is None:
            return self.mismatch
        against = f"; no float64 run, as {self.no_reference}" if self.no_reference else ""
        name = f"{self.worst.name}: " if len(self.tensors) > 1 else ""
        return f"{name}{self.worst}{against}"

    def to_dict(self) -> dict[str, Any]:
        """The verdict and all numbers as plain data; a number that is not finite becomes None."""
        data = attrs.asdict(self, value_serializer=lambda _, __, value: _finite_or_none(value))
        return {"same": self.same, **data}


def verify(original: nn.Module, rewritten: nn.Module, inputs: Inputs) -> Verification:
    """Run both models on the inputs and compare all that they return, however nested.

    Structure, shapes, dtypes, the places of NaN and infinities, and all that is no floating-point
    number must be equal. For the rest, a copy of the original runs in float64 where it can: the
    rewritten model's error against that may be a few times the original's own, no more.

    >>> linear = nn.Linear(4, 2)
    >>> verify(linear, copy.deepcopy(linear), (torch.ones(1, 4),)).same
    True

    Args:
        original: the model in eval mode; left as it is.
        rewritten: what has to give the same.
        inputs: the positional arguments of both; left as they are.

    Raises:
        InputError: the original raises on these inputs.
    """
    expected = run_original(original, inputs)
    try:
        found = run(rewritten, inputs)
    except Exception as error:
        return Verification(mismatch=f"the rewritten model raised {type(error).__name__}: {error}")
    before, before_spec = _leaves(expected)
    after, after_spec = _leaves(found)
    if before_spec != after_spec:
        return Verification(mismatch=f"the output was {before_spec} and became {after_spec}")
    for (name, a), (_, b) in zip(before, after, strict=True):
        mismatch = _mismatch(a, b)
        if mismatch:
            return Verification(mismatch=f"{name} {mismatch}")
    reference, no_reference = _reference(original, inputs, [a for _, a in before])
    coarsest = max(map(_usual, (*original.parameters(), *original.buffers())), default=0.0)
    checks = tuple(
        _check(name, a, b, None if reference is None else reference[i], coarsest)
        for i, ((name, a), (_, b)) in enumerate(zip(before, after, strict=True))
        if _is_inexact(a) and bool(torch.isfinite(a).any())
    )
    nothing = "" if checks else "there is no finite floating-point number in the output to compare"
    return Verification(checks, nothing, no_reference)


def run_original(model: nn.Module, inputs: Inputs) -> Any:
    """The model's output, as by `run`; raises InputError where the model raises."""
    try:
        return run(model, inputs)
    except Exception as error:
        shapes = ", ".join(f"{list(x.shape)} {short(x.dtype)}" for x in inputs)
        raise InputError(
            f"the model does not take the input {shapes}: {type(error).__name__}: {error}"
        ) from error


def run(model: nn.Module, inputs: Inputs) -> Any:
    """The model's output without gradients; random numbers are the same in each run."""
    devices = {each.get_device() for each in inputs if each.is_cuda}
    with torch.no_grad(), torch.random.fork_rng(devices):
        torch.manual_seed(SEED)
        return model(*[each.clone() for each in inputs])


def short(dtype: torch.dtype) -> str:
    """A dtype's name without `torch.`."""
    return str(dtype).removeprefix("torch.")


def _leaves(output: Any) -> tuple[list[tuple[str, Any]], pytree.TreeSpec]:
    """All that a model returned, with the path to each, and the structure that held it."""
    plain = _without_dataclasses(output)
    leaves, spec = pytree.tree_flatten(plain)
    try:
        paths = [pytree.keystr(path) for path, _ in pytree.tree_leaves_with_path(plain)]
    except ValueError:  # a container that is registered without names for what it holds
        paths = [f"[{i}]" for i in range(len(leaves))]
    return [(f"output{path}", leaf) for path, leaf in zip(paths, leaves, strict=True)], spec


def _without_dataclasses(value: Any) -> Any:
    """Dataclasses as dictionaries; to pytree, one that nobody registered is a leaf."""

    def opened(leaf: Any) -> Any:
        if not dataclasses.is_dataclass(leaf) or isinstance(leaf, type):
            return leaf
        name = type(leaf).__qualname__
        fields = [each.name for each in dataclasses.fields(leaf)]
        return {f"{name}.{each}": _without_dataclasses(getattr(leaf, each)) for each in fields}

    return pytree.tree_map(opened, value)


def _mismatch(a: Any, b: Any) -> str:
    """What two values differ in that no rounding explains; empty where there is nothing."""
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        if not isinstance(a, _PLAIN):
            return f"is of type {type(a).__name__}, which can't be compared"
        same = type(a) is type(b) and (a == b or (a != a and b != b))  # NaN is not itself
        return "" if same else f"was {a!r} and became {b!r}"
    if a.layout != torch.strided or a.is_quantized or a.is_meta:
        return f"is a {a.layout} {short(a.dtype)} tensor on {a.device}, which can't be compared"
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        was, became = (f"{short(each.dtype)} {list(each.shape)}" for each in (a, b))
        return f"was {was} and became {became}"
    if not _is_inexact(a):
        wrong = int((a != b).sum())
        return f"differs in {wrong} of {a.numel()} elements" if wrong else ""
    odd_a, odd_b = (torch.where(torch.isfinite(x), 0, x) for x in (_real(a), _real(b)))
    same = torch.equal(odd_a.nan_to_num(nan=1), odd_b.nan_to_num(nan=1))
    return "" if same else "has NaN or infinities in other places"


def _reference(
    original: nn.Module, inputs: Inputs, expected: list[Any]
) -> tuple[list[Any] | None, str]:
    """The outputs of a float64 copy of the original, or why there are none."""
    tensors = (*original.parameters(), *original.buffers(), *inputs)
    if all(_wide_dtype(each.dtype) == each.dtype for each in tensors):
        return None, "the model is in float64 itself"
    try:
        model = copy.deepcopy(original)._apply(_wide)  # type: ignore[no-untyped-call]
        leaves = [leaf for _, leaf in _leaves(run(model, tuple(map(_wide, inputs))))[0]]
    except Exception as error:
        return None, f"the model raised {type(error).__name__} in it"
    if list(map(_float_shape, leaves)) != list(map(_float_shape, expected)):
        return None, "the model gives other shapes in it"
    if any(_is_inexact(each) and _wide(each) is not each for each in leaves):
        return None, "the model converts to another dtype by itself"
    return leaves, ""


def _check(
    name: str, a: torch.Tensor, b: torch.Tensor, reference: Any, coarsest: float
) -> TensorCheck:
    difference = _relative_error(a, b)
    if reference is None:
        limit = _TIMES_OWN_ERROR * max(coarsest, _usual(a))
        return TensorCheck(name, difference, None, None, limit)
    own = _relative_error(reference, a)
    limit = min(max(_TIMES_OWN_ERROR * own, _usual(a)), _NOISIEST)
    return TensorCheck(name, difference, own, _relative_error(reference, b), limit)


def _relative_error(reference: torch.Tensor, value: torch.Tensor) -> float:
    """`max|a - b| / max|a|` over what is finite in both, in float64."""
    both = torch.isfinite(reference) & torch.isfinite(value)
    if not both.any():
        return math.inf
    a, b = _wide(reference[both]), _wide(value[both])
    error, size = float((a - b).abs().max()), float(a.abs().max())
    return error / size if size else math.inf if error else 0.0


def _is_inexact(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())


def _usual(tensor: torch.Tensor) -> float:
    return _USUAL.get(tensor.dtype.to_real(), _NOISIEST) if _is_inexact(tensor) else 0.0


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(_wide_dtype(tensor.dtype))


def _wide_dtype(dtype: torch.dtype) -> torch.dtype:
    if dtype.is_complex:
        return torch.complex128
    return torch.float64 if dtype.is_floating_point else dtype


def _float_shape(value: Any) -> Any:
    return tuple(value.shape) if _is_inexact(value) else None


def _real(tensor: torch.Tensor) -> torch.Tensor:
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def _finite_or_none(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
