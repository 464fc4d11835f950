"""The original and the rewritten model are timed."""

from __future__ import annotations

import nets
import torch

from fxrewrite.cli.timing import time_in_turns


def test_both_models_are_timed_in_turns() -> None:
    """After the warm-up each round times both, and who is first changes from round to round."""
    calls: list[str] = []
    models = [nets.Forward(lambda _, x, name=name: calls.append(name)) for name in "ab"]
    timing = time_in_turns(models[0], models[1], torch.ones(1), seconds=0)
    assert len(timing.original) == len(timing.rewritten) == 5
    assert "".join(calls[-10:]) == "abbaabbaab"
