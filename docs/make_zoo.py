"""Write the tables of docs/zoo.md from the rows of sweeps.

    python docs/make_zoo.py torchvision.jsonl timm.jsonl others.jsonl

Of a model that has several rows for the same rules, in whatever file, the last one counts. What
stands in docs/zoo.md above the marker is written by hand, and kept.
"""

from __future__ import annotations

import platform
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import timm
from torchvision import models

from fxrewrite.cli.sweep_row import WELL, Row, Table, general

PAGE = Path(__file__).parent / "zoo.md"
MARKER = "<!-- What follows is written by docs/make_zoo.py. -->\n"
PACKAGES = (
    "torch torchvision timm transformers segmentation_models_pytorch ultralytics numpy".split()
)
LIBRARIES = ("torchvision", "timm")
NUMBERS = ("batch_norms", "anchors", "applied", "refused", "missed")


def main(paths: Sequence[str]) -> None:
    """Replace what follows the marker."""
    last = {row.key: row for path in paths for row in Table(Path(path)).rows}
    by_hand = PAGE.read_text().partition(MARKER)[0]
    PAGE.write_text(by_hand + MARKER + "".join(f"{line}\n" for line in lines(list(last.values()))))


def lines(rows: list[Row]) -> Iterator[str]:
    """All tables."""
    yield from ("", f"Ran on {', '.join(versions())}.", "", "## In all", "")
    yield from outcomes(rows)
    of_rules: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        of_rules[row.rules].append(row)
    for rules, group in of_rules.items():
        libraries: dict[str, list[Row]] = defaultdict(list)
        for row in group:
            libraries[library(row)].append(row)
        for name, ran in libraries.items():
            yield from ("", f"## {name}, `{rules}`", "")
            yield from families(ran) if name == "timm" else per_model(ran)
        yield from ("", f"## All reasons, `{rules}`", "")
        yield from reasons(group)
    yield from ("", "## Every row that is not plainly the same", "")
    yield from odd(rows)
    yield from ("", "## Not run", "")
    yield from not_run(rows)


def versions() -> Iterator[str]:
    """What was installed, and the machine."""
    yield f"Python {platform.python_version()}"
    for package in PACKAGES:
        try:
            yield f"{package} {version(package)}"
        except PackageNotFoundError:
            continue
    yield f"CPU ({platform.machine()}), float32"


def library(row: Row) -> str:
    """The heading that a row belongs under."""
    name, slash, _ = row.model.partition("/")
    return name if slash and name in LIBRARIES else "other libraries"


def outcomes(rows: list[Row]) -> Iterator[str]:
    """One line for each library, rules and outcome."""
    groups: dict[tuple[str, str, str], list[Row]] = defaultdict(list)
    for row in rows:
        groups[library(row), row.rules, row.outcome].append(row)
    cells = [
        (name, f"`{rules}`", outcome, len(group), *sums(group))
        for (name, rules, outcome), group in sorted(groups.items())
    ]
    yield from table(("library", "rules", "outcome", "models", *NUMBERS), cells)


def per_model(rows: list[Row]) -> Iterator[str]:
    """One line for each model."""
    cells = [
        (
            Path(row.model).name,
            row.outcome,
            row.into,
            *sums([row]),
            error(row.original_error),
            error(row.rewritten_error),
            row.inputs.replace(":float32", ""),
            "" if row.seconds is None else f"{row.seconds:.1f}",
            row.peak_mib or "",
        )
        for row in sorted(rows, key=lambda row: row.model)
    ]
    heads = ("original's error", "rewritten's", "inputs", "s", "MiB")
    yield from table(("model", "outcome", "into", *NUMBERS, *heads), cells)


def families(rows: list[Row]) -> Iterator[str]:
    """One line for each of timm's modules."""
    ran = {row.model.partition("/")[2]: row for row in rows}
    cells = []
    for family in timm.list_modules():
        names = timm.list_models(module=family)
        group = [ran[name] for name in names if name in ran]
        examined = [row for row in group if row.outcome != "left alone"]
        same = sum(row.outcome == "same" for row in examined)
        worst = max((row.rewritten_error or 0 for row in examined), default=None)
        into = Counter(row.into for row in examined if row.into)
        modes = ", ".join(f"{count} {name}" for name, count in into.most_common())
        cells.append((family, len(names), len(examined), same, modes, *sums(group), error(worst)))
    yield from table(("family", "models", "ran", "same", "into", *NUMBERS, "largest error"), cells)


def reasons(rows: list[Row]) -> Iterator[str]:
    """Each distinct reason, how often, and where for example."""
    counts: Counter[tuple[str, str]] = Counter()
    examples: dict[tuple[str, str], str] = {}
    for row in rows:
        for each in row.reasons:
            key = each["outcome"], general(each["reason"])  # older rows may not be
            counts[key] += each["count"]
            examples.setdefault(key, f"{short(row)}: {each['example']}")
    cells = [
        (count, outcome, reason, examples[outcome, reason])
        for (outcome, reason), count in counts.most_common()
    ]
    yield from table(("anchors", "outcome", "reason", "for example"), cells)


def odd(rows: list[Row]) -> Iterator[str]:
    """Each row that went wrong, or has something to say."""
    told = [
        row for row in rows if row.outcome not in WELL or (row.outcome == "same" and row.detail)
    ]
    cells = [(short(row), f"`{row.rules}`", row.outcome, row.detail) for row in told]
    yield from table(("model", "rules", "outcome", "detail"), cells) if cells else ["None."]


def not_run(rows: list[Row]) -> Iterator[str]:
    """What was left alone, and what was not reached."""
    ran: dict[tuple[str, str], set[str]] = defaultdict(set)
    alone: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for row in rows:
        name = row.model.partition("/")[2]
        ran[library(row), row.rules].add(name)
        if row.outcome == "left alone":
            alone[library(row), row.rules, row.detail].append(name)
    for (name, rules, detail), names in sorted(alone.items()):
        yield f"- {name}, `{rules}`: {len(names)} left alone, since {detail}."
    everything = {"torchvision": set(models.list_models()), "timm": set(timm.list_models())}
    for (name, rules), names in sorted(ran.items()):
        if left := everything.get(name, set()) - names:
            yield f"- {name}, `{rules}`: {len(left)} of {len(everything[name])} were not reached."


def short(row: Row) -> str:
    """A model's name without the folder of the file that builds it."""
    return row.model if library(row) in LIBRARIES else Path(row.model).name


def sums(rows: Iterable[Row]) -> list[int]:
    """The numbers of some rows, added up."""
    group = list(rows)
    return [sum(getattr(row, name) or 0 for row in group) for name in NUMBERS]


def error(value: float | None) -> str:
    """A relative error, or nothing."""
    return "" if value is None else f"{value:.1e}" if value else "0"


def table(heads: Sequence[str], cells: Iterable[Sequence[object]]) -> Iterator[str]:
    """A table in Markdown."""
    yield f"| {' | '.join(head.replace('_', ' ') for head in heads)} |"
    yield f"|{' --- |' * len(heads)}"
    for row in cells:
        yield f"| {' | '.join(escaped(cell) for cell in row)} |"


def escaped(cell: object) -> str:
    """A cell's text, in which nothing ends it."""
    text = f"{cell:,}" if isinstance(cell, int) else re.sub(r"\S+/site-packages/", "", str(cell))
    return text.replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    main(sys.argv[1:])
