"""Run a model such that nothing is left of the run but what it gave, if need be in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import attrs
import torch
from torch import nn

from ..errors import InputError
from .nested import Container, flatten, mapped
from .state import Snapshot

SEED = 0


@attrs.frozen(eq=False)
class Run:
    """What a run gave: its output, and by name all that is to be seen of its effects.

    `values` has what is in the output, the inputs as the forward left them, and the model's
    buffers; `untouched` names the inputs and buffers among them that are as they were before.
    """

    output: Any
    values: dict[str, Any]
    untouched: frozenset[str]


def run(model: nn.Module, inputs: Any) -> Run:
    """Run a model without gradients; its random numbers are the same in each run.

    >>> run(nn.ReLU(), torch.tensor([-1.0, 2.0])).output
    tensor([0., 2.])

    Args:
        model: the model; what its forward changes in it is put back.
        inputs: a tensor, a tuple or list of positional arguments, or a mapping of keyword
            arguments. The forward gets a copy.
    """
    given = cloned(inputs)
    before = {**dict(flatten(cloned(given), "input")), **_buffers(model)}
    state = Snapshot({"": model}, skipped=("_parameters",))
    with state, state:  # Ctrl-C may come while the inner one is putting things back
        output = called(model, given)
        after = {**dict(flatten(given, "input")), **_buffers(model)}
        state.restore()
    untouched = (name for name, each in before.items() if _identical(each, after.get(name)))
    return Run(output, {**dict(flatten(output, "output")), **after}, frozenset(untouched))


def called(model: nn.Module, inputs: Any) -> Any:
    """The model's output for inputs that it may write to, without gradients, from a fixed seed."""
    args, kwargs = arguments_of(inputs)
    cuda = {each.get_device() for each in _tensors(inputs) if each.is_cuda}
    with torch.no_grad(), torch.random.fork_rng(cuda):
        torch.manual_seed(SEED)
        return model(*args, **kwargs)


def run_original(model: nn.Module, inputs: Any) -> Run:
    """As `run`; raises InputError where the model raises."""
    try:
        return run(model, inputs)
    except Exception as error:
        given = ", ".join(f"{list(each.shape)} {short(each.dtype)}" for each in _tensors(inputs))
        raise InputError(
            f"the model does not take the input {given}: {type(error).__name__}: {error}"
        ) from error


def in_float64(model: nn.Module, inputs: Any) -> tuple[nn.Module, Any] | None:
    """A copy of model and inputs in float64 and complex128; None where they are in it already.

    Whatever copying and converting a model raises is raised.
    """
    tensors = (*model.parameters(), *model.buffers(), *_tensors(inputs))
    if all(_wide_dtype(each.dtype) == each.dtype for each in tensors):
        return None
    wide = copy.deepcopy(model).double()
    for each in (*wide.parameters(), *wide.buffers()):
        each.data = widened(each.data)  # complex ones, which double() leaves
    return wide, _each_once(widened, inputs)


def widened(value: Any) -> Any:
    """A floating-point tensor in float64, a complex one in complex128, any other value as it is."""
    if not isinstance(value, torch.Tensor):
        return value
    dtype = _wide_dtype(value.dtype)
    return value if dtype == value.dtype else value.to(dtype)


def cloned(inputs: Any) -> Any:
    """The inputs with each tensor cloned."""
    return _each_once(lambda tensor: tensor.detach().clone(), inputs)


def arguments_of(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a caller gives as a model's inputs, as positional and as keyword arguments."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)), {}


def short(dtype: torch.dtype) -> str:
    """A dtype's name without `torch.`."""
    return str(dtype).removeprefix("torch.")


def _each_once(function: Callable[[torch.Tensor], torch.Tensor], inputs: Any) -> Any:
    """The inputs with other tensors; one that is given twice is one tensor again."""
    known: dict[int, torch.Tensor] = {}

    def replaced(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if id(value) not in known:
            known[id(value)] = function(value)
        return known[id(value)]

    return mapped(replaced, inputs)


def _buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    return {f"buffer {name}": each.detach().clone() for name, each in model.named_buffers()}


def _tensors(inputs: Any) -> list[torch.Tensor]:
    return [each for _, each in flatten(inputs, "") if isinstance(each, torch.Tensor)]


def _identical(a: Any, b: Any) -> bool:
    """Whether nobody wrote to a value; of what is no strided tensor, only containers can tell."""
    if isinstance(a, Container) or isinstance(b, Container):
        return bool(a == b)
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return a is b
    if a.layout != torch.strided or a.is_quantized or a.is_nested or a.is_meta:
        return True
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


def _wide_dtype(dtype: torch.dtype) -> torch.dtype:
    if dtype.is_complex:
        return torch.complex128
    return torch.float64 if dtype.is_floating_point else dtype
