"""Random inputs are like those they stand for, and inputs of any form reach the model."""

from __future__ import annotations

import collections
import dataclasses
from typing import Any

import nets
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

import fxrewrite as fxr
from fxrewrite.module_utils.nested import mapped
from fxrewrite.module_utils.running import run


@dataclasses.dataclass(frozen=True)
class Sample:
    image: Any
    label: int = 7


Pair = collections.namedtuple("Pair", "first second")

DTYPES = [
    *(torch.bool, torch.uint8, torch.int32, torch.int64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64),
]


def tensor(dtype: torch.dtype, shape: list[int], seed: int) -> torch.Tensor:
    make = torch.Generator().manual_seed(seed)
    if dtype.is_floating_point or dtype.is_complex:
        return torch.randn(shape, generator=make).to(dtype) * 3 + 5
    return torch.randint(2, 40, shape, generator=make).to(dtype)


tensors = st.builds(
    tensor,
    st.sampled_from(DTYPES),
    st.lists(st.integers(0, 4), max_size=4),
    st.integers(0, 99),
)
structures = st.recursive(
    tensors | st.none() | st.integers() | st.text(max_size=2),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, min_size=1, max_size=3).map(lambda found: ("kept", *found))
        | st.dictionaries(st.text("ab", max_size=2), inner, max_size=3)
        | inner.map(Sample)
        | st.builds(Pair, inner, inner)
    ),
    max_leaves=8,
)


def leaves(value: Any) -> list[Any]:
    found: list[Any] = []
    mapped(found.append, value)
    return found


@given(structures, st.integers(0, 5))
def test_random_inputs_are_like_the_given_ones(like: Any, seed: int) -> None:
    """Structure, shapes and dtypes are kept; integers stay in range; a seed is a result."""
    made, again = (fxr.verification.random_inputs(like, seed=seed) for _ in range(2))
    assert pytree.tree_structure(mapped(type, made)) == pytree.tree_structure(mapped(type, like))
    assert len(leaves(made)) == len(leaves(like))
    for old, new, same in zip(leaves(like), leaves(made), leaves(again), strict=True):
        assert type(new) is type(old)
        if not isinstance(old, torch.Tensor):
            assert new == old
            continue
        assert (new.shape, new.dtype, new.stride()) == (old.shape, old.dtype, old.stride())
        assert torch.equal(new, same)
        assert not new.numel() or new.data_ptr() != old.data_ptr()
        if old.numel() and old.dtype in DTYPES[1:4]:
            assert old.min() <= new.min() <= new.max() <= old.max()


def test_random_numbers_are_drawn_like_those_seen() -> None:
    """Floats have their mean and spread (1 around 0 for a constant), integers their range."""
    seen = torch.randn(100, 100) * 3 + 20
    made = fxr.verification.random_inputs(seen, seed=1)
    assert abs(made.mean() - 20) < 0.2
    assert abs(made.std() - 3) < 0.1
    assert (made - seen).abs().mean() > 1
    of_zeros = fxr.verification.random_inputs(torch.zeros(100, 100))
    assert abs(of_zeros.mean()) < 0.1
    assert abs(of_zeros.std() - 1) < 0.1
    whole = fxr.verification.random_inputs(torch.tensor([2, 9] * 500))
    assert (whole.min(), whole.max(), len(whole.unique())) == (2, 9, 8)
    assert (
        0.4
        < fxr.verification.random_inputs(torch.zeros(1000, dtype=torch.bool)).float().mean()
        < 0.6
    )


def test_shapes_stand_for_tensors() -> None:
    """A tuple of whole numbers is a shape, alone or nested; other seeds give other numbers."""
    made = fxr.verification.random_inputs((2, 3))
    assert (made.shape, made.dtype) == ((2, 3), torch.float32)
    assert not torch.equal(made, fxr.verification.random_inputs((2, 3), seed=1))
    image, sizes = fxr.verification.random_inputs(
        {"image": torch.Size([1, 4]), "sizes": [2, 3]}
    ).values()
    assert image.shape == (1, 4)
    assert sizes == [2, 3]
    state = torch.get_rng_state()
    fxr.verification.random_inputs(((1, 2), (3,)))
    assert torch.equal(torch.get_rng_state(), state)


def test_memory_format_and_gradients_are_kept() -> None:
    """Random inputs are laid out as the given ones, and want gradients where those do."""
    like = torch.randn(1, 3, 4, 4, requires_grad=True).to(memory_format=torch.channels_last)
    made = fxr.verification.random_inputs(like)
    assert made.is_contiguous(memory_format=torch.channels_last)
    assert made.requires_grad


@pytest.mark.parametrize(
    "inputs",
    [
        torch.ones(2),
        (torch.ones(2),),
        [torch.ones(2)],
        {"x": torch.ones(2)},
        {"x": torch.ones(2), "scale": torch.tensor([2.0])},
        (torch.ones(2), torch.tensor([2.0])),
    ],
)
def test_inputs_come_in_several_forms(inputs: Any) -> None:
    """A tensor, positional arguments and keyword arguments all reach the model as such."""

    class Scaled(torch.nn.Module):
        def forward(self, x: torch.Tensor, scale: Any = 1) -> torch.Tensor:
            return x * scale

    assert fxr.verify(Scaled(), Scaled(), inputs).same
    assert not fxr.verify(Scaled(), nets.Forward(lambda _, x: x * 3), inputs).same


def test_an_input_that_is_given_twice_is_one_tensor() -> None:
    """What the model writes to one of its arguments shows in the other, in float64 as well."""

    class Writes(torch.nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            x.add_(1)
            return y * 1.0

    x = torch.ones(2)
    assert torch.equal(run(Writes(), (x, x)).output, torch.full((2,), 2.0))
    check = fxr.verify(Writes(), Writes(), (x, x)).worst
    assert check is not None
    assert check.original_error == 0.0


def test_what_is_nested_in_inputs_reaches_the_model_as_a_copy() -> None:
    """A dataclass, a list and a named tuple with tensors may be arguments, and are left alone."""
    x = torch.ones(2)

    def forward(_: Any, sample: Any) -> Any:
        sample.image["pair"].first.add_(1)
        return sample.image["pair"].first * sample.label

    model = nets.Forward(forward)
    given = (Sample({"pair": Pair(x, [x])}),)
    assert fxr.verify(model, model, given).same
    assert torch.equal(x, torch.ones(2))
