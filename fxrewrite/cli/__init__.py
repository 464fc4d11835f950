"""The command `fxrewrite`: its exit codes, and one line instead of a traceback."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import cast

from ..errors import FxRewriteError, InputError, TraceError

DONE, NOTHING_MATCHED, OUTPUTS_DIFFER, NOT_TRACEABLE, BAD_USAGE = range(5)
INTERRUPTED, ENDED = 130, 143
_EXTRA = ("typer", "rich")
_LONGEST = 500


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and give its exit code.

    >>> main(["rules", "--nonsense"])
    4

    Args:
        arguments: what follows the command's name; by default the program's own.

    Returns:
        0 done and verified, 1 nothing matched under `--strict`, 2 outputs differ, 3 not
        traceable, 4 bad usage, 130 interrupted, 143 a sweep that was ended by SIGTERM.
    """
    try:
        import typer

        from .commands import app
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in _EXTRA:
            raise
        return _failed(f"{missing} is missing; pip install 'fxrewrite[cli]'")
    # Typer names this class in some versions only; its code would be 2, which is taken.
    usage_error = cast("type[Exception]", typer.BadParameter.__mro__[1])
    try:
        code = app(arguments, standalone_mode=False, prog_name="fxrewrite")
    except TraceError as error:
        return _failed(str(error), NOT_TRACEABLE)
    except InputError as error:
        return _failed(f"{_in_one_line(error)} (describe its input by --input)")
    except FxRewriteError as error:
        return _failed(_in_one_line(error))
    except usage_error as error:
        return _failed(f"{_in_one_line(error)} (see fxrewrite --help)")
    except (typer.Abort, KeyboardInterrupt):
        return _failed("interrupted", INTERRUPTED)
    return int(code or DONE)


def _failed(message: str, code: int = BAD_USAGE) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code


def _in_one_line(error: BaseException) -> str:
    format_message = getattr(error, "format_message", error.__str__)
    message = " ".join(str(format_message()).split())
    return message if len(message) <= _LONGEST else f"{message[:_LONGEST]} ..."
