"""The verdict on a rewritten model can be trusted: no error is missed, no rounding is blamed."""

from __future__ import annotations

import collections
import copy
import dataclasses
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import nets
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils import _pytree as pytree

import fxrewrite as fxr
from fxrewrite import verify
from fxrewrite.cli.timing import time_in_turns
from fxrewrite.errors import InputError
from fxrewrite.module_utils.running import run


class _Gives(nn.Module):
    """A model that gives what a function makes of its input."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.function(*inputs)


@dataclasses.dataclass
class _Boxes:
    boxes: Any
    count: int


_X = torch.tensor([[1.1, -2.3], [3.7, 0.6]])
_NAN, _INF = float("nan"), float("inf")


def _verdict(original: Callable[..., Any], rewritten: Callable[..., Any]) -> Any:
    return verify(_Gives(original), _Gives(rewritten), (_X,))


@pytest.mark.parametrize(
    ("original", "rewritten", "reason"),
    [
        (lambda x: x, lambda x: x[:1], "was float32 [2, 2] and became float32 [1, 2]"),
        (lambda x: x, lambda x: x.half(), "was float32 [2, 2] and became float16 [2, 2]"),
        (lambda x: (x, x), lambda x: [x, x], "output was a tuple with [0], [1] and became a list"),
        (lambda x: {"a": x}, lambda x: {"b": x}, "output was a dict with ['a'] and became a dict"),
        (lambda x: (x, 3), lambda x: (x, 4), "output[1] was 3 and became 4"),
        (lambda x: (x, 1), lambda x: (x, True), "output[1] was 1 and became True"),
        (lambda x: (x, object()), lambda x: (x, object()), "is of type object, which can't"),
        (lambda x: (x, x.to_sparse()), lambda x: (x, x * 1.1), "became float32 [2, 2]"),
        (lambda x: (x, x > 0), lambda x: (x, x > 2), "output[1] differs in 2 of 4 elements"),
        (lambda x: _Boxes(x, 1), lambda x: _Boxes(x, 2), "output.count was 1 and became 2"),
        (lambda x: x.where(x > 0, _NAN), lambda x: x.where(x > 2, _NAN), "in other places"),
        (lambda x: x.where(x > 0, _INF), lambda x: x.where(x > 0, -_INF), "in other places"),
        (lambda x: x.where(x > 0, _INF), lambda x: x.where(x > 0, _NAN), "in other places"),
        (lambda x: x * _NAN, lambda x: x * _NAN, "no tensor with finite numbers"),
        (lambda x: 3, lambda x: 3, "no tensor with finite numbers"),
        (lambda x: x, lambda x: x @ x[0, 0], "the rewritten model raised RuntimeError"),
    ],
)
def test_what_no_rounding_explains(
    original: Callable[..., Any], rewritten: Callable[..., Any], reason: str
) -> None:
    """Another structure, shape, dtype, integer, or place of a NaN is a mismatch, and is named."""
    verdict = _verdict(original, rewritten)
    assert not verdict.same
    assert reason in str(verdict)


_NESTED = st.recursive(
    st.just("leaf"),
    lambda inner: (
        st.lists(inner, min_size=1, max_size=3)
        | st.lists(inner, min_size=1, max_size=3).map(tuple)
        | st.dictionaries(st.text("ab", min_size=1), inner, min_size=1, max_size=3)
        | inner.map(lambda value: _Boxes(value, 1))
    ),
    max_leaves=6,
)


def _filled(shape: Any, scales: list[float], x: torch.Tensor) -> Any:
    if isinstance(shape, str):
        return x * scales.pop(0)
    if isinstance(shape, dict):
        return {name: _filled(inner, scales, x) for name, inner in shape.items()}
    if isinstance(shape, _Boxes):
        return _Boxes(_filled(shape.boxes, scales, x), shape.count)
    return type(shape)(_filled(inner, scales, x) for inner in shape)


@given(shape=_NESTED, data=st.data())
def test_an_error_in_any_tensor_of_a_nested_output_is_found(shape: Any, data: Any) -> None:
    """However outputs are nested, equal ones pass, and one tensor that is off by 1e-4 does not."""
    count = repr(shape).count("'leaf'")
    wrong = data.draw(st.integers(0, count - 1))
    scales = [1.0 + 1e-4 * (i == wrong) for i in range(count)]

    def original(x: torch.Tensor) -> Any:
        return _filled(shape, [1.0] * count, x)

    assert _verdict(original, original).same
    verdict = _verdict(original, lambda x: _filled(shape, list(scales), x))
    assert [check.same for check in verdict.tensors] == [i != wrong for i in range(count)]
    assert not verdict.same


class _Box:
    """A container that pytree knows, without names for what it holds."""

    def __init__(self, content: Any) -> None:
        self.content = content


pytree.register_pytree_node(_Box, lambda box: ([box.content], None), lambda x, _: _Box(x[0]))


def test_a_container_without_names_is_compared_by_position() -> None:
    """A registered container that can't name what it holds is compared all the same."""
    verdict = _verdict(lambda x: (x, _Box(x)), lambda x: (x, _Box(x * 1.01)))
    assert [(check.name, check.same) for check in verdict.tensors] == [
        ("output[0]", True),
        ("output[1][0]", False),
    ]


