"""Time a rewritten model against its original, in turns."""

from __future__ import annotations

import statistics
import time
from typing import Any

import attrs
import torch
from torch import nn

from ..module_utils.nested import flatten
from ..module_utils.running import arguments_of, cloned, run


@attrs.frozen
class Timing:
    """Seconds per call of both models, measured in turns; one entry per round."""

    original: tuple[float, ...]
    rewritten: tuple[float, ...]

    @property
    def medians(self) -> tuple[float, float]:
        """The median seconds of the original and of the rewritten model."""
        return statistics.median(self.original), statistics.median(self.rewritten)

    @property
    def speed_up(self) -> float:
        """The median over all rounds of the original's time by the rewritten model's."""
        return statistics.median(self._ratios)

    @property
    def middle_half(self) -> tuple[float, float]:
        """Between which speed-ups the middle half of all rounds lies."""
        lower, _, upper = statistics.quantiles(self._ratios, n=4, method="inclusive")
        return lower, upper

    @property
    def _ratios(self) -> list[float]:
        # Within a round the machine's load is nearly the same; between rounds it need not be.
        return [a / b for a, b in zip(self.original, self.rewritten, strict=True)]

    def __str__(self) -> str:
        """The speed-up, the times and the spread in one line."""
        original, rewritten = (f"{1e3 * seconds:.3g} ms" for seconds in self.medians)
        lower, upper = self.middle_half
        return (
            f"{self.speed_up:.2f}x, {original} to {rewritten} "
            f"(medians of {len(self.original)} rounds; middle half {lower:.2f}x to {upper:.2f}x)"
        )

    def to_dict(self) -> dict[str, Any]:
        """Medians in seconds, the speed-up and its spread as plain data."""
        original, rewritten = self.medians
        return {
            "rounds": len(self.original),
            "original_seconds": original,
            "rewritten_seconds": rewritten,
            "speed_up": self.speed_up,
            "speed_up_middle_half": list(self.middle_half),
        }


def time_in_turns(
    original: nn.Module, rewritten: nn.Module, inputs: Any, *, seconds: float = 3.0
) -> Timing:
    """Time both models in turns, so that a machine's changing load falls on both alike.

    Args:
        original: the model to compare with.
        rewritten: the model that should be faster.
        inputs: what both are called with, in one of the forms that `verify` takes; left as they
            are.
        seconds: about how long to measure; five rounds are made in any case, 300 at most.
    """
    times: tuple[list[float], list[float]] = ([], [])
    turns = list(zip((original, rewritten), times, strict=True))
    for model in (original, rewritten):
        run(model, inputs)
    end = time.perf_counter() + seconds
    while len(times[0]) < 5 or (time.perf_counter() < end and len(times[0]) < 300):
        for model, taken in turns:
            taken.append(_seconds(model, inputs))
        turns.reverse()
    return Timing(*map(tuple, times))


def _seconds(model: nn.Module, inputs: Any) -> float:
    # A model may write to its input, and copying that is not its work.
    own = cloned(inputs)
    args, kwargs = arguments_of(own)
    with torch.no_grad():
        _wait_for(own)
        start = time.perf_counter()
        model(*args, **kwargs)
        _wait_for(own)
        return time.perf_counter() - start


def _wait_for(inputs: Any) -> None:
    tensors = (each for _, each in flatten(inputs, "") if isinstance(each, torch.Tensor))
    if any(each.device.type != "cpu" for each in tensors):
        torch.accelerator.synchronize()
