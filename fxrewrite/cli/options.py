"""What several subcommands of `fxrewrite` take and print with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress as ProgressBar
from rich.progress import TaskID

from ..rules.registry import RuleSet, get_rule_set
from ..verification.verify import Progress

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="package.module:callable or file.py:callable.")
]
RuleNames = Annotated[
    list[str], typer.Option(metavar="NAMES", help="Rule sets, comma-separated or repeated.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")]

DEFAULT_RULES = ["conv_bn"]


def rule_sets_of(names: Sequence[str]) -> list[RuleSet]:
    """The rule sets that `--rules` names; raises UnknownRuleSetError."""
    return [get_rule_set(name.strip()) for name in ",".join(names).split(",")]


def make_console(*, quiet: bool = False) -> Console:
    """A console that prints text as it is."""
    # Wrapping is the terminal's affair: in a pipe it would break names.
    return Console(quiet=quiet, markup=False, emoji=False, highlight=False, soft_wrap=True)


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """A bar on standard error, which is gone when the work is done; none where nobody looks."""
    console = Console(stderr=True)
    with ProgressBar(console=console, transient=True, disable=not console.is_terminal) as bar:
        tasks: dict[str, TaskID] = {}

        def advance(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what)
            bar.update(tasks[what], completed=done, total=total)

        yield advance
