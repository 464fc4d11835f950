"""The command line: what it prints, saves and answers with, and that its verdict can be trusted."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils import _pytree as pytree

import fxrewrite as fxr
from fxrewrite import registry
from fxrewrite.cli import main
from fxrewrite.loading import LoadError, build_model
from fxrewrite.measuring import InputError, run, verify
from fxrewrite.randomising import random_input, randomise_batch_norms
from fxrewrite.timing import time_in_turns

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
    assert lines[at + 1] == "  fold_conv_bn  conv -> between* -> bn"
    assert lines[at + 2].startswith("    Scale the weight and shift the bias")


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


@pytest.mark.parametrize("missing", ["typer", "rich", "safetensors"])
def test_without_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], missing: str
) -> None:
    """Where the extra is not installed, one line says how to install it."""
    again = ("fxrewrite.commands", "fxrewrite.loading", "fxrewrite.randomising")
    for name in list(sys.modules):
        if name in again or name.startswith(f"{missing}."):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    assert main(["rules"]) == 4
    assert capsys.readouterr().err == f"error: {missing} is missing; pip install 'fxrewrite[cli]'\n"


# Building and randomising


def test_a_model_instance_is_taken_as_it_is(folder: Path) -> None:
    """What the spec names may be a model already; it is put into eval mode."""
    model = build_model("models.py:instance")
    assert isinstance(model, nn.Linear)
    assert not model.training


def test_a_file_may_be_named_like_a_module(tmp_path: Path) -> None:
    """A file called `torch.py` is run, and does not take torch's place."""
    (tmp_path / "torch.py").write_text("from torch.nn import Identity")
    assert isinstance(build_model(f"{tmp_path}/torch.py:Identity"), nn.Identity)
    assert sys.modules["torch"] is torch


def test_random_inputs_fit_the_model() -> None:
    """An input has the described shape and dtype, else the model's dtype; integers are small."""
    model = nn.Linear(2, 2).bfloat16()
    assert random_input("4,3", model).dtype == torch.bfloat16
    assert random_input("4,3:complex64", model).dtype == torch.complex64
    words = random_input("50:int32", model)
    assert (words.dtype, words.shape) == (torch.int32, (50,))
    assert (int(words.min()), int(words.max())) == (0, 9)
    with pytest.raises(LoadError):
        random_input("4,0", model)


def test_random_statistics_do_not_drown_the_input() -> None:
    """Through 40 randomised layers the output still depends on the input, so errors show too."""

    def block() -> list[nn.Module]:
        depthwise = nn.Conv2d(32, 32, 3, padding=1, groups=32, bias=False)
        pointwise = nn.Conv2d(32, 32, 1, bias=False)
        return [depthwise, nn.BatchNorm2d(32), nn.ReLU6(), pointwise, nn.BatchNorm2d(32)]

    model = nn.Sequential(*[layer for _ in range(20) for layer in block()]).eval()
    one, other = torch.randn(2, 1, 32, 8, 8)
    assert randomise_batch_norms(model, (one,)) == 40
    a, b = run(model, (one,)), run(model, (other,))
    assert torch.isfinite(a).all()
    assert (a - b).abs().max() > 1e-2 * a.abs().max()


def test_randomising_draws_all_that_a_fold_reads() -> None:
    """Means, variances, weights of both signs and biases differ from channel to channel."""
    model = nn.Sequential(nn.Conv2d(3, 64, 1), nn.BatchNorm2d(64)).eval()
    randomise_batch_norms(model, (torch.randn(2, 3, 8, 8),))
    bn = model[1]
    for drawn in (bn.running_mean, bn.running_var, bn.weight, bn.bias):
        assert drawn.unique().numel() > 60
    assert (bn.running_var > 0).all()
    assert (bn.weight < 0).any()
    assert (bn.weight > 0).any()


def test_trained_batch_norms_are_not_randomised() -> None:
    """Statistics that are not the initial ones are the model's own, and stay."""
    model = _conv_bn()
    before = copy.deepcopy(model.state_dict())
    assert randomise_batch_norms(model, (torch.randn(2, 3, 8, 8),)) == 0
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_batch_norms_that_the_run_misses_are_randomised_too() -> None:
    """A batch norm that is not called, or not reached as the input is wrong, is randomised."""
    model = nn.ModuleDict({"unused": nn.BatchNorm2d(4)})
    assert randomise_batch_norms(model, (torch.ones(1),)) == 1
    assert model["unused"].running_mean.any()


# Verifying


