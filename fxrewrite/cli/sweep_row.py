"""What a sweep found for one model, and the file of rows that it writes and goes on from."""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar, Literal

import attrs

from ..errors import FxRewriteError
from ..explain.report import Report

Outcome = Literal[
    "same", "differs", "left alone", "not traceable", "raised", "crashed", "timeout", "memory"
]
WELL: tuple[Outcome, ...] = ("same", "left alone")

# In a reason, what is named after one model: `layer1_0_relu (ReLU)`, `the model's input 'x'`, a
# line of its source, a shape, how many groups, and the module that a sentence begins with.
_DESCRIBED = re.compile(r"\S+ \(([\w.]+(?:\(\))?)\)")
_OF_THE_MODEL = re.compile(r"(the model's (?:input|attribute)) [^\s,]+")
_PLACE = re.compile(r", at \S+:\d+: .*")
_SHAPE = re.compile(r"\((?:\d+, ?)+\d*\)")
_GROUPS = re.compile(r"\d+ and \d+ (?=groups)")
_SUBJECT = re.compile(r"^\S+(?= (?:is|carries|holds|has|may) )")


class TableError(FxRewriteError):
    """The file for the rows can't be written, or holds something else."""


@attrs.frozen
class Row:
    """One model of a sweep: how it was rewritten, whether it stayed the same, and what it took.

    `reasons` counts why anchors stayed: per reason its outcome, how often, and the name of one such
    anchor. `asked` is what `--into` asked for, and `into` what came of it. The errors are those of
    `verify`'s worst tensor: relative, `original_error` and `rewritten_error` against a float64 run.
    `seconds` and `peak_mib` (resident memory, libraries
    included) are those of the whole process, `rewrite_seconds` of the rewrite alone.
    """

    model: str
    rules: str = ""
    asked: str = ""
    outcome: Outcome = "raised"
    detail: str = ""
    inputs: str = ""
    parameters: int | None = None
    batch_norms: int | None = None
    into: str = ""
    anchors: int = 0
    applied: int = 0
    refused: int = 0
    missed: int = 0
    reasons: tuple[dict[str, Any], ...] = ()
    difference: float | None = None
    original_error: float | None = None
    rewritten_error: float | None = None
    rewrite_seconds: float | None = None
    seconds: float | None = None
    peak_mib: int | None = None

    KEY: ClassVar = ("model", "rules", "asked")

    @property
    def key(self) -> tuple[str, str, str]:
        """What tells whether a model was examined already: its name, the rules, and `--into`."""
        return self.model, self.rules, self.asked


_COLUMNS = tuple(field.name for field in attrs.fields(Row))


def accounted(report: Report) -> dict[str, Any]:
    """The part of a row that a report tells: its counts, and its reasons with how often each.

    >>> import fxrewrite as fxr
    >>> from torch import nn
    >>> model = nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3), nn.BatchNorm2d(3)).eval()
    >>> accounted(fxr.plan(model, "conv_bn"))["reasons"][0]["reason"]
    'it reads a ReLU, not a Conv1d, Conv2d or Conv3d'
    """
    reasons: dict[tuple[str, str], dict[str, Any]] = {}
    for finding in (*report.refused, *report.missed):
        reason = general(finding.reason)
        new = {"outcome": finding.outcome, "reason": reason, "count": 0, "example": finding.anchor}
        reasons.setdefault((finding.outcome, reason), new)["count"] += 1
    return {
        "anchors": len(report.findings),
        "applied": len(report.applied),
        "refused": len(report.refused),
        "missed": len(report.missed),
        "reasons": tuple(reasons.values()),
    }


def general(reason: str) -> str:
    """A reason without the names of the model at hand.

    >>> general("the output of conv (Conv2d) is also read by add (add()), which needs it as it is")
    'the output of a Conv2d is also read by add(), which needs it as it is'
    """
    said = _DESCRIBED.sub(_kind, _PLACE.sub("", reason))
    said = _GROUPS.sub("N and M ", _SHAPE.sub("(...)", said))
    return " ".join(_SUBJECT.sub("it", _OF_THE_MODEL.sub(r"\1", said)).split())


def _kind(described: re.Match[str]) -> str:
    kind = described[1]
    return kind if kind.endswith(")") else f"{'an' if kind[0] in 'AEIO' else 'a'} {kind}"


class Table:
    """The rows in a file, `.jsonl` or `.csv` by its suffix; each is added whole or not at all.

    Args:
        path: the file; what is in it already is kept.

    Raises:
        TableError: the file can't be read or written, or holds something else.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        if path.suffix not in (".csv", ".jsonl"):
            raise TableError(f"{path}: rows are written to a .csv or a .jsonl file")
        try:
            self.rows = list(self._read()) if path.exists() else []
            if self._is_csv and not self.rows:
                path.write_text(_as_csv(_COLUMNS))
        except OSError as error:
            raise TableError(f"{path} can't be used: {error.strerror}") from error
        except (ValueError, TypeError, KeyError, csv.Error) as error:
            raise TableError(f"{path} holds something other than the rows of a sweep") from error

    @property
    def last(self) -> dict[tuple[str, str, str], Row]:
        """The last row of each key."""
        return {row.key: row for row in self.rows}

    def add(self, row: Row) -> None:
        """Append a row to the file."""
        data = attrs.asdict(row)
        if self._is_csv:
            data["reasons"] = json.dumps(data["reasons"])
            line = _as_csv("" if data[name] is None else data[name] for name in _COLUMNS)
        else:
            line = json.dumps(data) + "\n"
        # One write to a file open for appending is not mixed with another's, nor cut by Ctrl-C.
        file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(file, line.encode())
        finally:
            os.close(file)
        self.rows.append(row)

    @property
    def _is_csv(self) -> bool:
        return self._path.suffix == ".csv"

    def _read(self) -> Iterable[Row]:
        text = self._path.read_text()
        whole = text[: text.rfind("\n") + 1]
        if whole != text:  # the machine stopped in the middle of a row
            os.truncate(self._path, len(whole.encode()))
        if not self._is_csv:
            yield from (_row(json.loads(line)) for line in whole.splitlines())
            return
        for cells in csv.DictReader(io.StringIO(whole)):
            yield _row({name: _from_cell(name, cell) for name, cell in cells.items()})


def _row(data: dict[str, Any]) -> Row:
    return Row(**{**data, "reasons": tuple(data["reasons"])})


def _as_csv(cells: Iterable[Any]) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(cells)
    return line.getvalue()


def _from_cell(name: str, cell: str) -> Any:
    kind = str(attrs.fields_dict(Row)[name].type)
    if name == "reasons" or "int" in kind or "float" in kind:
        return json.loads(cell) if cell else None
    return cell
