"""The command line: what it prints, saves and answers with, and that its verdict can be trusted."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from fxrewrite.cli import main
from fxrewrite.cli.randomising import randomise_batch_norms
from fxrewrite.rules import registry

MODELS = """
import sys
from torch import nn
import fxrewrite as fxr
from fxrewrite.patterns.conv_bn import ConvBn

def net():
    print("the model's own words")
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())

def no_batch_norm():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())

class Branches(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x

class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.linear = nn.Embedding(10, 4), nn.Linear(4, 2)
    def forward(self, words, x):
        return {"words": self.linear(self.table(words)), "x": x}

class LongNames(nn.Module):
    def __init__(self):
        super().__init__()
        self.a_container_with_quite_a_long_name_of_its_own = nn.ModuleDict({
            "and_a_block_in_it_with_a_long_name_too": nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3))})
    def forward(self, x):
        for container in self.children():
            for block in container.values():
                return block(x)

def not_picklable():
    model = net()
    model[2].why = lambda: None
    return model

def needs_arguments(width): return nn.Linear(width, 1)
def raises(): raise ValueError("no luck\\nat all")
def exits(): sys.exit(0)
def number(): return 3
constant = 3
instance = nn.Linear(224, 1)

@fxr.rule
def forgets_eps(m: ConvBn) -> fxr.Replace:
    bn = fxr.evolve(m.bn, eps=0.0)
    mean, scale = bn.running_mean, bn.weight / bn.running_var.sqrt()
    weight = m.conv.weight * scale.view(-1, 1, 1, 1)
    bias = (m.conv.bias - mean) * scale + bn.bias
    return fxr.Replace(fxr.evolve(m.conv, weight=weight, bias=bias))

@fxr.rule
def raising(m: ConvBn) -> fxr.Replace:
    raise KeyError("oops")

for each in (forgets_eps, raising):
    if each.name not in fxr.rule_set_names():
        fxr.register(fxr.RuleSet(each.name, [each]))
"""
SMALL = ("--input", "1,3,8,8")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with `models.py` to run in; what a run leaves in the process is undone."""
    (tmp_path / "models.py").write_text(MODELS)
    (tmp_path / "broken.py").write_text("def (")
    (tmp_path / "broken.pt").write_bytes(b"no weights at all")
    (tmp_path / "broken.safetensors").write_bytes(b"no weights at all")
    torch.save({"0.weight": torch.ones(1)}, tmp_path / "others.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save(nn.Linear(1, 1), tmp_path / "whole_model.pt")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    imported = set(sys.modules)
    yield tmp_path
    for name in sys.modules.keys() - imported:
        if name.startswith(("models", "broken")):
            del sys.modules[name]


def _json_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, Any]:
    code = main(["run", *arguments, "--json"])
    return code, json.loads(capsys.readouterr().out)


def _conv_bn() -> nn.Sequential:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()
    randomise_batch_norms(model, (torch.randn(2, 3, 8, 8),))
    return model


# Runs that succeed


