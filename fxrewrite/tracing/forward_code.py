"""Which code belongs to a forward, as opposed to what handles the values of a trace for FX."""

from __future__ import annotations

import functools
import sysconfig
import traceback
from pathlib import Path
from types import CodeType, FrameType

import torch
from torch import nn


def source_line(code: CodeType, line: int) -> str:
    """A line of a function's file: file, number and text."""
    at = traceback.FrameSummary(code.co_filename, line, code.co_name)
    return f"{at.filename}:{at.lineno}: {at.line}"


def line_of(frame: FrameType) -> str:
    """Where a frame is: file, number and text of the line."""
    return source_line(frame.f_code, frame.f_lineno)


def first_line(module: nn.Module) -> str:
    """Where the forward of a module begins; empty where it is not written in Python."""
    code = getattr(type(module).forward, "__code__", None)
    return "" if code is None else source_line(code, code.co_firstlineno)


_TORCH = Path(torch.__file__).parent
# Torch's own code that may be part of a forward; the rest of it handles values for FX.
_OF_FORWARDS = tuple(
    f"{_TORCH}/{name}"
    for name in ("functional.py", "nn/functional.py", "nn/modules/", "utils/checkp")
)
_NOT_WATCHED = (f"{Path(__file__).parent.parent}/", f"{_TORCH}/", "<frozen")
_PYTHON = f"{sysconfig.get_paths()['stdlib']}/"


@functools.lru_cache(maxsize=4096)
def is_of_a_forward(code: CodeType) -> bool:
    """Whether a function may belong to a forward."""
    path = code.co_filename
    if code is torch.is_tensor.__code__:
        return True
    if path.startswith(_OF_FORWARDS):
        return not path.endswith("nn/modules/module.py")
    is_python = path.startswith(_PYTHON) and "site-packages" not in path
    return not is_python and not path.startswith(_NOT_WATCHED)


def is_torchs_own(code: CodeType) -> bool:
    """Whether a function is torch's, such as the forward of a container."""
    return code.co_filename.startswith(f"{_TORCH}/")