class _Gives(nn.Module):
    """A model that gives what a function makes of its input."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.function(*inputs)


@dataclasses.dataclass
class _Boxes:
    boxes: Any
    count: int


_X = torch.tensor([[1.1, -2.3], [3.7, 0.6]])
_NAN, _INF = float("nan"), float("inf")


def _verdict(original: Callable[..., Any], rewritten: Callable[..., Any]) -> Any:
    return verify(_Gives(original), _Gives(rewritten), (_X,))


@pytest.mark.parametrize(
    ("original", "rewritten", "reason"),
    [
        (lambda x: x, lambda x: x[:1], "was float32 [2, 2] and became float32 [1, 2]"),
        (lambda x: x, lambda x: x.half(), "was float32 [2, 2] and became float16 [2, 2]"),
        (lambda x: (x, x), lambda x: [x, x], "the output was"),
        (lambda x: {"a": x}, lambda x: {"b": x}, "the output was"),
        (lambda x: (x, 3), lambda x: (x, 4), "output[1] was 3 and became 4"),
        (lambda x: (x, 1), lambda x: (x, True), "output[1] was 1 and became True"),
        (lambda x: (x, object()), lambda x: (x, object()), "is of type object, which can't"),
        (lambda x: (x, x.to_sparse()),) * 2 + ("can't be compared",),
        (lambda x: (x, x > 0), lambda x: (x, x > 2), "output[1] differs in 2 of 4 elements"),
        (lambda x: _Boxes(x, 1), lambda x: _Boxes(x, 2), "_Boxes.count'] was 1 and became 2"),
        (lambda x: x.where(x > 0, _NAN), lambda x: x.where(x > 2, _NAN), "in other places"),
        (lambda x: x.where(x > 0, _INF), lambda x: x.where(x > 0, -_INF), "in other places"),
        (lambda x: x.where(x > 0, _INF), lambda x: x.where(x > 0, _NAN), "in other places"),
        (lambda x: x * _NAN, lambda x: x * _NAN, "no finite floating-point number"),
        (lambda x: 3, lambda x: 3, "no finite floating-point number"),
        (lambda x: x, lambda x: x @ x[0, 0], "the rewritten model raised RuntimeError"),
    ],
)
def test_what_no_rounding_explains(
    original: Callable[..., Any], rewritten: Callable[..., Any], reason: str
) -> None:
    """Another structure, shape, dtype, integer, or place of a NaN is a mismatch, and is named."""
    verdict = _verdict(original, rewritten)
    assert not verdict.same
    assert reason in str(verdict)


_NESTED = st.recursive(
    st.just("leaf"),
    lambda inner: (
        st.lists(inner, min_size=1, max_size=3)
        | st.lists(inner, min_size=1, max_size=3).map(tuple)
        | st.dictionaries(st.text("ab", min_size=1), inner, min_size=1, max_size=3)
        | inner.map(lambda value: _Boxes(value, 1))
    ),
    max_leaves=6,
)


def _filled(shape: Any, scales: list[float], x: torch.Tensor) -> Any:
    if isinstance(shape, str):
        return x * scales.pop(0)
    if isinstance(shape, dict):
        return {name: _filled(inner, scales, x) for name, inner in shape.items()}
    if isinstance(shape, _Boxes):
        return _Boxes(_filled(shape.boxes, scales, x), shape.count)
    return type(shape)(_filled(inner, scales, x) for inner in shape)


@given(shape=_NESTED, data=st.data())
def test_an_error_in_any_tensor_of_a_nested_output_is_found(shape: Any, data: Any) -> None:
    """However outputs are nested, equal ones pass, and one tensor that is off by 1e-4 does not."""
    count = repr(shape).count("'leaf'")
    wrong = data.draw(st.integers(0, count - 1))
    scales = [1.0 + 1e-4 * (i == wrong) for i in range(count)]

    def original(x: torch.Tensor) -> Any:
        return _filled(shape, [1.0] * count, x)

    assert _verdict(original, original).same
    verdict = _verdict(original, lambda x: _filled(shape, list(scales), x))
    assert [check.same for check in verdict.tensors] == [i != wrong for i in range(count)]
    assert not verdict.same


class _Box:
    """A container that pytree knows, without names for what it holds."""

    def __init__(self, content: Any) -> None:
        self.content = content


pytree.register_pytree_node(_Box, lambda box: ([box.content], None), lambda x, _: _Box(x[0]))


def test_a_container_without_names_is_compared_by_position() -> None:
    """A registered container that can't name what it holds is compared all the same."""
    verdict = _verdict(lambda x: (x, _Box(x)), lambda x: (x, _Box(x * 1.01)))
    assert [(check.name, check.same) for check in verdict.tensors] == [
        ("output[0]", True),
        ("output[1]", False),
    ]


