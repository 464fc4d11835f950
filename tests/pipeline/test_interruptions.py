"""Ctrl-C and other threads: whenever they come, no model is left half changed."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import checks
import nets
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nets import Forward, X, bn, conv
from torch import nn

import fxrewrite as fxr

OURS = str(Path(fxr.__file__).parent)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.act = conv(), bn(), nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.bn(self.conv(x) + torch.tensor(0.0)))


class Writing(Model):
    """What its forward writes, tracing has to put back."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.latest = x
        return super().forward(x)


@fxr.rule(pattern=fxr.chain(act=nn.ReLU))
def clumsy(m: Any) -> fxr.Replace:
    """Writes to what it is given, so that there is something to put back."""
    m.act.inplace = True
    raise ZeroDivisionError


def interrupted(after: int, call: Any) -> bool:
    """Make a call that Ctrl-C hits at a line of this package; whether it came so far."""
    return interrupted_in("", after, call)


def interrupted_in(file: str, after: int, call: Any) -> bool:
    """As `interrupted`, at a line of that file."""
    lines = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal lines
        path = frame.f_code.co_filename
        if not path.startswith(OURS) or not path.endswith(file):
            return None
        callers = frame, frame.f_back
        if any(each is not None and each.f_code.co_name == "__del__" for each in callers):
            return None  # where Python lets nothing be raised
        lines += event == "line"
        if lines == after:
            raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


def rewrite(model: nn.Module) -> None:
    with pytest.raises((fxr.errors.RuleError, fxr.errors.TraceError)):
        fxr.rewrite(model, ["conv_bn", clumsy], X.float(), into="graph")


@pytest.mark.slow
@given(st.integers(1, 6500), st.sampled_from([Model, Writing]))
def test_ctrl_c_at_any_line_leaves_the_model_as_it_was(after: int, kind: Any) -> None:
    """Wherever in this package it comes, the model is the same, and the next rewrite works."""
    model = nets.randomise(kind())
    before = checks.Record(model)
    interrupted(after, lambda: rewrite(model))
    before.assert_unchanged(versions=False)


def test_ctrl_c_at_any_line_of_the_tracer_does_not_shut_out_other_threads() -> None:
    """Also where it comes just before the block is left in which no other thread may trace."""
    model, done = nets.randomise(Model()), threading.Event()

    def trace() -> None:
        fxr.plan(model, "conv_bn")
        done.set()

    after, at = 0, 1
    while interrupted_in("tracer.py", at, lambda: fxr.plan(model, "conv_bn")):
        at += 1
        after += 1
    threading.Thread(target=trace, daemon=True).start()
    assert done.wait(60)
    assert after > 50


def test_ctrl_c_is_tried_until_the_end_of_a_rewrite() -> None:
    """The lines that the test above interrupts are about all that there are."""
    assert interrupted(1500, lambda: rewrite(nets.randomise(Model())))
    assert not interrupted(6500, lambda: rewrite(nets.randomise(Model())))


@pytest.fixture
def _impatient_threads() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("_impatient_threads")
def test_a_model_may_run_in_another_thread_meanwhile() -> None:
    """FX patches all modules while it traces; another thread does not notice."""
    blocks = [layer for _ in range(8) for layer in (conv(), bn())]
    model = nets.randomise(nn.Sequential(*blocks)).double()
    (expected,) = checks.outputs(model, X)
    traced, wrong, runs = threading.Event(), [], 0

    def run() -> None:
        nonlocal runs
        try:
            while not traced.is_set():
                with torch.no_grad():
                    assert torch.equal(model(X), expected)
                runs += 1
        except BaseException as error:
            wrong.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    while runs < 3 and not wrong:  # so that it runs by the time of the first trace
        pass
    for _ in range(5):
        fxr.rewrite(model, "conv_bn", X, expect={"conv_bn": 8})
    traced.set()
    thread.join()
    assert not wrong
    assert runs > 3


@pytest.mark.usefixtures("_impatient_threads")
def test_one_model_may_be_rewritten_by_many_threads_at_once() -> None:
    """Each of them gets the same result, and the model stays as it was."""
    model = nets.randomise(nn.Sequential(conv(), bn())).double()
    before = checks.Record(model)
    found: list[Any] = []

    def fold() -> None:
        try:
            found.append(fxr.rewrite(model, "conv_bn", X))
        except BaseException as error:
            found.append(error)

    threads = [threading.Thread(target=fold) for _ in range(6)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    before.assert_unchanged(versions=False)
    assert len({report.to_json() for _, report in found}) == 1
    (expected,) = checks.outputs(model, X)
    for fused, _ in found:
        assert checks.largest_error([expected], checks.outputs(fused, X)) <= 1e-9


def test_an_error_of_one_thread_is_not_one_of_another() -> None:
    """While one thread's model can't be traced, the other's can."""
    bad = Forward(lambda m, x: x if x.sum() > 0 else -x, conv=conv())
    good = nets.randomise(nn.Sequential(conv(), bn()))
    errors: list[BaseException] = []

    def trace_bad() -> None:
        for _ in range(10):
            with pytest.raises(fxr.errors.TraceError):
                fxr.rewrite(bad, "conv_bn", into="graph")

    def trace_good() -> None:
        try:
            for _ in range(10):
                fxr.rewrite(good, "conv_bn", expect={"conv_bn": 1})
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=each) for each in (trace_bad, trace_good)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert not errors
