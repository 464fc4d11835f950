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
from typing import TypeAlias

import timm
from torchvision import models

from fxrewrite.cli.sweep_row import WELL, Row, Table, general

PAGE = Path(__file__).parent / "zoo.md"
MARKER = "<!-- What follows is written by docs/make_zoo.py. -->\n"
PACKAGES = (
    "torch torchvision timm transformers segmentation_models_pytorch ultralytics numpy".split()
)
Variant: TypeAlias = "tuple[str, str]"  # rules, and what --into asked for
LIBRARIES = ("torchvision", "timm")
# So many kinds of reasons are listed for each rule set.
MOST = 40
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
    libraries: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        libraries[library(row)].append(row)
    for name, ran in libraries.items():
        yield from ("", f"## {name}", "")
        yield from families(ran) if name == "timm" else per_model(ran)
    for each, group in by_variant(rows).items():
        yield from ("", f"## Reasons, {label(each)}", "")
        yield from reasons(group)
    yield from ("", "## Every row that is not plainly the same", "")
    yield from odd(rows)
    yield from ("", "## Not run", "")
    yield from not_run(rows)


def by_variant(rows: list[Row]) -> dict[Variant, list[Row]]:
    """The rows of each rule set and `--into`, in the order of their first appearance."""
    groups: dict[Variant, list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.rules, row.asked].append(row)
    return groups


def label(variant: Variant) -> str:
    """A rule set, and into what if that was asked for."""
    rules, asked = variant
    return f"`{rules}` into {asked}" if asked else f"`{rules}`"


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
        groups[library(row), label((row.rules, row.asked)), row.outcome].append(row)
    cells = [
        (*key, len(group), *sums(group), max(row.peak_mib or 0 for row in group))
        for key, group in sorted(groups.items())
    ]
    numbers = (name.replace("_", " ") for name in NUMBERS)
    yield from table(("library", "rules", "outcome", "models", *numbers, "largest MiB"), cells)


def per_model(rows: list[Row]) -> Iterator[str]:
    """One line for each model, one column for each rule set and `--into`."""
    of_model: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        of_model[row.model].append(row)
    variants = list(by_variant(rows))
    cells = [
        (
            Path(model).name,
            max(row.batch_norms or 0 for row in group),
            next((row.into for row in group if not row.asked and row.into), ""),
            *(applied(own.get(each, [])) for own in [by_variant(group)] for each in variants),
            largest_error(row.original_error for row in group),
            largest_error(row.rewritten_error for row in group),
            group[0].inputs.replace(":float32", ""),
            f"{max(row.seconds or 0 for row in group):.0f}",
            max(row.peak_mib or 0 for row in group),
        )
        for model, group in sorted(of_model.items())
    ]
    heads = ("original's error", "rewritten's", "inputs", "s", "MiB")
    yield from table(("model", "batch norms", "into", *map(label, variants), *heads), cells)


def families(rows: list[Row]) -> Iterator[str]:
    """One line for each of timm's modules, one column for each rule set and `--into`."""
    variants = list(by_variant(rows))
    of_model: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        of_model[row.model.partition("/")[2]].append(row)
    cells = []
    for family in timm.list_modules():
        names = timm.list_models(module=family)
        group = [row for name in names for row in of_model[name]]
        examined = [row for row in group if row.outcome != "left alone"]
        ran = {row.model: row for row in examined}
        into = Counter(row.into for row in examined if row.into and not row.asked)
        cells.append(
            (
                family,
                len(names),
                len(ran),
                len({row.model for row in examined if row.outcome != "same"}),
                ", ".join(f"{count} {name}" for name, count in into.most_common()),
                sum(row.batch_norms or 0 for row in ran.values()),
                *(applied(own.get(each, [])) for own in [by_variant(group)] for each in variants),
                largest_error(row.rewritten_error for row in examined),
            )
        )
    heads = ("family", "models", "ran", "not the same", "into", "batch norms")
    yield from table((*heads, *map(label, variants), "largest error"), cells)


def applied(rows: list[Row]) -> str:
    """How many anchors were rewritten, of how many; or what became of the one row instead."""
    if len(rows) == 1 and rows[0].outcome != "same":
        return rows[0].outcome
    done, anchors = (sum(getattr(row, name) for row in rows) for name in ("applied", "anchors"))
    return "" if not rows else f"{done:,}" if done == anchors else f"{done:,} of {anchors:,}"


def reasons(rows: list[Row]) -> Iterator[str]:
    """The reasons of what stayed, how often, and where for example; the rare ones counted only."""
    counts: Counter[tuple[str, str]] = Counter()
    examples: dict[tuple[str, str], str] = {}
    for row in rows:
        for each in row.reasons:
            key = each["outcome"], general(each["reason"])  # older rows may not be
            counts[key] += each["count"]
            examples.setdefault(key, f"{short(row)}: {each['example']}")
    cells = [
        (count, outcome, reason, examples[outcome, reason])
        for (outcome, reason), count in counts.most_common(MOST)
    ]
    yield from table(("anchors", "outcome", "reason", "for example"), cells)
    rare = counts.most_common()[MOST:]
    if rare:
        yield from ("", f"And {len(rare)} more, of {sum(count for _, count in rare)} anchors.")


def odd(rows: list[Row]) -> Iterator[str]:
    """Each row that went wrong, or has something to say."""
    told = [
        row for row in rows if row.outcome not in WELL or (row.outcome == "same" and row.detail)
    ]
    cells = [(short(row), label((row.rules, row.asked)), row.outcome, row.detail) for row in told]
    yield from table(("model", "rules", "outcome", "detail"), cells) if cells else ["None."]


def not_run(rows: list[Row]) -> Iterator[str]:
    """What was left alone, and what was not reached."""
    ran: dict[tuple[str, str], set[str]] = defaultdict(set)
    alone: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for row in rows:
        name = row.model.partition("/")[2]
        key = library(row), label((row.rules, row.asked))
        ran[key].add(name)
        if row.outcome == "left alone":
            alone[(*key, row.detail)].append(name)
    for (name, rules, detail), names in sorted(alone.items()):
        yield f"- {name}, {rules}: {len(names)} left alone, since {detail}."
    everything = {"torchvision": set(models.list_models()), "timm": set(timm.list_models())}
    for (name, rules), names in sorted(ran.items()):
        if left := everything.get(name, set()) - names:
            yield f"- {name}, {rules}: {len(left)} of {len(everything[name])} were not reached."


def short(row: Row) -> str:
    """A model's name without the folder of the file that builds it."""
    return row.model if library(row) in LIBRARIES else Path(row.model).name


def sums(rows: Iterable[Row]) -> list[int]:
    """The numbers of some rows, added up."""
    group = list(rows)
    return [sum(getattr(row, name) or 0 for row in group) for name in NUMBERS]


def largest_error(values: Iterable[float | None]) -> str:
    """The largest of some relative errors, or nothing where none was measured."""
    known = [each for each in values if each is not None]
    return f"{max(known):.1e}" if known else ""


def table(heads: Sequence[str], cells: Iterable[Sequence[object]]) -> Iterator[str]:
    """A table in Markdown."""
    yield f"| {' | '.join(heads)} |"
    yield f"|{' --- |' * len(heads)}"
    for row in cells:
        yield f"| {' | '.join(escaped(cell) for cell in row)} |"


def escaped(cell: object) -> str:
    """A cell's text, in which nothing ends it."""
    text = f"{cell:,}" if isinstance(cell, int) else re.sub(r"\S+/site-packages/", "", str(cell))
    return text.replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    main(sys.argv[1:])
