"""`fxrewrite explain`: the report of a plan, or why one module or node ends as it does."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fxrewrite.cli import main
from fxrewrite.rules import registry

MODELS = """
import torch
import fxrewrite as fxr
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()
        self.last = nn.Conv2d(3, 3, 1)
        self.late = nn.BatchNorm2d(3)

    def forward(self, x):
        print("the model's own words")
        return self.late(self.act(self.last(self.bn(self.conv(x)))))

@fxr.pattern
class Act:
    x: fxr.Value
    act: nn.ReLU

@fxr.rule(where=[fxr.known_shape("x")])
def by_shape(m: Act) -> fxr.Replace:
    return fxr.Replace(nn.ReLU6())

fxr.register(fxr.RuleSet("by_shape", [by_shape]))
"""


@pytest.fixture
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "explained.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    yield
    for name in [name for name in sys.modules if name.startswith("explained")]:
        del sys.modules[name]


@pytest.mark.usefixtures("_folder")
def test_the_report_of_a_plan(capsys: pytest.CaptureFixture[str]) -> None:
    """Without a name it is the table, with each refusal and miss and its reason."""
    assert main(["explain", "explained.py:Net"]) == 0
    said = capsys.readouterr().out
    assert "fold_conv_bn          1        0       1" in said
    assert "late  it reads act (ReLU), not a Conv1d, Conv2d or Conv3d" in said


@pytest.mark.usefixtures("_folder")
def test_why_of_names(capsys: pytest.CaptureFixture[str]) -> None:
    """Each name given gets its answer, an anchor's as well as that of what is none."""
    assert main(["explain", "explained.py:Net", "--why", "bn", "--why", "last"]) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "bn: applied by fold_conv_bn: conv -> bn became conv",
        "last: it could be the conv of fold_conv_bn, but it feeds act (ReLU), "
        "not a BatchNorm1d, BatchNorm2d, BatchNorm3d or another batch norm such as SyncBatchNorm",
    ]


@pytest.mark.usefixtures("_folder")
def test_an_input_decides_what_needs_shapes(capsys: pytest.CaptureFixture[str]) -> None:
    """A rule that needs a shape refuses without `--input`, and says that it would decide."""
    line = ["explain", "explained.py:Net", "--rules", "by_shape", "--why", "act"]
    assert main(line) == 0
    registry._registered.pop("by_shape")  # the file is run once more
    assert "example_inputs would decide it" in capsys.readouterr().out
    assert main([*line, "--input", "1,3,4,4"]) == 0
    assert "act: applied by by_shape" in capsys.readouterr().out


@pytest.mark.usefixtures("_folder")
def test_json_is_all_that_stdout_gets(capsys: pytest.CaptureFixture[str]) -> None:
    """With `--json` there is one object with the report and the answers."""
    assert main(["explain", "explained.py:Net", "--why", "late", "--json"]) == 0
    captured = capsys.readouterr()
    data = json.loads(captured.out)
    assert "the model's own words" in captured.err
    assert data["report"]["counts"]["fold_conv_bn"] == {"applied": 1, "refused": 0, "missed": 1}
    assert data["why"]["late"].startswith("late: missed by fold_conv_bn")


@pytest.mark.usefixtures("_folder")
def test_an_unknown_name_gets_one_line_with_names_like_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A slip of the keyboard is answered by the names that were probably meant."""
    assert main(["explain", "explained.py:Net", "--why", "lats"]) == 4
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "no module and no node named 'lats'; there are late, last" in err
