"""Verify that a rewritten model gives what its original gives, up to rounding."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import attrs
import torch
from torch import nn

from ..module_utils.nested import Container
from ..module_utils.running import SEED, Run, in_float64, run, run_original, widened
from .compare import TensorCheck, check, is_inexact, mismatch, pairs, relative_error, usual_error
from .inputs import random_inputs

Progress: TypeAlias = Callable[[str, int, int], None]
"""Told what is being done, as how many of how many steps; for a progress bar."""


@attrs.frozen
class Verification:
    """Whether a rewritten model gives what its original gives.

    `tensors` has the numbers for each tensor that was compared. `mismatch` says what no rounding
    can explain, and is empty otherwise; `no_reference` says why the original was not run in
    float64, and is empty where it was. `trial` is the trial that this is of, out of `trials`: the
    first that failed, or the one whose errors come closest to what is allowed.
    """

    tensors: tuple[TensorCheck, ...] = ()
    mismatch: str = ""
    no_reference: str = ""
    trial: int = 1
    trials: int = 1

    @property
    def verdict(self) -> Literal["same", "noisy", "different"]:
        """`same` up to rounding, `different`, or `noisy`.

        It is noisy where the two differ by more than rounding should explain, but either agree in
        float64, or the original itself is so far from float64 that nothing can be told.
        """
        failed = [each for each in self.tensors if not each.same]
        if not self.mismatch and not failed:
            return "same"
        noisy = not self.mismatch and all(each.is_noise for each in failed)
        return "noisy" if noisy else "different"

    @property
    def same(self) -> bool:
        """Whether all that the models give is the same up to rounding."""
        return self.verdict == "same"

    @property
    def worst(self) -> TensorCheck | None:
        """The tensor whose error comes closest to its limit, or exceeds it the most."""
        return max(self.tensors, key=lambda each: each.excess, default=None)

    @property
    def notes(self) -> tuple[str, ...]:
        """Differences that change no value: another memory format."""
        return tuple(f"{each.name} {each.note}" for each in self.tensors if each.note)

    def __str__(self) -> str:
        """The verdict's grounds in one line."""
        if self.mismatch or self.worst is None:
            return self.mismatch
        joint = " " if self.worst.mismatch else ": "
        name = f"{self.worst.name}{joint}" if len(self.tensors) > 1 or self.worst.mismatch else ""
        said = [f"{name}{self.worst}"]
        if self.no_reference:
            said.append(f"no float64 run, as {self.no_reference}")
        if self.verdict == "noisy":
            said.append(self._about_noise(self.worst))
        said += self.notes
        if self.trials > 1:
            said.append(f"trial {self.trial} of {self.trials}")
        return "; ".join(said)

    def to_dict(self) -> dict[str, Any]:
        """The verdict and all numbers as plain data; a number that is not finite becomes None."""
        data = attrs.asdict(self, value_serializer=lambda _, __, value: _finite_or_none(value))
        return {"same": self.same, "verdict": self.verdict, **data}

    @staticmethod
    def _about_noise(worst: TensorCheck) -> str:
        if worst.float64_difference is not None and worst.original_error is not None:
            return (
                f"in float64 the two models are {worst.float64_difference:.1e} apart, so the "
                f"rewrite may be right, but {worst.dtype} does not show it"
            )
        return f"{worst.dtype} is too coarse for this model to tell"


