"""The page of the zoo: what rows of sweeps become."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from torchvision import models

from fxrewrite.cli.sweep_row import Row, Table

SCRIPT = Path(__file__).parents[2] / "docs" / "make_zoo.py"


@pytest.fixture
def make_zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script, writing to a page of its own, with one line by hand and an old table."""
    spec = importlib.util.spec_from_file_location("make_zoo", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (tmp_path / "zoo.md").write_text(f"By hand.\n{module.MARKER}An old table.\n")
    monkeypatch.setattr(module, "PAGE", tmp_path / "zoo.md")
    return module


def page(make_zoo: Any, *rows: Row) -> str:
    """The page for these rows, half of them in each of two files."""
    files = [make_zoo.PAGE.with_name(name) for name in ("a.jsonl", "b.jsonl")]
    for at, row in enumerate(rows):
        Table(files[2 * at // len(rows)]).add(row)
    make_zoo.main([str(each) for each in files])
    text: str = make_zoo.PAGE.read_text()
    return text


def test_the_last_row_of_a_model_counts_and_text_by_hand_stays(make_zoo: Any) -> None:
    """One row for each model, one column for each rule set and `--into`."""
    model = "torchvision/resnet18"
    known: dict[str, Any] = {"outcome": "same", "batch_norms": 20, "anchors": 20}
    text = page(
        make_zoo,
        Row(model, "conv_bn", outcome="crashed", detail="an old one"),
        Row(model, "conv_bn", **known, into="graph", applied=20, rewritten_error=1e-7),
        Row(model, "conv_bn", "modules", **known, into="modules", applied=18, refused=2),
        Row("torchvision/alexnet", "conv_bn", outcome="timeout", detail="more than 3 | s"),
    )
    assert text.startswith("By hand.\n")
    assert "old" not in text
    assert "| resnet18 | 20 | graph | 20 | 18 of 20 |  | 1.0e-07 |" in text
    assert "| alexnet | 0 |  | timeout |  |" in text
    assert "| torchvision | `conv_bn` | same | 1 | 20 | 20 | 20 | 0 | 0 | 0 |" in text
    assert "| torchvision | `conv_bn` into modules | same | 1 | 20 | 20 | 18 | 2 | 0 | 0 |" in text
    assert "| torchvision/alexnet | `conv_bn` | timeout | more than 3 \\| s |" in text
    there = len(models.list_models())
    assert f"- torchvision, `conv_bn`: {there - 2} of {there} were not reached." in text


def test_reasons_are_counted_over_all_models(make_zoo: Any) -> None:
    """The most frequent first, with one example; of the rare ones only how many there are."""
    often: dict[str, Any] = {"outcome": "missed", "reason": "it reads cat()", "count": 3}
    rare = [{**often, "reason": f"rare {i}", "count": 1, "example": "x"} for i in range(50)]
    text = page(
        make_zoo,
        Row("timm/a", "affine", "", "same", reasons=({**often, "example": "bn"}, *rare)),
        Row("timm/b", "affine", "", "same", reasons=({**often, "example": "norm"},)),
    )
    assert "| 6 | missed | it reads cat() | timm/a: bn |" in text
    assert text.index("it reads cat()") < text.index("rare 0")
    assert f"And {51 - make_zoo.MOST} more, of {51 - make_zoo.MOST} anchors." in text
