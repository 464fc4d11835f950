"""Modules of a traced part that other code calls as well stay what they are."""

from __future__ import annotations

from typing import Any

import checks
import nets
import pytest
import torch
from nets import X, bn, conv
from torch import nn

import fxrewrite as fxr


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = conv(), bn()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn(self.conv(x))

    def before(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


class Untraceable(nn.Module):
    """A model that branches on data, so that only its parts are traced."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)

    def reach(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.part(x)
        return y + self.reach(x) if x.sum() > -1e9 else y


class Named(Untraceable):
    def reach(self, x: torch.Tensor) -> torch.Tensor:
        return self.part.conv(x)


class Method(Untraceable):
    def reach(self, x: torch.Tensor) -> torch.Tensor:
        return self.part.before(x)


class Iterated(Untraceable):
    def reach(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.part:
            return layer(x)
        return x


class Subscripted(Untraceable):
    def reach(self, x: torch.Tensor) -> torch.Tensor:
        return self.part[0](x)


class Read(Untraceable):
    def reach(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.part.conv.weight.mean()


CASES: list[tuple[Any, Any]] = [
    (Named, Part),
    (Method, Part),
    (Iterated, lambda: nn.Sequential(conv(), bn())),
    (Subscripted, lambda: nn.Sequential(conv(), bn())),
    (Read, Part),
]


@pytest.mark.parametrize(("kind", "part"), CASES, ids=[kind.__name__ for kind, _ in CASES])
def test_what_untraced_code_reaches_is_refused(kind: Any, part: Any) -> None:
    """Named, called by another method, iterated, subscripted or read: the convolution stays."""
    model = nets.randomise(kind(part=part())).double()
    expected = checks.outputs(model, X)
    made, report = fxr.rewrite(model, "conv_bn")
    assert not report.applied
    assert "may also" in report.refused[0].reason
    assert "test_elsewhere.py" in report.refused[0].reason
    assert checks.largest_error(expected, checks.outputs(made, X)) <= 1e-9


def test_what_two_parts_share_is_refused() -> None:
    """Two parts with one convolution and batch norms of their own: neither is folded."""
    one, two = Part(), Part()
    two.conv = one.conv

    class Both(Untraceable):
        def reach(self, x: torch.Tensor) -> torch.Tensor:
            return self.other(x)

    model = nets.randomise(Both(part=one, other=two)).double()
    expected = checks.outputs(model, X)
    made, report = fxr.rewrite(model, "conv_bn")
    assert len(report.refused) == 2
    assert checks.largest_error(expected, checks.outputs(made, X)) <= 1e-9


def test_a_part_that_is_called_as_a_whole_is_rewritten() -> None:
    """Naming a part in order to call it, or to ask whether it is there, is no reason to refuse."""

    class Whole(Untraceable):
        def reach(self, x: torch.Tensor) -> torch.Tensor:
            return self.part(x) if self.part is not None and self.part.training is False else x

    model = nets.randomise(Whole(part=Part())).double()
    expected = checks.outputs(model, X)
    made, _ = fxr.rewrite(model, "conv_bn", expect={"conv_bn": 1})
    assert checks.largest_error(expected, checks.outputs(made, X)) <= 1e-9
