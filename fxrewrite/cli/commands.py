"""The subcommands of `fxrewrite`; each returns its exit code."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.text import Text
from torch import nn

from ..api import Rewriter, rewrite
from ..cli import DONE, NOTHING_MATCHED, OUTPUTS_DIFFER
from ..errors import FxRewriteError, TraceError, UnknownRuleSetError
from ..explain.report import Report
from ..module_utils.running import SEED, run_original, short
from ..rules.registry import RuleSet, get_rule_set, rule_set_names
from ..verification.verify import verify
from .explain import explain_command
from .loading import build_model, load_weights
from .options import DEFAULT_RULES, Json, Model, RuleNames, make_console, progress_bar, rule_sets_of
from .randomising import random_input, randomise_batch_norms
from .sweep import sweep_command
from .timing import time_in_turns

app = typer.Typer(
    help="Rewrite a model's torch.fx graph by rules, verify the result and time it.",
    add_completion=False,
    pretty_exceptions_enable=False,
)

_DEFAULT_INPUTS = ["1,3,224,224"]
_LABEL_WIDTH = 9


app.command("explain")(explain_command)
app.command("sweep")(sweep_command)


class SaveError(FxRewriteError):
    """The rewritten model can't be saved where it should be."""


@app.command("run")
def run_command(
    model: Model,
    rules: RuleNames = DEFAULT_RULES,
    shapes: Annotated[
        list[str],
        typer.Option(
            "--input",
            metavar="SHAPE",
            help="A random input, such as 10,3,224,224 or 1,16:int64, once per argument.",
        ),
    ] = _DEFAULT_INPUTS,
    weights: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The model's state dict: .pt, .pth or .safetensors."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Where to save the rewritten model, once verified."),
    ] = None,
    as_json: Json = False,
    strict: Annotated[bool, typer.Option("--strict", help="Fail where no rule applies.")] = False,
) -> int:
    """Rewrite a model, verify it against the original, and time both."""
    if out is not None:
        _check_place(out)
    stdout = sys.stdout
    # What the model's own code prints is no part of the JSON.
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        console = make_console(quiet=as_json)
        original = build_model(model)
        # The file of the model may register rule sets, so these are looked up after it ran.
        rule_sets = rule_sets_of(rules)
        inputs = tuple(random_input(each, original) for each in shapes)
        given = [f"{','.join(map(str, x.shape))}:{short(x.dtype)}" for x in inputs]
        console.print(Text.assemble((model, "bold"), f" on {' and '.join(given)}"))
        record: dict[str, Any] = {
            "version": 1,
            "model": model,
            "inputs": given,
            "weights": str(weights) if weights else None,
            "random_batch_norms": 0,
        }
        if weights is not None:
            load_weights(original, weights)
        elif count := randomise_batch_norms(original, inputs):
            record["random_batch_norms"] = count
            console.print(
                f"no --weights: {count} batch norm{'s' * (count > 1)} got random statistics "
                f"and affine weights (seed {SEED})"
            )
        code = _rewrite_and_measure(console, record, original, rule_sets, inputs, out, strict)
    if as_json:
        print(json.dumps(record, indent=2, allow_nan=False), file=stdout)
    return code


@app.command("rules")
def rules_command() -> int:
    """List the registered rule sets, their rules and patterns."""
    console = make_console()
    for name in rule_set_names():
        try:
            rule_set = get_rule_set(name)
        except UnknownRuleSetError as error:
            _say(console, name, str(error), "red")
            continue
        console.print(Text.assemble((name, "bold"), f"  {rule_set.doc}"))
        for rule in rule_set.rules:
            console.print(f"  {rule.name}  {rule.pattern}")
            if rule.doc:
                console.print(f"    {rule.doc}")
    return DONE


def _rewrite_and_measure(
    console: Console,
    record: dict[str, Any],
    original: nn.Module,
    rule_sets: Sequence[RuleSet],
    inputs: Any,
    out: Path | None,
    strict: bool,
) -> int:
    rewritten, report = _rewritten(original, rule_sets, inputs)
    console.print(f"\n{report}\n")
    record |= {"report": json.loads(report.to_json()), "verification": None, "timing": None}
    record["saved"] = None
    if strict and not report.applied:
        _say(console, "failed", "no rule applied, and --strict is given", "bold red")
        return NOTHING_MATCHED
    with progress_bar() as progress:
        verification = verify(original, rewritten, inputs, progress=progress)
        record["verification"] = verification.to_dict()
        record["guilty"] = []
        if not verification.same:
            found = Rewriter(rule_sets).localise(original, inputs, inputs, progress=progress)
            record["guilty"] = [str(each) for each in found.guilty]
    if not verification.same:
        _say(console, "differs", str(verification), "bold red")
        for guilty in record["guilty"]:
            _say(console, "to blame", guilty, "bold red")
        return OUTPUTS_DIFFER
    _say(console, "verified", str(verification), "bold green")
    if out is not None:
        _save(rewritten, out)
        record["saved"] = str(out)
        _say(console, "saved", f"{out} (torch.load it with weights_only=False)", "bold")
    timing = time_in_turns(original, rewritten, inputs)
    record["timing"] = timing.to_dict()
    _say(console, "speed-up", str(timing), "bold")
    return DONE


def _rewritten(
    original: nn.Module, rule_sets: Sequence[RuleSet], inputs: Any
) -> tuple[nn.Module, Report]:
    try:
        rewritten, report = rewrite(original, rule_sets, inputs)
        if report.stops and not report.nodes:
            first = report.stops[0]
            raise TraceError(f"nothing could be traced; it stopped in {first.where}: {first}")
        return rewritten, report
    except TraceError:
        raise
    except FxRewriteError:
        # Where the input is at fault, a run of the model itself says so in its own words.
        run_original(original, inputs)
        raise


def _check_place(out: Path) -> None:
    if not out.parent.is_dir():
        raise SaveError(f"--out {out}: there is no folder {out.parent}")
    if out.is_dir():
        raise SaveError(f"--out {out}: that is a folder; name a file in it")


def _save(module: nn.Module, out: Path) -> None:
    """Save a module such that the file is there whole or not at all."""
    part = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        torch.save(module, part)
        part.replace(out)
    except Exception as error:
        raise SaveError(f"--out {out}: the model can't be saved: {error}") from error
    finally:
        part.unlink(missing_ok=True)


def _say(console: Console, label: str, text: str, style: str) -> None:
    in_one_line = " ".join(text.split())
    console.print(Text.assemble((f"{label:{_LABEL_WIDTH}}", style), " ", in_one_line))