def test_a_run_prints_report_verdict_and_speed_up(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run says what was random, what was rewritten, that it is the same, and how fast it is."""
    assert main(["run", "models.py:net", *SMALL]) == 0
    out = capsys.readouterr().out
    assert "models.py:net on 1,3,8,8:float32" in out
    assert "1 batch norm got random statistics and affine weights" in out
    assert re.search(r"fold_conv_bn +1 +0 +0\n", out)
    assert "\nverified  relative error " in out
    assert "\nspeed-up  " in out


@pytest.mark.slow
def test_resnet18_in_a_pipe(tmp_path: Path) -> None:
    """The installed command folds all of ResNet-18; in a pipe its output has no colour codes."""
    command = [Path(sys.executable).with_name("fxrewrite"), "run", "torchvision.models:resnet18"]
    done = subprocess.run(
        [*command, "--input", "1,3,32,32"], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"fold_conv_bn +20 +0 +0\n", done.stdout)
    assert "verified" in done.stdout
    assert "\x1b" not in done.stdout


def test_long_names_stay_whole(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A qualified name longer than 80 columns is not broken where no terminal asks for it."""
    assert main(["run", "models.py:LongNames", *SMALL]) == 0
    name = "a_container_with_quite_a_long_name_of_its_own.and_a_block_in_it_with_a_long_name_too"
    [line] = [x for x in capsys.readouterr().out.splitlines() if f"  {name}.1  " in x]
    assert f" {name}.0 (ReLU), not a Conv1d, Conv2d or Conv3d" in line


def test_the_saved_model_is_the_rewritten_one(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What `--out` saves has the given weights folded in, and gives what the original gives."""
    original = _conv_bn()
    torch.save(original.state_dict(), "weights.pt")
    arguments = ("models.py:net", *SMALL, "--weights", "weights.pt", "--out", "folded.pt")
    code, data = _json_of(capsys, *arguments)
    assert (code, data["saved"], data["random_batch_norms"]) == (0, "folded.pt", 0)
    saved = torch.load("folded.pt", weights_only=False)
    assert [type(each).__name__ for each in saved.children()] == ["Conv2d", "ReLU"]
    x = torch.randn(2, 3, 9, 9)
    torch.testing.assert_close(saved(x), original.double()(x.double()).float())


def test_weights_come_in_three_forms(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A state dict, a checkpoint that holds one, and a safetensors file load the same weights."""
    state = _conv_bn().state_dict()
    torch.save(state, "state.pt")
    torch.save({"state_dict": state, "epoch": 3}, "checkpoint.pth")
    safetensors.torch.save_file(state, "state.safetensors")
    given = [
        _json_of(capsys, "models.py:net", *SMALL, "--weights", name)[1]["verification"]
        for name in ("state.pt", "checkpoint.pth", "state.safetensors")
    ]
    random = _json_of(capsys, "models.py:net", *SMALL)[1]["verification"]
    assert given[0] == given[1] == given[2] != random


def test_json_is_all_that_stdout_gets(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With `--json` stdout holds one object, even where the model's own code prints."""
    code = main(["run", "models.py:net", *SMALL, "--json"])
    captured = capsys.readouterr()
    data = json.loads(captured.out)
    assert code == 0
    assert "the model's own words" in captured.err
    assert data["report"]["counts"]["fold_conv_bn"] == {"applied": 1, "refused": 0, "missed": 0}
    assert data["verification"]["same"] is True
    assert data["random_batch_norms"] == 1
    assert data["timing"]["speed_up"] > 0


def test_two_runs_are_the_same(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Model, statistics and inputs come from fixed seeds: all but the times is the same again."""
    first, second = (_json_of(capsys, "models.py:net", *SMALL)[1] for _ in range(2))
    del first["timing"], second["timing"]
    assert first == second


def test_several_inputs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`--input` given twice makes two arguments, each with a dtype of its own."""
    inputs = ("--input", "2,5:int64", "--input", "3,2")
    code, data = _json_of(capsys, "models.py:TwoInputs", *inputs)
    assert code == 0
    assert data["inputs"] == ["2,5:int64", "3,2:float32"]
    assert [x["name"] for x in data["verification"]["tensors"]] == [
        "output['words']",
        "output['x']",
    ]


@pytest.mark.parametrize("rules", [("--rules", "conv_bn,raising"), ("--rules", "conv_bn") * 2])
def test_rules_may_be_listed_or_repeated(
    folder: Path, capsys: pytest.CaptureFixture[str], rules: tuple[str, ...]
) -> None:
    """All named sets run, the earlier ones first; the file of the model may register some."""
    code, data = _json_of(capsys, "models.py:net", *SMALL, *rules)
    assert code == 0
    assert data["report"]["counts"]["fold_conv_bn"]["applied"] == 1


def test_the_rules_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    """`fxrewrite rules` shows each set's name and purpose, and each rule's pattern and purpose."""
    assert main(["rules"]) == 0
    lines = capsys.readouterr().out.splitlines()
    at = lines.index("conv_bn  Fold each batch norm into the convolution before it.")
    assert lines[at + 1] == "  fold_conv_bn  conv -> between* -> laid* -> bn"
    assert lines[at + 2].startswith("    Scale weight and bias as the batch norm would")


# Runs that fail


def test_strict_fails_where_nothing_applies(folder: Path) -> None:
    """A run that rewrites nothing gives 1 under `--strict`, and saves nothing; else it is done."""
    arguments = ["run", "models.py:no_batch_norm", *SMALL, "--out", "out.pt"]
    assert main([*arguments, "--strict"]) == 1
    assert not (folder / "out.pt").exists()
    assert main(arguments) == 0


def test_a_rule_that_is_slightly_wrong_is_found_out(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A fold that forgets `eps`, an error of some 1e-5, gives 2; nothing is saved or timed."""
    arguments = (*SMALL, "--rules", "forgets_eps", "--out", "out.pt")
    code, data = _json_of(capsys, "models.py:net", *arguments)
    [tensor] = data["verification"]["tensors"]
    assert code == 2
    assert not data["verification"]["same"]
    [guilty] = data["guilty"]
    assert re.match(r"rule 'forgets_eps' \(.*models.py:\d+\) at 0 -> 1, which became 0", guilty)
    assert tensor["original_error"] < tensor["limit"] < tensor["rewritten_error"] < 1e-4
    assert data["timing"] is data["saved"] is None
    assert not (folder / "out.pt").exists()


def test_an_untraceable_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A model that branches on its input gives 3, and the message names the model and the line."""
    assert main(["run", "models.py:Branches"]) == 3
    err = capsys.readouterr().err
    assert "Branches" in err
    assert "return x if x.sum() > 0 else -x" in err
    assert "Traceback" not in err


BAD_USAGE = {
    "run": "Missing argument 'MODEL'",
    "run models.py:net --nonsense": "No such option",
    "nonsense": "No such command",
    "": "Missing command",
    "run models.py": "names no callable",
    "run nowhere.py:net": "there is no file nowhere.py",
    "run nowhere:net": "No module named 'nowhere'",
    "run broken.py:net": "SyntaxError",
    "run models.py:nothing": "has no 'nothing'",
    "run models.py:constant": "of type int, not a callable",
    "run models.py:number": "built no nn.Module but a value of type int",
    "run models.py:needs_arguments": "without arguments: missing a required argument: 'width'",
    "run models.py:raises": "ValueError: no luck at all (models.py:",
    "run models.py:exits": "SystemExit",
    "run models.py:net --input 1x3": "'1x3' is not of the form",
    "run models.py:net --input 1,-3": "'1,-3' is not of the form",
    "run models.py:net --input 1,3:float23": "'1,3:float23' is not of the form",
    "run models.py:net --input 1,4,8,8": "[1, 4, 8, 8] float32: RuntimeError",
    "run models.py:net --rules nothing": "no rule set is named 'nothing'",
    "run models.py:net --rules raising --input 1,3,8,8": "raised KeyError('oops')",
    "run models.py:net --weights nowhere.pt": "there is no weights file nowhere.pt",
    "run models.py:net --weights broken.pt": "weights file broken.pt",
    "run models.py:net --weights broken.safetensors": "weights file broken.safetensors",
    "run models.py:net --weights others.pt": 'Missing key(s) in state_dict: "0.bias"',
    "run models.py:net --weights list.pt": "no state dict but a value of type list",
    "run models.py:net --weights whole_model.pt": "holds more than tensors",
    "run models.py:net --weights .": "weights file . can't be read",
    "run models.py:net --out nowhere/out.pt": "there is no folder nowhere",
    "run models.py:net --out .": "that is a folder",
}


@pytest.mark.parametrize("line", BAD_USAGE)
def test_bad_usage_gets_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], line: str
) -> None:
    """What can't be done gives 4 and one line on stderr that says what is wrong."""
    assert main(line.split()) == 4
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert BAD_USAGE[line] in err


def test_a_model_that_cannot_be_saved_leaves_no_file(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Saving that fails half-way leaves the folder, and a file of that name, as they were."""
    (folder / "out.pt").write_text("what was there before")
    before = sorted(folder.iterdir())
    assert main(["run", "models.py:not_picklable", *SMALL, "--out", "out.pt"]) == 4
    assert "can't be saved" in capsys.readouterr().err
    assert (folder / "out.pt").read_text() == "what was there before"
    assert [x for x in sorted(folder.iterdir()) if x.name != "__pycache__"] == before


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_without_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], missing: str
) -> None:
    """Where the extra is not installed, one line says how to install it."""
    again = ("fxrewrite.cli.commands", "fxrewrite.cli.loading", "fxrewrite.cli.randomising")
    for name in list(sys.modules):
        if name in again or name.startswith(f"{missing}."):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    assert main(["rules"]) == 4
    assert capsys.readouterr().err == f"error: {missing} is missing; pip install 'fxrewrite[cli]'\n"


def test_a_safetensors_file_without_safetensors(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    """It is needed for such a file only, and missing that, one line says so."""
    for name in list(sys.modules):
        if name.startswith("safetensors."):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    assert main(["run", "models.py:net", *SMALL, "--weights", "broken.safetensors"]) == 4
    assert capsys.readouterr().err == "error: safetensors is missing; pip install safetensors\n"
