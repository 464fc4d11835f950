"""Where data decide which way a forward goes, a module tree gives what the model gives, or raises.

An independent check: the model itself in float64, on inputs that go each way.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from nets import Forward, X, bn, conv
from torch import nn

import fxrewrite as fxr

# Inputs with a positive and with a negative sum.
UP, DOWN = X.abs(), -X.abs()
EXAMPLES = pytest.mark.parametrize("example", [None, UP, DOWN], ids=["none", "up", "down"])


class Block(nn.Module):
    """A convolution, a batch norm and an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = conv(), bn()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn(self.conv(x)).relu()


def assert_right(
    forward: Any, example: torch.Tensor | None, applied: int, raises: bool = False, **members: Any
) -> Any:
    """The report of a rewrite into a module tree with so many folds, right on both ways.

    Or one that raises a GuardError on some way.
    """
    model = Forward(forward, **members).double()
    made, report = fxr.rewrite(model, "conv_bn", example, into="modules")
    raised = False
    with torch.no_grad():
        for x in (UP, DOWN):
            try:
                torch.testing.assert_close(made(x), model(x), rtol=1e-9, atol=1e-9)
            except fxr.errors.GuardError:
                raised = True
        assert raised is raises
        assert not torch.allclose(model(UP), model(DOWN))
    assert len(report.applied) == applied, report
    return report


def either(m: Any, x: torch.Tensor) -> Any:
    y = m.a(x) if x.sum() > 0 else m.b(x)
    return y + x


@EXAMPLES
def test_each_side_has_a_block_of_its_own(example: torch.Tensor | None) -> None:
    assert_right(either, example, 2, a=Block(), b=Block())
    assert_right(either, example, 2, a=nn.Sequential(conv(), bn()), b=nn.Sequential(conv(), bn()))


@EXAMPLES
def test_a_block_that_both_sides_share_is_folded_once(example: torch.Tensor | None) -> None:
    def shared(m: Any, x: torch.Tensor) -> Any:
        if x.sum() > 0:
            return m.block(x)
        return m.block(x * 2) - 1

    assert_right(shared, example, 1, block=Block())


@EXAMPLES
def test_children_that_share_a_block_each_find_it(example: torch.Tensor | None) -> None:
    """A forward that can't be traced, whose children share modules: each child is a part."""
    block = Block()
    assert_right(either, example, 2, a=nn.Sequential(block, nn.Tanh()), b=block)
    one, other = Block(), Block()
    other.conv, other.bn = one.conv, one.bn
    calls = 1 if example is None else 2  # each side has the one name that the block has first
    assert_right(
        lambda m, x: either(m, x) * 2, example, calls, a=one, b=nn.Sequential(other, nn.Tanh())
    )


@EXAMPLES
def test_a_block_that_one_side_calls_twice_is_folded_once(example: torch.Tensor | None) -> None:
    def again(m: Any, x: torch.Tensor) -> Any:
        y = m.block(x)
        if x.sum() > 0:
            y = m.block(y)
        return y + x

    calls = 1 if example is not None else 2  # of which a run shows one
    assert_right(again, example, calls, block=Block())


@EXAMPLES
@pytest.mark.parametrize("inside", [True, False], ids=["conv", "norm"])
def test_one_of_the_two_in_a_branch_and_the_other_outside_stay(
    example: torch.Tensor | None, inside: bool
) -> None:
    def forward(m: Any, x: torch.Tensor) -> Any:
        y = x if inside else m.conv(x)
        if x.sum() > 0:
            y = m.conv(y) if inside else m.bn(y)
        return m.bn(y) if inside else y

    # In a run that goes this way, the two follow one on the other.
    is_seen = example is UP
    assert_right(forward, example, int(is_seen), raises=is_seen, conv=conv(), bn=bn())


@EXAMPLES
def test_a_block_of_which_one_side_calls_a_part_alone_stays(example: torch.Tensor | None) -> None:
    def forward(m: Any, x: torch.Tensor) -> Any:
        return m.block(x) if x.sum() > 0 else m.block.conv(x)

    is_apart = example is not UP
    assert_right(forward, example, int(not is_apart), raises=not is_apart, block=Block())


@EXAMPLES
def test_children_that_share_one_of_the_two_keep_both(example: torch.Tensor | None) -> None:
    one, other = Block(), Block()
    other.bn = one.bn
    assert_right(either, example, 0, a=one, b=other)
    one, other = Block(), Block()
    other.conv = one.conv
    assert_right(either, example, 0, a=one, b=other)


@EXAMPLES
def test_as_often_as_data_say(example: torch.Tensor | None) -> None:
    def forward(m: Any, x: torch.Tensor) -> Any:
        for _ in range(int(x.sum() > 0) + 1):
            x = m.block(x) + x
        return x

    assert_right(forward, example, 1, block=Block())
