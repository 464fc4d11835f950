"""Notice, when a model runs, that modules which were rewritten together are called apart."""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Sequence
from typing import Any

import attrs
import torch
from torch import nn

from ..errors import GuardError


@attrs.frozen(eq=False)
class Pair:
    """Two modules of which the second is only ever called on what the first one gave.

    `places` are the lines of the user's code that call them. It `is_direct` where no function of
    the forward stands between the two. It `counts_writes` where other code may change the value in
    between, on a way that was not seen.
    """

    first: str
    second: str
    places: tuple[str, str]
    is_direct: bool = True
    counts_writes: bool = False

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


class Guard:
    """What the guarded modules of one model have given and nobody has taken yet, in each thread."""

    def __init__(self) -> None:
        self._local = threading.local()

    def __reduce__(self) -> Any:
        return Guard, ()

    @property
    def pending(self) -> dict[Pair, weakref.ref[torch.Tensor]]:
        """By pair, the tensor that the first module gave."""
        try:
            found: dict[Pair, weakref.ref[torch.Tensor]] = self._local.pending
        except AttributeError:
            found = self._local.pending = {}
            self._local.versions = {}
            self._local.depth = 0
        return found

    def enter(self, module: nn.Module, args: Any) -> None:
        """Before the model runs: what a call that raised has left is forgotten."""
        if torch.compiler.is_compiling():
            return
        pending = self.pending
        if not self._local.depth:
            pending.clear()
        self._local.depth += 1

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """After it ran: all that was given has been taken, unless the forward raised."""
        if torch.compiler.is_compiling():
            return
        pending = self.pending
        self._local.depth -= 1
        if pending and not self._local.depth:
            pair = next(iter(pending))
            pending.clear()
            if sys.exc_info()[0] is None:
                raise pair.error(f"what {pair.first} gave was not given to {pair.second}")

    def given(self, pair: Pair, output: torch.Tensor) -> None:
        """The first module of a pair gave this."""
        pending = self.pending
        before = pending.get(pair)
        # Outside of a call of the model, one that raised may have left it.
        if before is not None and (self._local.depth or before() is not None):
            pending.clear()
            raise pair.error(f"{pair.first} was called twice, and {pair.second} not in between")
        pending[pair] = weakref.ref(output)
        if pair.counts_writes:
            if output.is_inference():
                raise pair.error(
                    "torch counts no writes in inference mode, so that it is not seen whether what "
                    f"{pair.first} gave is changed in place; use torch.no_grad() instead"
                )
            self._local.versions[pair] = output._version

    def taken(self, pair: Pair, value: Any) -> None:
        """The second module of a pair is called on this."""
        before = self.pending.pop(pair, None)
        if before is None or (pair.is_direct and before() is not value):
            self.pending.clear()
            raise pair.error(f"{pair.second} was called on something else than {pair.first} gave")
        if pair.counts_writes and self._local.versions.pop(pair) != value._version:
            raise pair.error(f"what {pair.first} gave was changed in place before {pair.second}")


@attrs.frozen(eq=False)
class _Gives:
    """A hook behind a module."""

    guard: Guard
    pair: Pair

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if not torch.compiler.is_compiling():
            self.guard.given(self.pair, output)


@attrs.frozen(eq=False)
class _Takes:
    """A hook before a module."""

    guard: Guard
    pair: Pair

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not torch.compiler.is_compiling():
            self.guard.taken(self.pair, args[0] if args else next(iter(kwargs.values()), None))


def guarded(model: nn.Module, pairs: Sequence[Pair]) -> None:
    """Guard pairs of modules of a model, which is changed."""
    if not pairs:
        return
    guard = Guard()
    model.register_forward_pre_hook(guard.enter, prepend=True)
    model.register_forward_hook(guard.leave, always_call=True)
    known = set()
    for pair in pairs:
        first, second = (model.get_submodule(name) for name in (pair.first, pair.second))
        if (first, second) in known:  # modules that have several names
            continue
        known.add((first, second))
        first.register_forward_hook(_Gives(guard, pair))
        second.register_forward_pre_hook(_Takes(guard, pair), prepend=True, with_kwargs=True)
