"""Models that the command line builds from what it is told."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import nn

from fxrewrite.cli.loading import build_model


def test_a_model_instance_is_taken_as_it_is(tmp_path: Path) -> None:
    """What the spec names may be a model already; it is put into eval mode."""
    (tmp_path / "made.py").write_text("from torch import nn\ninstance = nn.Linear(2, 1)")
    model = build_model(f"{tmp_path}/made.py:instance")
    assert isinstance(model, nn.Linear)
    assert not model.training


def test_a_file_may_be_named_like_a_module(tmp_path: Path) -> None:
    """A file called `torch.py` is run, and does not take torch's place."""
    (tmp_path / "torch.py").write_text("from torch.nn import Identity")
    assert isinstance(build_model(f"{tmp_path}/torch.py:Identity"), nn.Identity)
    assert sys.modules["torch"] is torch
