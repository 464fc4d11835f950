"""A sweep: whatever a model does to its process is one row, and rows are never lost or redone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxrewrite.cli import main
from fxrewrite.cli.sweep_models import Subject, subjects
from fxrewrite.cli.sweep_row import Row, Table, TableError, general

MODELS = """
import os, signal, time
import torch
from torch import nn
import fxrewrite as fxr
from fxrewrite.patterns.conv_bn import ConvBn

def net():
    print("the model's own words")
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.BatchNorm2d(8))

def words():
    return nn.Sequential(nn.Embedding(10, 3), nn.Linear(3, 2))

class Branches(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x

class Faded(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
        self.scale = nn.Parameter(torch.full((3, 1, 1), 1e-9))
        self.head = nn.Conv2d(3, 5, 1)
        nn.init.zeros_(self.head.weight)

    def forward(self, x):
        return self.head(x + self.scale * self.inner(x))

class Crashes(nn.Module):
    def forward(self, x):
        os.kill(os.getpid(), signal.SIGSEGV)

class Exits(nn.Module):
    def forward(self, x):
        os._exit(7)

def raises(): raise ValueError("no luck\\nat all")

def takes_nothing():
    return nn.Linear(7, 7)

def hangs():
    while True:
        time.sleep(1)

def hungry():
    held = []
    while True:
        held.append(torch.ones(10 * 2**20))

@fxr.rule
def forgets_eps(m: ConvBn) -> fxr.Replace:
    bn = fxr.evolve(m.bn, eps=0.0)
    mean, scale = bn.running_mean, bn.weight / (2 * bn.running_var).sqrt()
    weight = m.conv.weight * scale.view(-1, 1, 1, 1)
    return fxr.Replace(fxr.evolve(m.conv, weight=weight, bias=(m.conv.bias - mean) * scale))

if "forgets_eps" not in fxr.rule_set_names():
    fxr.register(fxr.RuleSet("forgets_eps", [forgets_eps]))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "models.py").write_text(MODELS)
    return tmp_path


def sweep(folder: Path, *names: str, options: tuple[str, ...] = ()) -> tuple[int, dict[str, Any]]:
    """Sweep over these models of `models.py`; the exit code, and the last row of each model."""
    listed = "\n".join(f"{folder}/models.py:{name}" for name in names)
    (folder / "list.txt").write_text(f"# models\n\n{listed}\n")
    out = folder / "rows.jsonl"
    code = main(["sweep", f"{folder}/list.txt", "--out", str(out), *options])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    return code, {row["model"].rpartition(":")[2]: row for row in rows}


# What a model may do


@pytest.mark.slow
def test_a_model_that_is_rewritten(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its row has counts, the reason of what stayed, the inputs chosen, errors and costs."""
    code, rows = sweep(folder, "net", "words 1,4:int64")
    assert code == 0
    row = rows["net"]
    assert (row["outcome"], row["inputs"]) == ("same", "1,3,64,64:float32")
    assert [row[key] for key in ("batch_norms", "anchors", "applied", "missed")] == [2, 2, 1, 1]
    (reason,) = row["reasons"]
    assert reason.pop("reason").startswith("it reads a ReLU, not a Conv1d")
    assert reason == {"outcome": "missed", "count": 1, "example": "3"}
    assert 0 < row["rewritten_error"] < 1e-5
    assert row["seconds"] > 0
    assert row["peak_mib"] > 0
    assert rows["words"]["inputs"] == "1,4:int64"
    said = capsys.readouterr()
    assert "the model's own words" not in said.out + said.err
    assert said.out.splitlines()[1].split() == ["same", "2", "2", "1", "0", "1"]
    assert "1  missed: it reads a ReLU" in said.out


@pytest.mark.slow
def test_a_model_that_fails_is_a_row_and_the_others_go_on(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A crash, an exit, an exception: each is told with the stage, and no other model suffers."""
    names = ("Crashes", "Exits", "raises", "takes_nothing", "missing", "net")
    code, rows = sweep(folder, *names)
    assert code == 3
    told = {name: (row["outcome"], row["detail"]) for name, row in rows.items()}
    assert told["Crashes"] == ("crashed", "signal SIGSEGV while it was being run")
    assert told["Exits"] == ("crashed", "exit code 7 while it was being run")
    assert told["raises"][0] == told["takes_nothing"][0] == told["missing"][0] == "raised"
    assert "ValueError: no luck at all" in told["raises"][1]
    assert "takes none of the inputs tried" in told["takes_nothing"][1]
    assert "has no 'missing'" in told["missing"][1]
    assert told["net"] == ("same", "")
    assert "models.py:Exits: crashed: exit code 7" in capsys.readouterr().err


@pytest.mark.slow
def test_a_model_that_hangs_is_killed(folder: Path) -> None:
    """After --timeout its process is gone, and the row says where it hung."""
    code, rows = sweep(folder, "hangs", options=("--timeout", "2"))
    assert code == 3
    assert rows["hangs"]["outcome"] == "timeout"
    assert rows["hangs"]["detail"] in ("more than 2 s, being built", "more than 2 s, starting")


@pytest.mark.slow
def test_a_model_that_eats_memory_is_killed(folder: Path) -> None:
    """Beyond --memory its process is gone before it takes much more, and the row says so."""
    _, rows = sweep(folder, "hungry", options=("--memory", "1200"))
    assert rows["hungry"]["outcome"] == "memory"
    assert rows["hungry"]["detail"] == "more than 1200 MiB, being built"
    assert rows["hungry"]["peak_mib"] > 1200


@pytest.mark.slow
def test_a_wrong_rewrite_is_found(folder: Path) -> None:
    """A model whose outputs differ, in float64 too, is told apart and gives exit code 2."""
    code, rows = sweep(folder, "net", options=("--rules", "forgets_eps"))
    assert code == 2
    assert rows["net"]["outcome"] == "differs"
    assert "in float64: relative difference" in rows["net"]["detail"]


@pytest.mark.slow
def test_a_wrong_rewrite_is_found_where_the_model_begins_as_nothing(folder: Path) -> None:
    """Behind a layer scale of almost zero, and a last layer of zeros."""
    code, rows = sweep(folder, "Faded", options=("--rules", "forgets_eps"))
    assert code == 2
    assert rows["Faded"]["outcome"] == "differs"
    assert rows["Faded"]["difference"] > 1e-3


def test_a_larger_model_is_left_alone(folder: Path) -> None:
    """Beyond --max-parameters nothing is done, which is no failure."""
    code, rows = sweep(folder, "net", options=("--max-parameters", "10"))
    assert code == 0
    assert rows["net"]["outcome"] == "left alone"
    assert rows["net"]["detail"] == "it has more than 10 parameters"


# The rows


@pytest.mark.slow
def test_a_sweep_goes_on_where_it_stopped(folder: Path) -> None:
    """A model that has a row is not examined again, with --retry only if it went wrong."""
    sweep(folder, "net", "raises")
    before = (folder / "rows.jsonl").read_bytes()
    code, rows = sweep(folder, "net", "raises")
    assert code == 3
    assert (folder / "rows.jsonl").read_bytes() == before
    assert rows.keys() == {"net", "raises"}
    mended = MODELS.replace('def raises(): raise ValueError("no luck\\nat all")', "raises = net")
    assert mended != MODELS
    (folder / "models.py").write_text(mended)
    code, rows = sweep(folder, "net", "raises", options=("--retry",))
    assert code == 0
    after = (folder / "rows.jsonl").read_bytes()
    assert after.startswith(before)
    assert after.count(b"\n") == before.count(b"\n") + 1
    assert rows["raises"]["outcome"] == "same"


@pytest.mark.slow
def test_ctrl_c_leaves_a_usable_file_and_no_process(folder: Path) -> None:
    """The exit code is 130, the rows there are whole, the process that ran is gone."""
    pids = folder / "pids"
    hangs = f"open({str(pids)!r}, 'w').write(str(os.getpid()))\n    while True:"
    (folder / "models.py").write_text(MODELS.replace("while True:", hangs, 1))
    (folder / "rows.jsonl").touch()

    def press() -> None:
        while not pids.exists() or not pids.read_text():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    # Tests that a shell runs in the background ignore Ctrl-C.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    thread = threading.Thread(target=press)
    thread.start()
    code, rows = sweep(folder, "net", "hangs", "raises")
    thread.join()
    signal.signal(signal.SIGINT, before)
    assert code == 130
    assert rows.keys() == {"net"}
    with pytest.raises(ProcessLookupError):
        os.kill(int(pids.read_text()), 0)


@pytest.mark.slow
def test_sigterm_ends_what_was_started(folder: Path) -> None:
    """As `timeout` sends it: the exit code is 143, and the process that ran is gone."""
    pids = folder / "pids"
    hangs = f"open({str(pids)!r}, 'w').write(str(os.getpid()))\n    while True:"
    (folder / "models.py").write_text(MODELS.replace("while True:", hangs, 1))
    (folder / "list.txt").write_text(f"{folder}/models.py:hangs\n")
    command = "import sys; from fxrewrite.cli import main; sys.exit(main(sys.argv[1:]))"
    out = str(folder / "rows.jsonl")
    started = subprocess.Popen(
        [sys.executable, "-c", command, "sweep", str(folder / "list.txt"), "--out", out]
    )
    while not pids.exists() or not pids.read_text():
        time.sleep(0.05)
    started.terminate()
    assert started.wait() == 143
    with pytest.raises(ProcessLookupError):
        os.kill(int(pids.read_text()), 0)


@pytest.mark.slow
def test_into_is_asked_for_and_kept_apart(folder: Path) -> None:
    """A model has a row for each --into, and each says what it was rewritten into."""
    for options in ((), ("--into", "modules"), ("--into", "graph"), ("--into", "modules")):
        code, _ = sweep(folder, "net", options=options)
        assert code == 0
    rows = Table(folder / "rows.jsonl").rows
    assert [(row.asked, row.into, row.applied) for row in rows] == [
        ("", "graph", 1),
        ("modules", "modules", 1),
        ("graph", "graph", 1),
    ]


NUMBER = st.none() | st.floats(allow_nan=False)
TEXT = st.text(st.characters(exclude_categories=["C", "Z"]) | st.sampled_from(' ,"'))
ROWS = st.builds(
    Row,
    model=TEXT,
    detail=TEXT,
    parameters=st.none() | st.integers(0),
    anchors=st.integers(0),
    reasons=st.lists(st.fixed_dictionaries({"reason": TEXT, "count": st.integers(1)})).map(tuple),
    difference=NUMBER,
)


@given(st.lists(ROWS, max_size=3), st.sampled_from(["csv", "jsonl"]), st.integers(1, 9))
def test_rows_come_back_as_they_were(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Row], suffix: str, lost: int
) -> None:
    """Whatever text and numbers are in them; a last row that was cut off is dropped, no other."""
    path = tmp_path_factory.mktemp("rows") / f"rows.{suffix}"
    for row in rows:
        Table(path).add(row)
    assert Table(path).rows == rows
    Table(path).add(Row("cut off"))
    os.truncate(path, path.stat().st_size - lost)
    table = Table(path)
    table.add(Row("after"))
    assert Table(path).rows == [*rows, Row("after")]


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_a_file_of_something_else_is_not_written_to(tmp_path: Path, suffix: str) -> None:
    """Neither another file's rows nor a file of another kind is appended to."""
    path = tmp_path / f"other.{suffix}"
    path.write_text("[1, 2]\n{}\n")
    with pytest.raises(TableError, match="something other than the rows of a sweep"):
        Table(path)
    assert path.read_text() == "[1, 2]\n{}\n"
    with pytest.raises(TableError, match=r"\.csv or a \.jsonl"):
        Table(tmp_path / "rows.txt")


# Which models


def test_the_models_of_a_file(tmp_path: Path) -> None:
    """One a line with its inputs, comments and repetitions left out; a filter keeps some."""
    path = tmp_path / "list.txt"
    path.write_text("# all\n\ntimm/resnet18\n  a.b:net  1,3 2:int64\ntimm/resnet18\n")
    net = Subject("a.b:net", ("1,3", "2:int64"))
    assert subjects(str(path)) == [Subject("timm/resnet18"), net]
    assert subjects(str(path), ["a.*"]) == [net]
    assert Subject("timm/resnet18").collection == "timm"
    assert Subject("timm/file.py:net").collection == ""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("nowhere.txt",), "nowhere.txt is neither torchvision nor timm nor a text file"),
        (("torchvision", "--filter", "nothing*"), "torchvision has no model that matches nothing*"),
        (("torchvision", "--rules", "nothing"), "nothing"),
        (("torchvision", "--out", "rows.txt"), ".csv or a .jsonl"),
        (("torchvision", "--out", "no/such/folder/rows.csv"), "can't be used"),
        (("torchvision", "--jobs", "0"), "--jobs"),
    ],
)
def test_bad_usage_is_one_line(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], said: str
) -> None:
    """Exit code 4, what is wrong in one line, and no process is started."""
    assert main(["sweep", *arguments]) == 4
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert said in error
    assert error.count("\n") == 1


def test_a_reason_is_the_same_in_each_model() -> None:
    """Names, and the line of the source that stopped tracing, are left out of what is counted."""
    said = (
        "no call of it could be traced: tracing stopped in a.b (Layer), at /x/y.py:56: h = int(x)"
    )
    assert general(said) == "no call of it could be traced: tracing stopped in a Layer"
    assert general("it reads the model's input 'x', not a Conv2d") == (
        "it reads the model's input, not a Conv2d"
    )
    assert general("stem.0 is in training mode") == "it is in training mode"
    assert general("stem.0 may also be called") == "it may also be called"
    assert general("the constant, of shape (1, 96, 1), varies") == (
        "the constant, of shape (...), varies"
    )
    assert general("they have 728 and 1 groups") == "they have N and M groups"