def test_noise_is_told_from_error() -> None:
    """A difference passes where the original's own rounding is as large, and only there."""

    def noisy(x: torch.Tensor) -> torch.Tensor:
        return x + 1e4 - 1e4

    def rounds_otherwise(x: torch.Tensor) -> torch.Tensor:
        return x + 3e4 - 3e4

    verdict = _verdict(noisy, rounds_otherwise)
    assert verdict.same
    assert verdict.worst.difference > 1e-4
    assert verdict.worst.original_error > 1e-5
    assert not _verdict(lambda x: x.clone(), rounds_otherwise).same
    assert not _verdict(noisy, lambda x: x * 1.01).same


def test_a_float64_model_is_compared_directly() -> None:
    """In float64 there is nothing more exact to compare with, and 1e-9 is too much."""
    x = _X.double()
    assert verify(_Gives(lambda x: x), _Gives(lambda x: x + 1e-15), (x,)).same
    verdict = verify(_Gives(lambda x: x), _Gives(lambda x: x + 1e-9 * x), (x,))
    assert not verdict.same
    assert "float64 itself" in str(verdict)


def test_a_model_that_cannot_run_in_float64_is_compared_directly() -> None:
    """A model with a float32 of its own is verified without a reference, and that is said."""
    constant = torch.eye(2)
    same, wrong = (
        _verdict(lambda x: x @ constant, lambda x, by=by: x @ constant * by) for by in (1, 1.001)
    )
    assert (same.same, wrong.same) == (True, False)
    assert same.worst.original_error is None
    assert "no float64 run, as the model raised RuntimeError in it" in str(same)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_a_right_fold_passes_and_a_wrong_one_fails_in_each_dtype(dtype: torch.dtype) -> None:
    """In each dtype the folded model is the same, and one whose bias is half too large is not."""
    x = torch.randn(2, 3, 8, 8, dtype=dtype)
    original = _conv_bn().to(dtype)
    fused = fxr.fuse(original)
    assert verify(original, fused, (x,)).same
    with torch.no_grad():
        fused.get_parameter("0.bias").mul_(1.5)
    assert not verify(original, fused, (x,)).same


def test_random_numbers_in_a_forward_are_the_same_in_each_run() -> None:
    """A model that draws random numbers gets the same draws, and the caller's go on as before."""
    draws = _Gives(lambda x: x + torch.rand(2))
    before = torch.get_rng_state()
    assert verify(draws, copy.deepcopy(draws), (_X,)).same
    first = run(draws, (_X,))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(run(draws, (_X,)), first)


def test_overflow_that_both_share_is_no_difference() -> None:
    """Where both overflow in half precision, and float64 does not, the rest is compared."""
    x = _X.half()
    overflows = _Gives(lambda x: x * 3e4)
    assert torch.isinf(run(overflows, (x,))).any()
    assert verify(overflows, copy.deepcopy(overflows), (x,)).same
    assert not verify(overflows, _Gives(lambda x: x * 2.9e4 * (1 + 9 * (x > 3))), (x,)).same


def test_verifying_and_timing_leave_inputs_and_model_alone() -> None:
    """A model that writes to its input neither changes ours nor sees its own changes again."""
    x = _X.clone()
    doubles = _Gives(lambda x: x.mul_(2))
    linear = nn.Linear(2, 2)
    before = linear.weight.clone()
    assert verify(doubles, copy.deepcopy(doubles), (x,)).same
    assert verify(linear, copy.deepcopy(linear), (x,)).same
    time_in_turns(doubles, doubles, (x,), seconds=0)
    assert torch.equal(x, _X)
    assert linear.weight.dtype == torch.float32
    assert torch.equal(linear.weight, before)


def test_an_input_that_the_original_refuses_is_an_error() -> None:
    """Where the original itself raises there is nothing to verify."""
    with pytest.raises(InputError, match=r"\[1, 3\] float32: RuntimeError"):
        verify(nn.Linear(2, 2), nn.Linear(2, 2), (torch.ones(1, 3),))


def test_both_models_are_timed_in_turns() -> None:
    """After the warm-up each round times both, and who is first changes from round to round."""
    calls: list[str] = []
    models = [_Gives(lambda x, name=name: calls.append(name)) for name in "ab"]
    timing = time_in_turns(models[0], models[1], (_X,), seconds=0)
    assert len(timing.original) == len(timing.rewritten) == 5
    assert "".join(calls[-10:]) == "abbaabbaab"
