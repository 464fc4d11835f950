"""What the documentation shows is what happens."""

from __future__ import annotations

import contextlib
import doctest
import importlib
import io
import linecache
import pkgutil
import re
import runpy
import timeit
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils import benchmark

import fxrewrite
from fxrewrite import patterns
from fxrewrite.rules import registry

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.py"))
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
OUTPUT = re.compile(r"(?:^#.*\n)*\Z", re.MULTILINE)


def doctests() -> list[doctest.DocTest]:
    """The doctests of all installed modules of the package."""
    # An editable install keeps `patterns` elsewhere, so it has to be walked by itself.
    packages = (fxrewrite, patterns)
    names = {package.__name__ for package in packages}
    for package in packages:
        inside = pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
        names.update(module.name for module in inside)
    finder = doctest.DocTestFinder(exclude_empty=True)
    modules = [importlib.import_module(name) for name in sorted(names)]
    return [test for module in modules for test in finder.find(module) if test.examples]


@pytest.fixture(autouse=True)
def _leave_no_trace(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Rule sets that an example registers, and the seeds it sets, are its own."""
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.mark.slow
@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if BLOCK.search(page.read_text())],
    ids=lambda page: page.name,
)
def test_page(page: Path) -> None:
    """The code blocks of a page run from top to bottom and print what the page shows."""
    text = page.read_text()
    namespace: dict[str, Any] = {"__name__": f"docs.{page.stem}"}
    show_code(text, page)
    for block in BLOCK.finditer(text):
        line = text.count("\n", 0, block.start(1))
        if block[1].startswith(">>> "):
            check_session(block[1], namespace, page, line)
        else:
            check_code(block[1], namespace, page, line)


def show_code(text: str, page: Path) -> None:
    """Let the source of functions on a page be read, as that of a file is."""
    lines = ["\n"] * (text.count("\n") + 1)
    for block in BLOCK.finditer(text):
        if not block[1].startswith(">>> "):
            line = text.count("\n", 0, block.start(1))
            code = block[1].splitlines(keepends=True)
            lines[line : line + len(code)] = code
    linecache.cache[str(page)] = (len(text), None, lines, str(page))


def check_session(source: str, namespace: dict[str, Any], page: Path, line: int) -> None:
    """A block in the form of an interactive session."""
    test = doctest.DocTestParser().get_doctest(source, {}, page.name, str(page), line)
    test.globs = namespace
    assert run(test) == ""


def check_code(source: str, namespace: dict[str, Any], page: Path, line: int) -> None:
    """A block of plain code, whose output is in the comment at its end, if it prints anything."""
    shown = [each[2:] for each in OUTPUT.search(source)[0].splitlines()]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        # Empty lines before the code let tracebacks name the lines of the page.
        exec(compile("\n" * line + source, str(page), "exec"), namespace)
    assert [each.rstrip() for each in printed.getvalue().splitlines()] == shown


def run(test: doctest.DocTest) -> str:
    """What differs from what the examples show."""
    said: list[str] = []
    doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(
        test, out=said.append, clear_globs=False
    )
    return "".join(said)


@pytest.mark.parametrize("test", doctests(), ids=lambda test: test.name)
def test_docstring(test: doctest.DocTest) -> None:
    """The examples of a docstring give what the docstring shows."""
    assert run(test) == ""


class OneRun:
    """Stands for torch's timer: runs the statement once, however often it is asked."""

    def __init__(self, stmt: str, globals: dict[str, Any], num_threads: int) -> None:
        self._timer = timeit.Timer(stmt, globals=globals)
        self._seconds: float | None = None

    def timeit(self, number: int) -> SimpleNamespace:
        if self._seconds is None:
            self._seconds = self._timer.timeit(1)
        return SimpleNamespace(median=self._seconds)


@pytest.mark.slow
@pytest.mark.parametrize("script", TUTORIALS, ids=lambda script: script.stem)
def test_tutorial(
    script: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A tutorial runs to its end, where it has printed the last of its results."""
    monkeypatch.setattr(benchmark, "Timer", OneRun)
    runpy.run_path(str(script), run_name="__main__")
    assert re.search(r"fused and scripted +[\d.]+ ms +[\d.]+x\n$", capsys.readouterr().out)


PROMISE = re.compile(r"^\| (?!promise|---)(.+) \| `(.+)` \| `(.+)` \|$", re.MULTILINE)


def test_each_promise_has_a_file_and_a_test() -> None:
    """Whatever docs/soundness.md promises, the file that enforces it and its test are there."""
    promises = PROMISE.findall((ROOT / "docs" / "soundness.md").read_text())
    assert len(promises) > 40
    for promise, enforced_in, tested_by in promises:
        assert (ROOT / enforced_in).is_file(), promise
        file, _, name = tested_by.partition("::")
        assert f"def {name}(" in (ROOT / file).read_text(), promise


PEER_ROW = re.compile(r"^\| (`test_\w+`) \| (.+?) \| ?(.*) \|$", re.MULTILINE)


def test_each_test_of_a_peer_has_its_test_or_a_reason() -> None:
    """docs/peers.md names each test in tests/peers/, and of what has none it says why."""
    sections = (ROOT / "docs" / "peers.md").read_text().split("\n## ")[1:]
    files = {re.search(r"tests/peers/\w+\.py", section)[0]: section for section in sections}
    assert {ROOT / name for name in files} == set((ROOT / "tests" / "peers").glob("*.py"))
    for name, section in files.items():
        written = set(re.findall(r"^def (test_\w+)\(", (ROOT / name).read_text(), re.MULTILINE))
        named = set()
        for theirs, here, differs in PEER_ROW.findall(section):
            tests = set(re.findall(r"`(\S+)`", here))
            assert tests or (here == "none" and differs), theirs
            assert theirs.strip("`") in tests or differs, theirs
            named |= {each for each in tests if not (ROOT / each).is_file()}
        assert named == written, name


def test_readme_commands() -> None:
    """CI tests by the very command that the README gives."""
    command = 'pip install -e ".[dev]" && pytest -n auto'
    readme = (ROOT / "README.md").read_text()
    assert f"{command}\n" in readme
    assert command in (ROOT / ".ci" / "run").read_text()
    assert 'pip install -e ".[dev]" && fxrewrite run torchvision.models:resnet18\n' in readme


def test_each_subpackage_is_installed() -> None:
    """Setuptools installs only what pyproject.toml names, and an editable install hides a gap."""
    named = (ROOT / "pyproject.toml").read_text()
    found = {fxrewrite.__name__, patterns.__name__} | {
        module.name
        for module in pkgutil.walk_packages(fxrewrite.__path__, "fxrewrite.")
        if module.ispkg
    }
    assert not [name for name in sorted(found) if f'"{name}",' not in named]
