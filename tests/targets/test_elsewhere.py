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


CALLS: list[tuple[Any, Any]] = [
    (Named, Part),
    (Method, Part),
    (Iterated, lambda: nn.Sequential(conv(), bn())),
    (Subscripted, lambda: nn.Sequential(conv(), bn())),
]


@pytest.mark.parametrize(("kind", "part"), CALLS, ids=[kind.__name__ for kind, _ in CALLS])
def test_a_part_that_other_code_calls_into_is_refused(kind: Any, part: Any) -> None:
    """Named, called by another method, iterated or subscripted; a run shows it, or a guess."""
    model = nets.randomise(kind(part=part())).double()
    expected = checks.outputs(model, X)
    for example in (None, X):
        made, report = fxr.rewrite(model, "conv_bn", example)
        said = "the run on the example inputs called part." if example is not None else "elsewhere"
        assert said in str(report.refused[0].reason)
        assert checks.largest_error(expected, checks.outputs(made, X)) <= 1e-9


def test_a_tensor_of_a_part_that_a_method_of_the_model_reads_stays() -> None:
    """The methods that a forward mentions are looked at, for what they reach from `self`."""
    model = nets.randomise(Read(part=Part())).double()
    expected = checks.outputs(model, X)
    made, report = fxr.rewrite(model, "conv_bn")
    assert "weight of the Conv2d may be asked for, at " in str(report.refused[0].reason)
    assert checks.largest_error(expected, checks.outputs(made, X)) <= 1e-9


def test_what_two_parts_share_in_part_is_refused() -> None:
    """Two parts with one convolution and batch norms of their own: neither is folded."""
    one, two = Part(), Part()
    two.conv = one.conv

    class Both(Untraceable):
        def reach(self, x: torch.Tensor) -> torch.Tensor:
            return self.other(x)

    model = nets.randomise(Both(part=one, other=two)).double()
    expected = checks.outputs(model, X)
    made, report = fxr.rewrite(model, "conv_bn", X)
    assert len(report.refused) == 2
    assert checks.largest_error(expected, checks.outputs(made, X)) <= 1e-9


def test_a_part_that_is_called_as_a_whole_is_rewritten() -> None:
    """Naming a part in order to call it, or to ask whether it is there, is no reason to refuse."""

    class Whole(Untraceable):
        def reach(self, x: torch.Tensor) -> torch.Tensor:
            return self.part(x) if self.part is not None and self.part.training is False else x

    model = nets.randomise(Whole(part=Part())).double()
    expected = checks.outputs(model, X)
    made, _ = fxr.rewrite(model, "conv_bn", expect={"conv_bn": 2})
    assert checks.largest_error(expected, checks.outputs(made, X)) <= 1e-9