def test_noise_is_told_from_error() -> None:
    """A difference passes where the original's own rounding is as large, and only there."""

    def noisy(x: torch.Tensor) -> torch.Tensor:
        return x + 1e4 - 1e4

    def rounds_otherwise(x: torch.Tensor) -> torch.Tensor:
        return x + 3e4 - 3e4

    verdict = _verdict(noisy, rounds_otherwise)
    assert verdict.same
    assert verdict.worst.difference > 1e-4
    assert verdict.worst.original_error > 1e-5
    assert not _verdict(lambda x: x.clone(), rounds_otherwise).same
    assert not _verdict(noisy, lambda x: x * 1.01).same


def test_a_float64_model_is_compared_directly() -> None:
    """In float64 there is nothing more exact to compare with, and 1e-9 is too much."""
    x = _X.double()
    assert verify(_Gives(lambda x: x), _Gives(lambda x: x + 1e-15), (x,)).same
    verdict = verify(_Gives(lambda x: x), _Gives(lambda x: x + 1e-9 * x), (x,))
    assert not verdict.same
    assert "float64 itself" in str(verdict)


def test_a_model_that_cannot_run_in_float64_is_compared_directly() -> None:
    """A model with a float32 of its own is verified without a reference, and that is said."""
    constant = torch.eye(2)
    same, wrong = (
        _verdict(lambda x: x @ constant, lambda x, by=by: x @ constant * by) for by in (1, 1.001)
    )
    assert (same.same, wrong.same) == (True, False)
    assert same.worst.original_error is None
    assert "no float64 run, as the model raised RuntimeError in it" in str(same)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_a_right_fold_passes_and_a_wrong_one_fails_in_each_dtype(dtype: torch.dtype) -> None:
    """In each dtype the folded model is the same, and one whose bias is half too large is not."""
    x = torch.randn(2, 3, 8, 8, dtype=dtype)
    original = nets.randomise(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))).to(dtype)
    fused = fxr.fuse(original)
    assert verify(original, fused, (x,)).same
    with torch.no_grad():
        fused.get_parameter("0.bias").mul_(1.5)
    assert not verify(original, fused, (x,)).same


def test_random_numbers_in_a_forward_are_the_same_in_each_run() -> None:
    """A model that draws random numbers gets the same draws, and the caller's go on as before."""
    draws = _Gives(lambda x: x + torch.rand(2))
    before = torch.get_rng_state()
    assert verify(draws, copy.deepcopy(draws), (_X,)).same
    first = run(draws, _X).output
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(run(draws, _X).output, first)


def test_overflow_that_both_share_is_no_difference() -> None:
    """Where both overflow in half precision, and float64 does not, the rest is compared."""
    x = _X.half()
    overflows = _Gives(lambda x: x * 3e4)
    assert torch.isinf(run(overflows, (x,)).output).any()
    assert verify(overflows, copy.deepcopy(overflows), (x,)).same
    assert not verify(overflows, _Gives(lambda x: x * 2.9e4 * (1 + 9 * (x > 3))), (x,)).same


def test_verifying_and_timing_leave_inputs_and_model_alone() -> None:
    """A model that writes to its input neither changes ours nor sees its own changes again."""
    x = _X.clone()
    doubles = _Gives(lambda x: x.mul_(2))
    linear = nn.Linear(2, 2)
    before = linear.weight.clone()
    assert verify(doubles, copy.deepcopy(doubles), (x,)).same
    assert verify(linear, copy.deepcopy(linear), (x,)).same
    time_in_turns(doubles, doubles, (x,), seconds=0)
    assert torch.equal(x, _X)
    assert linear.weight.dtype == torch.float32
    assert torch.equal(linear.weight, before)


