"""Example inputs show shapes and decide optional arguments; they never break a rewrite."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from nets import X, bn, conv, randomise
from torch import nn

import fxrewrite as fxr


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = conv(), bn()


def optional(self: Any, x: Any, mask: Any = None) -> Any:
    y = self.bn(self.conv(x))
    return y if mask is None else y + mask


def either(self: Any, x: Any, mask: Any = None, causal: bool = False) -> Any:
    y = self.bn(self.conv(x))
    return y * 2 if mask is not None or causal else y


def options(self: Any, x: Any, **options: Any) -> Any:
    options.pop("scale", None)
    return self.bn(self.conv(x))


def varargs(self: Any, *inputs: Any) -> Any:
    return self.bn(self.conv(inputs[0])) + inputs[1]


def list_or_tensor(self: Any, x: Any) -> Any:
    return self.bn(self.conv(torch.cat(x) if isinstance(x, list) else x))


def table(self: Any, x: Any) -> Any:
    return self.bn(self.conv(x)) * {3: 1.0, 4: 2.0}[x.ndim]


CALLS: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "an optional argument is left out": (optional, (X,)),
    "an optional argument is given": (optional, (X, X)),
    "one of two is asked for": (either, (X,)),
    "a flag is set": (either, (X, None, True)),
    "options": (options, (X,)),
    "any number of arguments": (varargs, (X, X)),
    "a list": (list_or_tensor, ([X, X],)),
    "a table of ranks": (table, (X,)),
}


def net(forward: Callable[..., Any]) -> Any:
    torch.manual_seed(0)
    return randomise(type("Net", (Net,), {"forward": forward})()).double().eval()


@pytest.mark.parametrize(("forward", "given"), CALLS.values(), ids=list(CALLS))
def test_what_a_model_can_be_called_with_it_can_be_rewritten_with(forward: Any, given: Any) -> None:
    """The norm is folded, and the result takes the inputs and gives the same."""
    model = net(forward)
    made, _ = fxr.rewrite(model, "conv_bn", given, expect={"conv_bn": 1})
    torch.testing.assert_close(made(*given), model(*given), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("given", [(X,), (X, X)], ids=["left out", "given"])
def test_a_graph_is_made_for_the_arguments_that_are_given(given: Any) -> None:
    for forward in (optional, either):
        model = net(forward)
        made, _ = fxr.rewrite(model, "conv_bn", given, into="graph", expect={"conv_bn": 1})
        torch.testing.assert_close(made(*given), model(*given), rtol=1e-9, atol=1e-9)


def test_arguments_may_be_given_by_name() -> None:
    model = net(optional)
    given = {"x": X, "mask": X}
    for into in (None, "graph", "modules"):
        made, _ = fxr.rewrite(model, "conv_bn", given, into=into, expect={"conv_bn": 1})  # type: ignore[arg-type]
        torch.testing.assert_close(made(**given), model(**given), rtol=1e-9, atol=1e-9)


def test_where_shapes_end_the_report_says_why() -> None:
    """Up to there they are known."""

    @torch.library.custom_op("fxrewrite_tests::unknown", mutates_args=())
    def unknown(x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    seen: dict[str, Any] = {}

    @fxr.pattern
    class Act:
        x: fxr.Value
        act: nn.ReLU

    @fxr.rule
    def noting(m: Act) -> fxr.Replace:
        seen[m.x.name] = m.x.shape
        return fxr.Replace(nn.Tanh(), slot="act")

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.ReLU(), nn.ReLU()

        def forward(self, x: torch.Tensor) -> Any:
            return self.two(torch.ops.fxrewrite_tests.unknown(self.one(x)))

    _, report = fxr.rewrite(Two().eval(), noting, X)
    assert list(seen.values()) == [tuple(X.shape), None]
    assert "the shapes of some values are not known: " in str(report)
