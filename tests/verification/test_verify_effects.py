"""`verify` sees what a forward does besides giving an output, on as many inputs as it is told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fxrewrite import verify

X = torch.tensor([[1.1, -2.3], [3.7, 0.6]])


class Does(nn.Module):
    """A model whose output is its input doubled, and that then does something else."""

    def __init__(self, effect: Callable[[Any, torch.Tensor], Any]) -> None:
        super().__init__()
        self.effect = effect
        self.seen = nn.Buffer(torch.ones(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made = x * 2
        self.effect(self, x)
        return made


EFFECTS: dict[str, tuple[Callable[[Any, Any], Any], str]] = {
    "adds to its input": (lambda m, x: x.add_(1), "input"),
    "writes a NaN into its input": (lambda m, x: x[0].fill_(torch.nan), "input"),
    "writes by a view": (lambda m, x: x.t()[:1].mul_(3), "input"),
    "adds to its buffer": (lambda m, x: m.seen.add_(1), "buffer seen"),
}


@pytest.mark.parametrize("effect", EFFECTS)
@pytest.mark.parametrize("by_original", [False, True])
def test_a_write_that_only_one_of_the_models_does_is_a_difference(
    effect: str, by_original: bool
) -> None:
    """Be it the rewritten model that writes, or the original; and none if both do."""
    write, name = EFFECTS[effect]
    models = [Does(lambda m, x: None), Does(write)]
    original, rewritten = reversed(models) if by_original else models
    given = X.clone()
    verdict = verify(original, rewritten, given)
    assert verdict.verdict == "different"
    assert [each.name for each in verdict.tensors if not each.same] == [name]
    assert verify(Does(write), Does(write), given).same
    assert torch.equal(given, X)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_output_of_nothing_but_nan_is_the_same_as_another(dtype: torch.dtype) -> None:
    """Beside one that has numbers; alone there would be nothing to compare."""
    odd = nn.Module()
    odd.forward = lambda x: (x, x * torch.nan)  # type: ignore[method-assign]
    assert verify(odd, odd, X.to(dtype)).verdict == "same"


@pytest.mark.parametrize("trials", [1, 2, 5])
def test_each_trial_has_an_input_of_its_own(trials: int) -> None:
    """The first is the input as it is given; another seed draws other ones for the rest."""
    seen: list[torch.Tensor] = []
    model = Does(lambda m, x: seen.append(x.clone()))
    by_seed = []
    for seed in (0, 1000):
        seen.clear()
        assert verify(Does(lambda m, x: None), model, X, trials=trials, seed=seed).same
        by_seed.append({str(each.tolist()) for each in seen})
        assert len(by_seed[-1]) == len(seen) == trials
        assert torch.equal(seen[0], X)
    assert len(by_seed[0] | by_seed[1]) == 2 * trials - 1
