"""The subcommand `fxrewrite sweep`: many models, each examined by itself, and a table of rows."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table as RichTable

from ..cli import DONE, ENDED, NOT_TRACEABLE, OUTPUTS_DIFFER
from ..rules.registry import get_rule_set
from .options import DEFAULT_RULES, RuleNames
from .sweep_models import subjects
from .sweep_one import Settings
from .sweep_pool import Bounds, examine_all
from .sweep_row import WELL, Row, Table


def sweep_command(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="torchvision, timm, or a file with one MODEL (and inputs) a line.",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Where the rows go, .jsonl or .csv; sweep-SOURCE.jsonl by default."
        ),
    ] = None,
    rules: RuleNames = DEFAULT_RULES,
    into: Annotated[
        Literal["graph", "modules"] | None,
        typer.Option(help="As for `fxrewrite.rewrite`; each has rows of its own."),
    ] = None,
    patterns: Annotated[
        list[str] | None,
        typer.Option("--filter", metavar="GLOB", help="Only models of such a name; repeatable."),
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Processes at a time.")] = 1,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds a model may take.")] = 300,
    memory: Annotated[
        int, typer.Option(min=1, help="MiB a model may take, libraries included.")
    ] = (8192),
    max_parameters: Annotated[
        int | None, typer.Option(min=1, help="Leave larger models alone.")
    ] = None,
    retry: Annotated[
        bool, typer.Option("--retry", help="Take those up again that went wrong before.")
    ] = False,
) -> int:
    """Rewrite and verify many models, one process each; go on where an earlier run stopped."""
    chosen = subjects(source, patterns or ())
    names = tuple(name.strip() for each in rules for name in each.split(","))
    if all(each.collection for each in chosen):  # a model of one's own may register its rule sets
        for name in names:
            get_rule_set(name)
    table = Table(out or Path(f"sweep-{Path(source).stem}.jsonl"))
    settings = Settings(names, into, max_parameters, max(1, torch.get_num_threads() // jobs))
    last = table.last
    done = {key for key, row in last.items() if not (retry and row.outcome not in WELL)}
    todo = [each for each in chosen if settings.key(each.name) not in done]
    progress = Progress(
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}", markup=False),
        console=Console(stderr=True, markup=False, highlight=False, soft_wrap=True),
        transient=True,
    )
    with progress, _ended_by_sigterm():
        task = progress.add_task("", total=len(chosen), completed=len(chosen) - len(todo))
        for row in examine_all(todo, settings, Bounds(timeout, memory), jobs):
            table.add(row)
            progress.update(task, advance=1, description=row.model)
            if row.outcome not in WELL:
                progress.console.print(f"{row.model}: {row.outcome}: {row.detail}")
    last = table.last
    rows = [last[settings.key(each.name)] for each in chosen]
    _print_summary(rows)
    outcomes = {row.outcome for row in rows}
    return (
        OUTPUTS_DIFFER if "differs" in outcomes else NOT_TRACEABLE if outcomes - {*WELL} else DONE
    )


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """End as Ctrl-C would, so that no process of ours is left behind."""

    def end(*_: object) -> None:
        sys.exit(ENDED)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _print_summary(rows: list[Row]) -> None:
    console = Console(markup=False, emoji=False, highlight=False, soft_wrap=True)
    numbers = ("anchors", "applied", "refused", "missed")
    table = RichTable("outcome", *("models", *numbers), box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for outcome in (*dict.fromkeys(row.outcome for row in rows), "all"):
        group = [row for row in rows if outcome in (row.outcome, "all")]
        sums = [sum(getattr(row, name) for row in group) for name in numbers]
        table.add_row(outcome, *(f"{number:,}" for number in (len(group), *sums)))
    console.print(table)
    for (outcome, reason), count in _reasons(rows).most_common():
        console.print(f"{count:7,}  {outcome}: {reason}")


def _reasons(rows: Iterable[Row]) -> Counter[tuple[str, str]]:
    counts: Counter[tuple[str, str]] = Counter()
    for row in rows:
        for each in row.reasons:
            counts[each["outcome"], each["reason"]] += each["count"]
    return counts
