"""Rewrite one model of a sweep and compare it with its original."""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable
from typing import Any

import attrs
import torch
from torch import nn

from ..api import rewrite
from ..errors import InputError, LoadError, TraceError
from ..module_utils.nested import mapped
from ..module_utils.running import run, short, widened
from ..pipeline.rewriting import Into
from ..rules.registry import RuleSet, get_rule_set
from ..verification.verify import Verification, verify
from .randomising import BatchNorm, randomise_batch_norms, randomise_constants
from .sweep_models import Subject, build, inputs_to_try
from .sweep_row import Row, accounted

_LONGEST = 400


@attrs.frozen
class Settings:
    """What a sweep does with each of its models."""

    rules: tuple[str, ...] = ("conv_bn",)
    into: Into | None = None
    max_parameters: int | None = None
    threads: int = 1

    def key(self, model: str) -> tuple[str, str, str]:
        """The key of a model's row."""
        return model, ",".join(self.rules), self.into or ""


def examine(subject: Subject, settings: Settings, tell: Callable[[str], Any]) -> Row:
    """Rewrite and verify a model; whatever goes wrong is told by the row.

    >>> row = examine(Subject("torch.nn:Identity", ("1,3",)), Settings(), print)
    being built
    being run
    being rewritten
    being verified
    >>> row.outcome
    'same'

    Args:
        subject: the model.
        settings: what to do with it.
        tell: is called with the name of each stage that begins, to know where a process died.
    """
    start = time.perf_counter()
    found: dict[str, Any] = dict(zip(Row.KEY, settings.key(subject.name), strict=True))
    try:
        _examine(subject, settings, tell, found)
    except TraceError as error:
        found |= {"outcome": "not traceable", "detail": _said(error)}
    except Exception as error:
        found |= {"outcome": "raised", "detail": _said(error)}
    return Row(**found, seconds=round(time.perf_counter() - start, 2))


def _examine(
    subject: Subject, settings: Settings, tell: Callable[[str], Any], found: dict[str, Any]
) -> None:
    tell("being built")
    most = settings.max_parameters
    if most is not None and subject.collection:
        # Not all models can be built without numbers; those are built, and counted, as they are.
        with contextlib.suppress(LoadError), torch.device("meta"):
            found["parameters"] = _count(build(subject))
    if most is None or found.get("parameters", 0) <= most:
        model = build(subject)
        found["parameters"] = _count(model)
        found["batch_norms"] = sum(isinstance(each, BatchNorm) for each in model.modules())
    if most is not None and found["parameters"] > most:
        found |= {"outcome": "left alone", "detail": f"it has more than {most:,} parameters"}
        return
    rule_sets = [get_rule_set(name) for name in settings.rules]
    randomise_constants(model)
    tell("being run")
    inputs = _first_taken(model, subject)
    found["inputs"] = " ".join(map(_described, inputs))
    if found["batch_norms"]:
        randomise_batch_norms(model, inputs)
    tell("being rewritten")
    before = time.perf_counter()
    rewritten, report = rewrite(model, rule_sets, inputs, into=settings.into)
    found["rewrite_seconds"] = round(time.perf_counter() - before, 3)
    found |= {"into": report.into, **accounted(report)}
    tell("being verified")
    verification = verify(model, rewritten, inputs)
    found |= _verified(verification)
    if not verification.same:
        tell("being verified in float64")
        found |= _in_float64(model, rule_sets, settings.into, inputs, str(verification))


def _first_taken(model: nn.Module, subject: Subject) -> tuple[Any, ...]:
    """The first inputs that the model takes, its output being a number all through."""
    error: Exception = InputError("there is no input to try")
    for inputs in inputs_to_try(subject, model):
        try:
            run(model, inputs)
        except Exception as raised:
            error = raised
        else:
            return inputs
    raise InputError(f"the model takes none of the inputs tried: {_said(error)}") from error


def _in_float64(
    model: nn.Module,
    rule_sets: list[RuleSet],
    into: Into | None,
    inputs: tuple[Any, ...],
    before: str,
) -> dict[str, Any]:
    """Whether a difference in float32 is one in float64, too, where rounding hardly shows."""
    wide = copy.deepcopy(model).double()
    wide_inputs = mapped(widened, inputs)
    try:
        rewritten = rewrite(wide, rule_sets, wide_inputs, into=into)[0]
        verification = verify(wide, rewritten, wide_inputs)
    except InputError as error:
        return {"outcome": "differs", "detail": f"{before}; in float64 {_said(error)}"}
    detail = f"{before}; in float64: {verification}"
    return {"outcome": "same" if verification.same else "differs", "detail": detail}


def _verified(verification: Verification) -> dict[str, Any]:
    worst = verification.worst
    data: dict[str, Any] = {"outcome": "same" if verification.same else "differs"}
    if not verification.same:
        data["detail"] = str(verification)
    if worst is not None:
        for name in ("difference", "original_error", "rewritten_error"):
            data[name] = getattr(worst, name)
    return data


def _count(model: nn.Module) -> int:
    return sum(each.numel() for each in model.parameters() if not nn.parameter.is_lazy(each))


def _described(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{','.join(map(str, value.shape))}:{short(value.dtype)}"
    return f"[{' '.join(map(_described, value))}]"


def _said(error: BaseException) -> str:
    said = " ".join(f"{type(error).__name__}: {error}".split())
    return said if len(said) <= _LONGEST else f"{said[:_LONGEST]} ..."