def verify(
    original: nn.Module,
    rewritten: nn.Module,
    inputs: Any,
    *,
    trials: int = 1,
    seed: int = SEED,
    rtol: float | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Run both models on the same inputs and compare all that they give, however nested.

    Compared are the output, what the forward writes in place to its inputs, and what it writes to
    buffers that both models have. Structure, shapes, dtypes, devices, the places of NaN and
    infinities, and all that is no floating-point number must be equal; another memory format is
    noted. For the rest, a copy of the original runs in float64 where it can: the rewritten model's
    error against that may be a few times the original's own, no more.

    >>> import copy
    >>> linear = nn.Linear(4, 2)
    >>> verify(linear, copy.deepcopy(linear), torch.ones(1, 4)).same
    True

    Args:
        original: the model, in eval mode unless it is to be compared in training mode; left as it
            is.
        rewritten: what has to give the same; left as it is.
        inputs: a tensor, a tuple or list of positional arguments, or a mapping of keyword
            arguments; tensors may be nested in them. They are left as they are.
        trials: how often to compare. From the second time on it is with `random_inputs` like these.
        seed: where these random inputs start from.
        rtol: the relative error to allow for floating-point tensors, as a fraction of the
            largest magnitude in the tensor; by default it follows from the dtype and the
            original's own error.
        progress: called with what is being done, how many steps are done, and of how many.

    Raises:
        InputError: the original raises on these inputs.
    """
    tell = progress or _silent
    found: list[Verification] = []
    for trial in range(1, max(trials, 1) + 1):
        tell("verifying", trial - 1, trials)
        result = attrs.evolve(
            _verify_once(original, rewritten, inputs_of_trial(inputs, trial, seed), rtol),
            trial=trial,
            trials=max(trials, 1),
        )
        if not result.same:
            return result
        found.append(result)
    tell("verifying", trials, trials)
    return max(found, key=lambda each: each.worst.excess if each.worst else 0.0)


def inputs_of_trial(inputs: Any, trial: int, seed: int = SEED) -> Any:
    """What a trial, counted from 1, is run on: the inputs themselves, and then random ones."""
    return inputs if trial == 1 else random_inputs(inputs, seed=seed + trial - 1)


def _verify_once(
    original: nn.Module, rewritten: nn.Module, inputs: Any, rtol: float | None
) -> Verification:
    expected = run_original(original, inputs)
    try:
        found = run(rewritten, inputs)
    except Exception as error:
        return Verification(mismatch=f"the rewritten model raised {type(error).__name__}: {error}")
    tensors = []
    for name, a, b in pairs(expected, found):
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
            tensors.append((name, a, b))
        elif difference := mismatch(a, b):
            return Verification(mismatch=f"{name} {difference}")
    reference, no_reference = _reference(original, inputs, expected)
    coarsest = max(
        (usual_error(each.dtype) for each in (*original.parameters(), *original.buffers())),
        default=0.0,
    )
    values = {} if reference is None else reference.values
    checks = [check(name, a, b, values.get(name), rtol, coarsest) for name, a, b in tensors]
    if all(each.is_empty and not each.mismatch for each in checks):
        nothing = "there is no tensor with finite numbers in the output to compare"
        return Verification(tuple(checks), nothing, no_reference)
    if reference is not None and any(not each.same and not each.mismatch for each in checks):
        exact = _run_in_float64(rewritten, inputs)
        checks = [_with_float64(each, reference, exact) for each in checks]
    return Verification(tuple(checks), "", no_reference)


def _with_float64(checked: TensorCheck, reference: Run, exact: Run | None) -> TensorCheck:
    a = reference.values.get(checked.name)
    b = None if exact is None else exact.values.get(checked.name)
    if not is_inexact(a) or not is_inexact(b) or a.shape != b.shape:
        return checked
    return attrs.evolve(checked, float64_difference=relative_error(a, b))


def _run_in_float64(model: nn.Module, inputs: Any) -> Run | None:
    try:
        wide = in_float64(model, inputs)
        return None if wide is None else run(*wide)
    except Exception:
        return None


def _reference(original: nn.Module, inputs: Any, expected: Run) -> tuple[Run | None, str]:
    """A run of a float64 copy of the original, or why there is none."""
    try:
        wide = in_float64(original, inputs)
        if wide is None:
            return None, "the model is in float64 itself"
        found = run(*wide)
    except Exception as error:
        return None, f"the model raised {type(error).__name__} in it"
    for name, a in expected.values.items():
        b = found.values.get(name)
        if isinstance(a, Container) or is_inexact(a):
            shapes = [tuple(each.shape) if is_inexact(each) else each for each in (a, b)]
            if shapes[0] != shapes[1]:
                return None, "the model gives other shapes in it"
            if is_inexact(b) and widened(b) is not b:
                return None, "the model converts to another dtype by itself"
    return found, ""


def _silent(what: str, done: int, total: int) -> None:
    pass


def _finite_or_none(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
