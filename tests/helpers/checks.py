"""What the tests ask of any model: its outputs, all its state, how far two models differ."""

from __future__ import annotations

import copy
import math
import sys
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

import nets
import torch
from torch import fx, nn

import fxrewrite as fxr
from fxrewrite.testing import Record
from fxrewrite.verification.compare import check


def outputs(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """What the model returns; the input is copied, since a forward may write to it."""
    torch.manual_seed(0)  # for dropout in training mode
    with torch.no_grad():
        made = model(x.clone())
    return [made] if isinstance(made, torch.Tensor) else list(made)


def largest_error(expected: list[torch.Tensor], found: list[torch.Tensor]) -> float:
    """The largest error of any tensor, each relative to its own largest magnitude.

    It is infinite where two tensors differ in more than their finite numbers: in shape, dtype,
    or in the places of NaN and infinities.
    """
    pairs = zip(expected, found, strict=True)
    checked = [check("", a, b, None, 0.0, 0.0) for a, b in pairs]
    return max(math.inf if each.mismatch else each.difference for each in checked)


def difference(model: nn.Module, other: nn.Module, *inputs: torch.Tensor) -> float:
    """How far what another model gives is from what this one gives, as `largest_error` has it."""
    with torch.no_grad():
        expected, found = (each(*(x.clone() for x in inputs)) for each in (model, other))
    if isinstance(expected, torch.Tensor):
        expected, found = [expected], [found]
    return largest_error(list(expected), list(found))


def rewritten(
    model: nn.Module, rules: Any, *inputs: torch.Tensor, **options: Any
) -> tuple[Any, fxr.Report]:
    """`rewrite` of a model in float64: it is untouched, and the result equals it to 1e-9."""
    before = Record(model.double())
    made, report = fxr.rewrite(model, rules, **options)
    before.assert_unchanged()
    assert difference(model, made, *inputs) <= 1e-9
    return made, report


def norms(model: nn.Module) -> list[str]:
    """The names of the batch norms that a model has, in alphabetical order."""
    kind = nn.modules.batchnorm._BatchNorm
    return sorted(name for name, each in model.named_modules() if isinstance(each, kind))


def folded(model: nn.Module, x: torch.Tensor, applied: int) -> tuple[fx.GraphModule, fxr.Report]:
    """`rewrite` with conv_bn, held to what holds for every model.

    The result equals the model to 1e-9 in float64, the model is untouched, all batch norms are
    counted, and a second rewrite finds nothing left to do.
    """
    model, x = model.double(), x.double()
    expected = outputs(copy.deepcopy(model), x)
    before = Record(model)
    fused, report = fxr.rewrite(model, "conv_bn")
    before.assert_unchanged()
    assert len(report.applied) == applied, report
    assert largest_error(expected, outputs(fused, x)) <= 1e-9
    assert not fxr.plan(fused, "conv_bn").applied
    return fused, report


def executed(count: int) -> int:
    """How many bytecodes of this package it takes to fold that many blocks."""
    model, folder, opcodes = nets.chain_of_blocks(count), str(Path(fxr.__file__).parent), 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal opcodes
        if not frame.f_code.co_filename.startswith(folder):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        opcodes += event == "opcode"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        fxr.rewrite(model, "conv_bn", expect={"conv_bn": count})
    finally:
        sys.settrace(before)
    return opcodes


def calls_of_batch_norms(model: nn.Module, x: torch.Tensor) -> Counter[int]:
    """How often each batch norm is called, outside of containers that a hook keeps whole."""
    counted, inside = copy.deepcopy(model), []
    ids = {id(c): id(m) for c, m in zip(counted.modules(), model.modules(), strict=True)}
    calls: Counter[int] = Counter({id(m): 0 for m in model.modules() if is_batch_norm(m)})

    def enter(module: nn.Module, args: Any) -> None:
        if is_batch_norm(module) and not inside:
            calls[ids[id(module)]] += 1
        inside.extend([module] if hooked[id(module)] else [])

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        del inside[len(inside) - hooked[id(module)] :]

    hooked = {id(m): m is not counted and has_hook(m) for m in counted.modules()}
    for module in counted.modules():
        module.register_forward_pre_hook(enter, prepend=True)
        module.register_forward_hook(leave)
    outputs(counted, x)
    return calls


def is_batch_norm(module: nn.Module) -> bool:
    return isinstance(module, nets.ANY_BATCH_NORM)


def has_hook(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)
