"""What is rewritten on the word of one run alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from nets import X, bn, conv, randomise
from torch import nn

import fxrewrite as fxr


class Keeps(nn.Module):
    """On a way that the example inputs don't go, something else has what the convolution gives."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.kept = conv(), bn(), None

    def forward(self, x: torch.Tensor, way: str = "norm") -> Any:
        y = self.conv(x)
        if x.sum() < -1e9:
            self.kept = y
        return y if way == "none" else self.bn(y)


class Asks(nn.Module):
    """Its forward asks the norm for what an Identity does not have."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = conv(), bn()

    def forward(self, x: torch.Tensor) -> Any:
        y = self.bn(self.conv(x))
        return y * self.bn.eps if x.sum() < -1e9 else y


@pytest.fixture(params=[Keeps, Asks])
def model(request: Any) -> nn.Module:
    torch.manual_seed(0)
    return randomise(request.param()).double().eval()


def test_what_only_a_run_shows_is_refused_with_the_line(model: nn.Module) -> None:
    _, report = fxr.rewrite(model, "conv_bn", X)
    assert not report.applied
    line = "self.kept = y" if isinstance(model, Keeps) else "self.bn.eps if"
    assert line in report.why("bn")


def test_it_is_rewritten_if_the_run_is_trusted(model: nn.Module) -> None:
    """And the report says so of the site, and in all."""
    made, report = fxr.rewrite(model, "conv_bn", X, trust="run", expect={"conv_bn": 1})
    torch.testing.assert_close(made(X), model(X), rtol=1e-9, atol=1e-9)
    assert [each.assurance for each in report.applied] == ["trusted"]
    assert report.why("bn").endswith("conv -> bn became conv; trusted")
    assert "trusted: 1, where one run alone shows that it may be done" in str(report)


def test_what_was_not_called_in_the_run_is_not_trusted() -> None:
    class Skips(Keeps):
        def forward(self, x: torch.Tensor, way: str = "norm") -> Any:
            return super().forward(x) if x.sum() < -1e9 else x

    _, report = fxr.rewrite(Skips().double().eval(), "conv_bn", X, trust="run")
    assert not report.applied


def test_what_is_trusted_is_guarded_as_well() -> None:
    model = randomise(Keeps()).double().eval()
    made, _ = fxr.rewrite(model, "conv_bn", X, trust="run", expect={"conv_bn": 1})
    with pytest.raises(fxr.errors.GuardError, match="what conv gave was not given to bn"):
        made(X, way="none")
    with torch.inference_mode():
        made(X.clone())


def test_a_run_can_only_be_trusted_if_there_is_one() -> None:
    with pytest.raises(fxr.errors.InputError, match="trust='run' trusts a run on example_inputs"):
        fxr.rewrite(nn.ReLU(), "conv_bn", trust="run")
    with pytest.raises(ValueError, match="trust is 'run' or None, not 'me'"):
        fxr.Rewriter("conv_bn", trust="me")  # type: ignore[arg-type]