def test_an_input_that_the_original_refuses_is_an_error() -> None:
    """Where the original itself raises there is nothing to verify."""
    with pytest.raises(InputError, match=r"\[1, 3\] float32: RuntimeError"):
        verify(nn.Linear(2, 2), nn.Linear(2, 2), (torch.ones(1, 3),))


class ModelOutput(collections.OrderedDict[str, Any]):
    """As Hugging Face's: a dataclass that is also a dictionary of those fields that are given."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            if getattr(self, field.name) is not None:
                self[field.name] = getattr(self, field.name)


@dataclasses.dataclass
class Logits(ModelOutput):
    logits: Any = None
    hidden: Any = None


Pair = collections.namedtuple("Pair", "first second")


@pytest.mark.parametrize(
    ("wrap", "name"),
    [
        (lambda x: Logits(logits=x), "output.logits"),
        (lambda x: Logits(hidden=(x,)), "output.hidden[0]"),
        (lambda x: Pair(0, {"a": x}), "output.second['a']"),
        (lambda x: _Boxes([x], 3), "output.boxes[0]"),
        (lambda x: collections.deque([x]), "output[0]"),
        (lambda x: torch.nn.utils.rnn.PackedSequence(x, torch.tensor([2])), "output.data"),
        (lambda x: (x.to_sparse(),), "output[0]"),
        (lambda x: torch.return_types.max((x, x > 0)), "output[0]"),
    ],
)
def test_outputs_of_all_kinds_are_looked_into(wrap: Callable[..., Any], name: str) -> None:
    """A wrong tensor is found and named in whatever a model may return."""
    assert _verdict(wrap, wrap).same
    verdict = _verdict(wrap, lambda x: wrap(x * 1.01))
    assert [check.name.partition("[0]")[0] for check in verdict.tensors if not check.same] == [
        name.partition("[0]")[0]
    ]
    assert not verdict.same


def test_an_output_that_lost_its_class_is_another_output() -> None:
    """A dictionary in place of a model output has no attributes, so it is not the same."""
    verdict = _verdict(lambda x: Logits(logits=x), lambda x: {"logits": x})
    assert not verdict.same
    assert "output was a Logits with .logits, .hidden and became a dict" in str(verdict)


def test_writes_to_inputs_are_compared() -> None:
    """A model that writes to its input must be rewritten to one that writes the same."""
    doubles = _Gives(lambda x: (x.mul_(2), x.sum())[1])
    verdict = verify(doubles, _Gives(lambda x: x.mul(2).sum()), _X)
    assert not verdict.same
    assert [each.name for each in verdict.tensors if not each.same] == ["input"]
    assert verify(doubles, _Gives(lambda x: (x.add_(x), x.sum())[1]), _X).same
    appends = _Gives(lambda x: (x.append(x[0]), x[0])[1])
    verdict = verify(appends, _Gives(lambda x: x[0]), ([_X],))
    assert "input[0] was a list with [0], [1] and became a list with [0]" in str(verdict)


class _Counts(nn.Module):
    def __init__(self, by: float) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(1))
        self.by = by

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += self.by
        return x + self.seen - self.by


def test_writes_to_buffers_are_compared_and_put_back() -> None:
    """Models that count in a buffer, even one that they share, start from the same count."""
    original, rewritten, wrong = _Counts(1.0), _Counts(1.0), _Counts(2.0)
    rewritten.seen = wrong.seen = original.seen
    assert verify(original, rewritten, _X, trials=3).same
    verdict = verify(original, wrong, _X)
    assert [each.name for each in verdict.tensors if not each.same] == ["buffer seen"]
    assert float(original.seen) == 0.0


def test_a_model_in_training_mode_keeps_its_statistics() -> None:
    """Statistics that a forward updates are compared, and are afterwards as before."""
    bn = nn.BatchNorm1d(2).train()
    other = copy.deepcopy(bn)
    assert verify(bn, other, _X).same
    other.momentum = 0.5
    verdict = verify(bn, other, _X)
    wrong = [each.name for each in verdict.tensors if not each.same]
    assert wrong == ["buffer running_mean", "buffer running_var"]
    assert not bn.running_mean.any()


def test_another_memory_format_is_noted() -> None:
    """Strides change no value, so they are no difference; but they are reported."""
    x = torch.randn(2, 3, 4, 4)
    channels_last = _Gives(lambda x: x.to(memory_format=torch.channels_last))
    verdict = verify(_Gives(lambda x: x), channels_last, x)
    assert verdict.same
    assert verdict.notes == ("output was contiguous and became channels_last",)
    assert verdict.notes[0] in str(verdict)
    assert verify(channels_last, channels_last, x).notes == ()
    transposed = verify(_Gives(lambda x: x.mT.contiguous()), _Gives(lambda x: x.mT), x)
    assert transposed.notes == ("output was contiguous and became of strides [48, 16, 1, 4]",)


def test_per_tensor_there_are_errors_dtype_shape_and_place() -> None:
    """The report of a tensor says how far it is off, absolutely and relatively, and where."""

    def off(x: torch.Tensor) -> torch.Tensor:
        return x + 0.5 * (x == 3.7)

    check = _verdict(lambda x: x, off).worst
    assert (check.dtype, check.shape, check.at) == ("float32", (2, 2), (1, 0))
    assert check.absolute == pytest.approx(0.5)
    assert check.difference == pytest.approx(0.5 / 3.7)
    assert check.original_error == 0.0
    assert check.rewritten_error == pytest.approx(0.5 / 3.7)
    assert "largest at [1, 0]" in str(check)
    nan = _verdict(lambda x: x, lambda x: x.where(x < 3, _NAN)).worst
    assert "1 of 4, first at [1, 0], where 3.7 became nan" in str(nan)


def test_noise_and_error_have_different_verdicts() -> None:
    """Where both agree in float64, or float32 tells nothing, the verdict is not `different`."""

    def rounds_otherwise(x: torch.Tensor) -> torch.Tensor:
        return x + 3e4 - 3e4

    noisy = _verdict(lambda x: x.clone(), rounds_otherwise)
    assert (noisy.verdict, noisy.same) == ("noisy", False)
    assert "in float64 the two models are" in str(noisy)
    hopeless = _verdict(lambda x: x + 1e9 - 1e9, lambda x: x.float() + 3e9 - 3e9)
    assert hopeless.verdict == "noisy"
    assert hopeless.worst.float64_difference > 0.1
    wrong = _verdict(lambda x: x.clone(), lambda x: rounds_otherwise(x) * 1.01)
    assert wrong.verdict == "different"
    for error, rtol in ((2.2e-6, None), (1.9e-6, 1e-6)):
        models = _Gives(lambda x: x.clone()), _Gives(lambda x, error=error: x * (1 + error))
        assert verify(*models, _X, rtol=rtol).verdict == "different"


def test_later_trials_draw_other_inputs() -> None:
    """An error that the given input does not show is found by random ones, from a seed."""
    wrong = _Gives(lambda x: x.where(x > -2.4, 0.0))
    assert verify(_Gives(lambda x: x), wrong, _X).same
    verdict = verify(_Gives(lambda x: x), wrong, _X, trials=50)
    assert not verdict.same
    assert 1 < verdict.trial <= verdict.trials == 50
    assert verdict == verify(_Gives(lambda x: x), wrong, _X, trials=50)
    right = verify(_Gives(lambda x: x), _Gives(lambda x: x * 1), _X, trials=3)
    assert (right.same, right.trials) == (True, 3)


def test_the_allowed_error_can_be_given() -> None:
    """With `rtol` that is what is allowed, in place of what dtype and reference suggest."""
    models = _Gives(lambda x: x.clone()), _Gives(lambda x: x * 1.001)
    assert verify(*models, _X, rtol=1e-2).same
    assert not verify(*models, _X, rtol=1e-4).same
    assert not verify(*models, _X).same


@pytest.mark.slow
def test_rewriting_imports_nothing_that_takes_long() -> None:
    """What is there beside torch costs little, until example inputs need torch's fake tensors."""
    code = (
        "import sys, torch, fxrewrite as fxr\n"
        "fxr.rewrite(torch.nn.ReLU(), ['inference', 'reparam'])\n"
        "assert 'sympy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
def test_verifying_needs_no_command_line_packages() -> None:
    """The public functions import nothing that only the command line needs, or that is slow to."""
    code = (
        "import sys, torch, fxrewrite as fxr\n"
        "inputs = fxr.verification.random_inputs((2, 3))\n"
        "fxr.Rewriter('conv_bn').localise(torch.nn.ReLU(), inputs)\n"
        "assert not {'typer', 'rich', 'safetensors', 'hypothesis'} & {*sys.modules}\n"
        "assert not {'torch._inductor', 'torch._dynamo', 'torchvision', 'timm'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
