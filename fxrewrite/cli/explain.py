"""The subcommand `fxrewrite explain`: what rules would do to a model, and why not more."""

from __future__ import annotations

import contextlib
import json
import sys
from typing import Annotated

import typer

from ..api import plan
from ..cli import DONE
from .loading import build_model
from .options import DEFAULT_RULES, Json, Model, RuleNames, make_console, rule_sets_of
from .randomising import random_input


def explain_command(
    model: Model,
    names: Annotated[
        list[str] | None,
        typer.Option("--why", metavar="NAME", help="A module or node; repeatable."),
    ] = None,
    rules: RuleNames = DEFAULT_RULES,
    shapes: Annotated[
        list[str] | None,
        typer.Option(
            "--input",
            metavar="SHAPE",
            help="For rules that need shapes: 10,3,224,224 or 1,16:int64, once per argument.",
        ),
    ] = None,
    as_json: Json = False,
) -> int:
    """Tell what rules would do to a model, or why one module or node ends as it does."""
    stdout = sys.stdout
    # What the model's own code prints is no part of the JSON.
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        original = build_model(model)
        # The file of the model may register rule sets, so these are looked up after it ran.
        rule_sets = rule_sets_of(rules)
        inputs = tuple(random_input(each, original) for each in shapes or ())
        report = plan(original, rule_sets, inputs or None)
        answers = {name: report.why(name) for name in names or ()}
    if as_json:
        data = {"version": 1, "model": model, "report": json.loads(report.to_json())}
        print(json.dumps(data | {"why": answers}, indent=2), file=stdout)
        return DONE
    console = make_console()
    console.print("\n".join(answers.values()) if answers else str(report))
    return DONE
