"""Say in plain words where and why tracing stopped."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import attrs
import torch
from torch import fx, nn

from .forward_code import source_line

_TORCHS_OWN = f"{Path(torch.__file__).parent}/_"
_BRANCHES = "cannot be used as inputs to control flow"
_PLAIN_WORDS = {
    _BRANCHES: "it branches on a value that only a real run has",
    "cannot be iterated": "it iterates over a value whose length only a real run has",
    "'len' is not supported": "it asks for the length of a value that only a real run has",
    "__int__ returned non-int": "it makes a number of a value that only a real run has",
    "argument must be a string": "it makes a number of a value that only a real run has",
    "is not a member": "it uses a parameter that belongs to no module of the model",
}


class NotInGraphError(Exception):
    """A forward does, or goes by, what a graph would not have; where, if no frame tells."""

    def __init__(self, reason: str, line: str = "") -> None:
        super().__init__(reason)
        self.line = line


@attrs.frozen
class Stop:
    """A module whose forward could not be traced: the source line, the reason, what was raised.

    `name` is its qualified name, empty for the model itself. `anchors` is how many modules of the
    kinds that the rules look for are inside it.
    """

    name: str
    kind: str
    line: str
    reason: str
    said: str
    anchors: int = 0
    error: Exception | None = attrs.field(default=None, repr=False, eq=False)

    @property
    def where(self) -> str:
        """The module by name and type."""
        return f"{self.name} ({self.kind})" if self.name else self.kind

    @property
    def is_branch(self) -> bool:
        """Whether it asks if a value is true."""
        return _BRANCHES in self.said

    def __str__(self) -> str:
        """The reason, and the line."""
        return f"{self.reason}, at {self.line}" if self.line else self.reason

    @property
    def summary(self) -> str:
        """The reason and the line, with how many anchors are inside."""
        return f"{self} ({self.anchors} anchors inside)"

    def to_dict(self) -> dict[str, Any]:
        """The stop as plain data."""
        return attrs.asdict(self, filter=lambda field, _: field.name != "error")

    def advice(self, kind: str) -> str:
        """What to tell somebody who asked for one graph of a model of this kind."""
        keep = f"keep that module as one node by Rewriter(rules, leaf_modules=[{self.name!r}]), "
        at = f", at\n  {self.line}\n" if self.line else " "
        return (
            f"tracing {kind} stopped in {self.where}{at}"
            f"because {self.reason}{f' ({self.said})' if self.said else ''}.\n"
            f"Leave out into='graph' to have all parts rewritten that can be traced; or else "
            f"{keep if self.name else ''}give Rewriter a tracer= or pass your own GraphModule."
        )


def stop(model: nn.Module, name: str, error: Exception) -> Stop:
    """Where tracing stopped: the line of the innermost forward that an error went through.

    Args:
        model: the module that was traced.
        name: the qualified name of the module in it whose forward raised.
        error: what was raised.
    """
    names = {id(module): name for name, module in model.named_modules()}
    line, module = "", model.get_submodule(name)
    for frame, lineno in _user_frames(error):
        inner = frame.f_locals.get("self")
        if isinstance(inner, nn.Module) and id(inner) in names:
            name, module = names[id(inner)], inner
        line = source_line(frame.f_code, lineno)
    reason = next((words for part, words in _PLAIN_WORDS.items() if part in str(error)), None)
    said = f"{type(error).__name__}: {error}"
    if isinstance(error, NotInGraphError):
        reason, said, line = str(error), "", error.line or line
    reason = reason or "the forward raised there"
    return Stop(name, type(module).__name__, line, reason, said, error=error)


def _user_frames(error: Exception) -> Iterator[tuple[FrameType, int]]:
    """The frames of an error that are of a forward, outermost first."""
    fx_folder, own = Path(fx.__file__).parent, Path(__file__).parent.parent
    for frame, lineno in traceback.walk_tb(error.__traceback__):
        path = Path(frame.f_code.co_filename)
        ours = own in path.parents or path == Path(nn.modules.module.__file__)
        if not ours and fx_folder not in path.parents and not str(path).startswith(_TORCHS_OWN):
            yield frame, lineno
