"""Examine models in processes of their own, each with a bound of time and of memory."""

from __future__ import annotations

import contextlib
import gc
import math
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import attrs
import torch

from .sweep_models import Subject
from .sweep_one import Settings, examine
from .sweep_row import Outcome, Row

_MIB = 2**20
_POLL_SECONDS = 0.05


@attrs.frozen
class Bounds:
    """What one process may take: seconds, and MiB of resident memory, libraries included."""

    seconds: float
    mib: int


def examine_all(
    subjects: Sequence[Subject], settings: Settings, bounds: Bounds, jobs: int
) -> Iterator[Row]:
    """The row of each model, in the order in which they are done.

    A server process imports torch and the models' libraries once, and forks a process per model.
    Whatever becomes of such a one (a crash, an endless loop, too much memory) is a row as well.
    When the caller stops, or is interrupted, all processes are killed.

    Args:
        subjects: the models.
        settings: what to do with each.
        bounds: beyond these a process is killed.
        jobs: how many run at a time.
    """
    # Libraries may make locks in the server, which ends without giving them back; nothing is lost.
    os.environ.setdefault("PYTHONWARNINGS", "ignore::UserWarning:multiprocessing.resource_tracker")
    can_fork = "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if can_fork else "spawn")
    if can_fork:
        libraries = {each.collection for each in subjects if each.collection}
        context.set_forkserver_preload([__name__, *sorted(libraries)])
    waiting, running = deque(subjects), list[_Running]()
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                running.append(_Running(context, waiting.popleft(), settings, bounds))
            wait([each.pipe for each in running], _POLL_SECONDS)
            for each in list(running):
                row = each.row()
                if row is not None:
                    running.remove(each)
                    yield row
    finally:
        for each in running:
            each.kill()


class _Running:
    """A process that examines one model."""

    def __init__(self, context: Any, subject: Subject, settings: Settings, bounds: Bounds) -> None:
        self._subject, self._settings, self._bounds = subject, settings, bounds
        self.pipe: Connection
        self.pipe, theirs = context.Pipe(duplex=False)
        self._process: BaseProcess = context.Process(
            target=_examine, args=(theirs, subject, settings, bounds), daemon=True
        )
        self._start = time.monotonic()
        self._process.start()
        theirs.close()
        self._stage = "starting"
        self._peak = 0

    def row(self) -> Row | None:
        """What came of it, or None while it runs within its bounds."""
        self._peak = max(self._peak, _resident_mib(self._process.pid))
        seconds = time.monotonic() - self._start
        try:
            while self.pipe.poll():
                told = self.pipe.recv()
                if isinstance(told, Row):
                    self.kill()
                    return told
                self._stage = told
        except (EOFError, OSError):
            self._process.join()
            code = self._process.exitcode or 0
            return self._ended("crashed", f"{_signal_or_code(code)} while it was {self._stage}")
        if self._peak > self._bounds.mib:
            return self._ended("memory", f"more than {self._bounds.mib} MiB, {self._stage}")
        if seconds > self._bounds.seconds:
            return self._ended("timeout", f"more than {self._bounds.seconds:g} s, {self._stage}")
        return None

    def kill(self) -> None:
        """End the process and all that it started."""
        with contextlib.suppress(OSError, TypeError):
            os.killpg(self._process.pid, signal.SIGKILL)  # type: ignore[arg-type]
        self._process.kill()
        self._process.join()
        self.pipe.close()

    def _ended(self, outcome: Outcome, detail: str) -> Row:
        self.kill()
        seconds = round(time.monotonic() - self._start, 2)
        key = self._settings.key(self._subject.name)
        return Row(*key, outcome, detail, seconds=seconds, peak_mib=self._peak or None)


def _examine(pipe: Connection, subject: Subject, settings: Settings, bounds: Bounds) -> None:
    os.setsid()  # the terminal's Ctrl-C is the parent's affair
    signal.alarm(math.ceil(bounds.seconds) + 60)  # for a parent that was killed itself
    quiet = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):  # what models print is no part of a sweep
        os.dup2(quiet, stream)
    gc.freeze()  # what the server imported would only be copied by looking for garbage in it
    torch.set_num_threads(settings.threads)
    row = examine(subject, settings, pipe.send)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pipe.send(attrs.evolve(row, peak_mib=peak // (_MIB if sys.platform == "darwin" else 1024)))


def _resident_mib(pid: int | None) -> int:
    try:
        pages = Path(f"/proc/{pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE") // _MIB
    except (OSError, IndexError):
        pass
    if sys.platform == "linux":
        return 0  # it has just ended
    told = subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, text=True)
    return int(told.stdout.strip() or 0) // 1024


def _signal_or_code(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
