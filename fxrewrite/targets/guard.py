"""What is noticed when modules that were rewritten together are called apart."""

from __future__ import annotations

import sys
import threading
from types import CodeType, FrameType
from typing import Any, NoReturn, TypeAlias
from weakref import ref

import attrs
import torch
from torch import nn
from torch.compiler import is_compiling

from ..engine.bindings import Shown
from ..errors import GuardError
from ..module_utils.torch_private import version_of
from ..tracing.passages import Passage, is_passed_over
from .local_proof import flaw

Place: TypeAlias = tuple[str, int, str, int]
"""An instruction of a function: its file, the function's first line and name, the offset."""

_Given: TypeAlias = "tuple[ref[torch.Tensor], object, Pair, tuple[CodeType, int] | None]"


@attrs.frozen(eq=False)
class Pair:
    """Two modules of which the second is only ever called on what the first one gave.

    `places` are the lines of the user's code that call them. It `is_direct` where no function of
    the forward stands between the two. It `counts_writes` where other code may change the value in
    between, on a way that was not seen. It `is_alone` where each of them is called at one place.
    `seen` are the places where the first one was seen to be called. At another one, the function
    there must give the value to the second one alone, and, if it `is_late`, do nothing before.
    """

    first: str
    second: str
    places: tuple[str, str]
    is_direct: bool = True
    counts_writes: bool = False
    is_alone: bool = True
    seen: frozenset[Place] = frozenset()
    is_late: bool = False

    def merged(self, other: Pair) -> Pair:
        """One pair for two places; what holds at both of them."""
        return attrs.evolve(
            self,
            is_direct=self.is_direct and other.is_direct,
            counts_writes=self.counts_writes or other.counts_writes,
            is_alone=self.is_alone and other.is_alone,
            seen=self.seen | other.seen,
            is_late=self.is_late or other.is_late,
        )

    def error(self, what: str) -> GuardError:
        """The error for a call that is otherwise."""
        at = "".join(
            f"\n  {name} is called at {place}"
            for name, place in zip((self.first, self.second), self.places, strict=True)
            if place
        )
        return GuardError(
            f"{what}. {self.first} and {self.second} were rewritten as one, since each call of "
            f"{self.second} read what {self.first} gave:{at}\nLeave one of the two out of the "
            "rewrite, or give rewrite() example_inputs that go this way."
        )


class Guard(threading.local):
    """What the modules of one model have given and nobody has taken yet, in each thread by itself.

    The model itself carries two hooks, `enter` and `leave`.
    """

    def __init__(self) -> None:
        self.given: dict[str, list[_Given]] = {}
        self.depth = 0
        self._outermost: FrameType | None = None
        self._handled: BaseException | None = None
        self._raised: GuardError | None = None

    def __reduce__(self) -> Any:
        return Guard, ()

    def enter(self, module: nn.Module, args: Any) -> None:
        """Before the model runs: what a call that raised has left is forgotten."""
        if is_compiling():
            return
        # Ctrl-C ends a call without its hooks.
        if not self.depth or not _is_running(self._outermost):
            self.given.clear()
            self.depth, self._raised = 0, None
            self._outermost, self._handled = sys._getframe(1), sys.exc_info()[1]
        self.depth += 1

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """After it ran: all that was given has been taken, unless the forward raised."""
        if is_compiling():
            return
        self.depth -= 1
        if self.depth:
            return
        is_raising = sys.exc_info()[1] is not self._handled
        left, error = next(iter(self.given.values()), None), self._raised
        self.given.clear()
        self._outermost = self._handled = self._raised = None
        if is_raising:
            return
        if error is not None:  # which the model's own code has caught
            raise error
        if left is not None:
            pair = left[0][2]
            raise pair.error(f"what {pair.first} gave was not given to {pair.second}")

    def fail(self, error: GuardError) -> NoReturn:
        """Raise, and forget what was given."""
        self.given.clear()
        self._raised = error if self.depth else None
        raise error


