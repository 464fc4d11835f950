"""The one comparison that tests, toolkit and `verify` share misses nothing that differs."""

from __future__ import annotations

import math
from typing import Any

import checks
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxrewrite.verification.compare import difference

NAN, INF = math.nan, math.inf


def of(*numbers: float, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.tensor(numbers, dtype=dtype)


APART: list[tuple[torch.Tensor, torch.Tensor]] = [
    (of(1, 2), of(1, NAN)),
    (of(1, NAN), of(1, 2)),
    (of(1, NAN), of(NAN, 1)),
    (of(1, INF), of(1, -INF)),
    (of(1, INF), of(1, NAN)),
    (of(1, 1), of(1)),
    (of(1, 1), torch.ones(2, 1).double()),
    (of(1, 2), of(1, 2, dtype=torch.float32)),
    (of(1, 0), torch.tensor([1, 0])),
    (of(0), of(1e-4)),
    (of(1e-6), of(2e-6)),
    (torch.tensor([True]), torch.tensor([False])),
    (torch.tensor([10**9]), torch.tensor([10**9 + 1])),
    (torch.tensor([1j]), torch.tensor([-1j])),
]
EQUAL = [
    (of(1, NAN, INF, -INF), of(1, NAN, INF, -INF)),
    (of(), of()),
    (of(NAN, INF), of(NAN, INF)),
    (of(0), of(-0.0)),
    (of(1e6), of(1e6 * (1 + 1e-12))),
]


@pytest.mark.parametrize(("expected", "found"), APART)
@given(st.integers(0, 2), st.booleans())
def test_one_tensor_that_differs_is_found_among_any_others(
    expected: torch.Tensor, found: torch.Tensor, at: int, nested: bool
) -> None:
    """However large the others are, and whichever of them it is."""
    one: list[Any] = [of(1e6, 1), of(0, NAN)]
    two: list[Any] = [each.clone() for each in one]
    assert difference(one, two, 1e-9) is None
    assert checks.largest_error(one, two) == 0
    one.insert(at, expected)
    two.insert(at, found)
    assert not checks.largest_error(one, two) <= 1e-9
    if nested:
        one, two = [{"in": tuple(one)}], [{"in": tuple(two)}]
    assert difference(one, two, 1e-9) is not None


@pytest.mark.parametrize(("expected", "found"), EQUAL)
def test_what_is_the_same_up_to_rounding_is_no_difference(
    expected: torch.Tensor, found: torch.Tensor
) -> None:
    """NaN is NaN, an infinity itself, and rounding is relative to the tensor's largest."""
    assert difference(expected, found, 1e-9) is None
    assert checks.largest_error([expected], [found]) <= 1e-9


@pytest.mark.parametrize(
    ("expected", "found", "said"),
    [
        ((of(1),), [of(1)], "output was a tuple with [0] and became a list with [0]"),
        ((of(1),), (of(1), of(1)), "output was a tuple with [0] and became"),
        ({"a": of(1)}, {"b": of(1)}, "output was a dict with ['a'] and became"),
        ((of(1), 2), (of(1), 3), "output[1] was 2 and became 3"),
        ((of(1), None), (of(1), of(1)), "output[1] was a value of type NoneType"),
        ((of(1), of(2)), (of(1), of(3)), "output[1] is off by 5.0e-01 of its largest value"),
    ],
)
def test_a_difference_is_named_with_its_place(expected: Any, found: Any, said: str) -> None:
    """Structure and plain values are compared, too."""
    assert (difference(expected, found, 1e-9) or "").startswith(said)


def test_as_many_tensors_as_there_should_be() -> None:
    """An output that is missing, or one too many, is an error."""
    for count in (0, 2):
        with pytest.raises(ValueError, match="zip"):
            checks.largest_error([of(1)], [of(1)] * count)
