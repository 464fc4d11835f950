"""Each row of the table of operations, held to what torch does."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fxrewrite.ir.aliases import hands_on, is_fresh_function, is_fresh_module
from fxrewrite.ir.op_traits import (
    BY_NAME,
    BY_TYPE,
    Trait,
    traits_in_place,
    traits_of_function,
    traits_of_module,
    traits_of_name,
)


def functions(name: str) -> list[Any]:
    """What torch has of that name."""
    places = (torch, F, torch.Tensor, operator)
    found = (getattr(place, name, None) for place in places)
    return [each for each in found if callable(each)]


def names_with(trait: Trait) -> list[str]:
    return sorted(name for name, traits in BY_NAME.items() if trait in traits)


@pytest.mark.parametrize("name", sorted(BY_NAME))
def test_a_row_is_of_an_operation_that_torch_has(name: str) -> None:
    """A name that is misspelt would be known of nothing."""
    assert functions(name) or hasattr(torch.ops.aten, name)


@pytest.mark.parametrize("name", names_with(Trait.COMMUTATIVE))
def test_operands_of_a_commutative_operation_may_change_places(name: str) -> None:
    for kind in (torch.int64, torch.bool):
        one, other = torch.randint(0, 2, (3, 4)).to(kind), torch.randint(0, 2, (3, 4)).to(kind)
        for function in functions(name):
            assert torch.equal(function(one, other), function(other, one))


@pytest.mark.parametrize("name", names_with(Trait.ACTIVATION))
def test_an_activation_looks_at_each_number_by_itself_in_place_or_not(name: str) -> None:
    x = torch.linspace(-7, 7, 24).reshape(2, 3, 4)
    (function, *_) = [getattr(F, name, None) or getattr(torch, name)]
    expected = function(x)
    for part in range(3):
        assert torch.equal(function(x[:, part].clone()), expected[:, part])
    in_place = getattr(torch, f"{name}_", None) or getattr(F, f"{name}_", None)
    if in_place is not None:
        written = x.clone()
        assert in_place(written) is written
        torch.testing.assert_close(written, expected)


ARGUMENTS: dict[str, Any] = {
    "narrow": (1, 0, 2),
    "permute": ((2, 0, 1),),
    "movedim": (0, 2),
    "swapaxes": (0, 1),
    "transpose": (0, 1),
    "select": (1, 0),
    "repeat": (1, 2, 1),
    "expand": (2, 3, 4),
    "reshape": ((6, 4),),
    "chunk": (2,),
    "split": (1,),
    "split_with_sizes": ((1, 2), 1),
    "unsqueeze": (0,),
    "unflatten": (2, (2, 2)),
    "to": (torch.float64,),
    "type": (torch.float64,),
    "masked_fill": (torch.tensor([True, False, True, False]), 0.5),
    "getitem": ((slice(None), 1),),
}


@pytest.mark.parametrize("name", names_with(Trait.ANY_STRIDES))
def test_an_operation_for_which_strides_do_not_matter_gives_the_same_for_any(name: str) -> None:
    x = torch.randn(2, 3, 4)
    strided = torch.randn(2, 3, 9)[..., 2:6].copy_(x)
    if name in ("einsum", "where", "t", "dropout"):
        calls = {
            "einsum": lambda y: torch.einsum("abc->cab", y),
            "where": lambda y: torch.where(y > 0, y, 0),
            "t": lambda y: y[0].t(),
            "dropout": lambda y: F.dropout(y, training=False),
        }
        one, other = calls[name](x), calls[name](strided)
    else:
        (function, *_) = functions(name)
        if name == "getitem":
            function = operator.getitem
        arguments = ARGUMENTS.get(name, ())
        one, other = function(x, *arguments), function(strided, *arguments)
    torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("kind", [k for k, t in BY_TYPE.items() if Trait.HANDS_ON in t])
def test_a_module_that_hands_on_returns_its_very_input(kind: type[nn.Module]) -> None:
    x = torch.randn(2, 3, 4, 4, 4)
    for each in (x, x[0], x[0, 0], x[0, 0, 0]):
        if kind in (nn.Identity, nn.Dropout, nn.AlphaDropout):
            assert kind().eval()(each) is each or torch.equal(kind().eval()(each), each)
    assert hands_on(kind())


def test_a_subclass_that_overrides_a_forward_is_known_of_nothing() -> None:
    class Own(nn.Dropout):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1

    class Renamed(nn.Dropout):
        pass

    assert traits_of_module(Own()) == Trait.NONE
    assert traits_of_module(Renamed()) == traits_of_module(nn.Dropout())


@pytest.mark.parametrize(
    "same",
    [
        (torch.add, operator.add, torch.ops.aten.add.Tensor),
        (torch.relu, F.relu, torch.ops.aten.relu.default),
    ],
)
def test_however_an_operation_is_called_it_has_one_row(same: tuple[Any, ...]) -> None:
    assert len({traits_of_function(each) for each in same}) == 1
    assert all(map(is_fresh_function, same))


def test_an_operation_in_place_has_the_row_of_the_one_that_is_not() -> None:
    assert traits_in_place("add_") == traits_in_place("iadd") == traits_of_name("add")
    assert traits_in_place("and_") == traits_of_name("and_")
    assert traits_of_name("relu_") == Trait.NONE


def test_of_what_has_no_row_nothing_is_assumed() -> None:
    def add(x: torch.Tensor) -> torch.Tensor:
        return x

    assert traits_of_function(add) == Trait.NONE
    assert not is_fresh_module(nn.Identity())
    assert not is_fresh_function(add)
    assert traits_of_module(None) == Trait.NONE
