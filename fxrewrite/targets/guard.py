"""Notice, when a model runs, that modules which were rewritten together are called apart."""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import nn

from ..engine.bindings import Shown
from ..errors import GuardError
from ..module_utils.torch_private import HOOK_STATE, HOOKS, version_of
from .module_copy import copied


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
            self._local.versions[pair] = version_of(output)

    def taken(self, pair: Pair, value: Any) -> None:
        """The second module of a pair is called on this."""
        before = self.pending.pop(pair, None)
        if before is None or (pair.is_direct and before() is not value):
            self.pending.clear()
            raise pair.error(f"{pair.second} was called on something else than {pair.first} gave")
        if pair.counts_writes and self._local.versions.pop(pair) != version_of(value):
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
            self.guard.taken(self.pair, _first(args, kwargs))


@attrs.frozen(eq=False)
class _Expects:
    """A hook before a module that was rewritten for what a run showed it to be called on."""

    name: str
    kinds: frozenset[Shown]

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if torch.compiler.is_compiling():
            return
        value = _first(args, kwargs)
        if Shown(value.dim(), value.dtype) not in self.kinds:
            known = " or ".join(sorted(f"{each.rank} of {each.dtype}" for each in self.kinds))
            raise GuardError(
                f"{self.name} was called on a tensor of {value.dim()} dimensions and "
                f"{value.dtype}, and was rewritten for {known}, which it was called on in the run "
                "on example_inputs. Give rewrite() example_inputs that go this way."
            )


def _first(args: Any, kwargs: Any) -> Any:
    return args[0] if args else next(iter(kwargs.values()), None)


def guarded(
    model: nn.Module, pairs: Sequence[Pair], expected: Mapping[str, frozenset[Shown]]
) -> None:
    """Let a model notice calls that were not seen; it is changed.

    Args:
        model: the model.
        pairs: modules of which the second one is only called on what the first one gave.
        expected: by name, what a module may be called on.
    """
    for name, kinds in expected.items():
        hook = _Expects(name, kinds)
        model.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True)
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


def unguarded(model: nn.Module) -> nn.Module:
    """A copy of a rewritten model whose modules no longer notice calls that were not seen.

    The guard takes about three microseconds a call, and `torch.jit.script` can't compile it.

    >>> layer = unguarded(nn.Linear(2, 3))
    >>> layer.weight.shape
    torch.Size([3, 2])

    Args:
        model: what `rewrite` gave. It is left as it is; the copy shares its tensors.
    """
    made = copied(model, {})
    for module in made.modules():
        state = module.__dict__
        for hooks in [state.get(name) or {} for name in HOOKS]:
            for key in [key for key, hook in hooks.items() if _is_ours(hook)]:
                for held in map(state.get, HOOK_STATE):
                    if isinstance(held, dict):
                        held.pop(key, None)
    return made


def _is_ours(hook: Any) -> bool:
    owner = getattr(hook, "__self__", None)
    return isinstance(owner, Guard) or isinstance(hook, _Gives | _Takes | _Expects)