def _is_running(frame: FrameType | None) -> bool:
    """Whether a frame is one of the calls that are under way in this thread."""
    now: FrameType | None = sys._getframe(1)
    while now is not None and now is not frame:
        now = now.f_back
    return now is not None


@attrs.frozen(eq=False)
class Watch:
    """What is noticed of the calls of one module.

    It `takes` what the first ones of these pairs gave, it is the first one of the pair that it
    `gives` for, and it may be called on tensors of the kinds that it `expects`, on any if none.
    """

    name: str
    guard: Guard
    takes: tuple[Pair, ...] = ()
    gives: Pair | None = None
    expects: frozenset[Shown] = frozenset()

    def expect(self, value: Any) -> None:
        """Look at what the module is called on."""
        if Shown(value.dim(), value.dtype) not in self.expects:
            known = " or ".join(sorted(f"{each.rank} of {each.dtype}" for each in self.expects))
            self.guard.fail(
                GuardError(
                    f"{self.name} was called on a tensor of {value.dim()} dimensions and "
                    f"{value.dtype}, and was rewritten for {known}, which it was called on in the "
                    "run on example_inputs. Give rewrite() example_inputs that go this way."
                )
            )

    def take(self, value: Any) -> None:
        """Look for what the module is called on among what others gave."""
        given = self.guard.given
        for pair in self.takes:
            held = given.get(pair.first, ())
            for each in held:
                tensor, version, _, place = each
                if tensor() is value or not pair.is_direct:
                    if len(held) == 1:
                        del given[pair.first]
                    else:
                        given[pair.first] = [other for other in held if other is not each]
                    if pair.counts_writes and version != version_of(value):
                        what = f"what {pair.first} gave was changed in place before {pair.second}"
                        self.guard.fail(pair.error(what))
                    if place is not None and (reason := _strays(place, pair)) is not None:
                        what = f"what {pair.first} gave at a place not seen may go elsewhere"
                        self.guard.fail(pair.error(f"{what}: {reason}"))
                    return
        pair = self.takes[0]
        what = f"{pair.second} was called on something else than {pair.first} gave"
        self.guard.fail(pair.error(what))

    def give(self, pair: Pair, output: Any) -> None:
        """Note what the module gave."""
        guard, version = self.guard, None
        if pair.counts_writes:
            if output.is_inference():
                guard.fail(
                    pair.error(
                        "torch counts no writes in inference mode, so that it is not seen whether "
                        f"what {pair.first} gave is changed in place; use torch.no_grad() instead"
                    )
                )
            version = version_of(output)
        code, at = _caller()
        place = None if place_of(code, at) in pair.seen else (code, at)
        given, now = guard.given, (ref(output), version, pair, place)
        before = given.get(pair.first)
        if before is None:
            given[pair.first] = [now]
            return
        # Outside of a call of the model, one that raised may have left it.
        if not guard.depth:
            before[:] = [each for each in before if each[0]() is not None]
        if before and pair.is_alone:
            what = f"{pair.first} was called twice, and {pair.second} not in between"
            guard.fail(pair.error(what))
        before.append(now)


def place_of(code: CodeType, at: int) -> Place:
    """An instruction of a function, as it is the same in a copy of a graph's code."""
    return code.co_filename.partition("_with_key>")[0], code.co_firstlineno, code.co_name, at


def _caller() -> tuple[CodeType, int]:
    """The code that calls a guarded module, and where in it."""
    frame = sys._getframe(3)
    while frame.f_back is not None and is_passed_over(frame.f_code):
        frame = frame.f_back
    return frame.f_code, frame.f_lasti


def _strays(place: tuple[CodeType, int], pair: Pair) -> str | None:
    """Why a value that was given there may not come here alone, or None."""
    code, at = _caller()
    if code is not place[0]:
        return "it is taken by another function"
    return flaw(Passage(code, place[1], at), late=pair.is_late)
