"""Notice, when a model runs, that modules which were rewritten together are called apart."""

from __future__ import annotations

import functools
import sys
import threading
import weakref
from collections import defaultdict
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
    between, on a way that was not seen. It `is_alone` where each of them is called at one place.
    """

    first: str
    second: str
    places: tuple[str, str]
    is_direct: bool = True
    counts_writes: bool = False
    is_alone: bool = True

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


class _Pending(threading.local):
    """What modules have given and nobody has taken yet, in this thread: by module, the tensors."""

    def __init__(self) -> None:
        self.depth = 0
        self.given: dict[str, list[tuple[weakref.ref[torch.Tensor], object, Pair]]] = {}


class Guard:
    """The guarded modules of one model: its hooks are called around the model itself."""

    def __init__(self) -> None:
        self.pending = _Pending()

    def __reduce__(self) -> Any:
        return Guard, ()

    def enter(self, module: nn.Module, args: Any) -> None:
        """Before the model runs: what a call that raised has left is forgotten."""
        if not torch.compiler.is_compiling():
            pending = self.pending
            if not pending.depth:
                pending.given.clear()
            pending.depth += 1

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """After it ran: all that was given has been taken, unless the forward raised."""
        if torch.compiler.is_compiling():
            return
        pending = self.pending
        pending.depth -= 1
        if not pending.depth and pending.given:
            _, _, pair = next(iter(pending.given.values()))[0]
            pending.given.clear()
            if sys.exc_info()[0] is None:
                raise pair.error(f"what {pair.first} gave was not given to {pair.second}")


@attrs.frozen(eq=False)
class _Gives:
    """A hook behind a module that is the first of pairs."""

    guard: Guard
    pair: Pair

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        pair, pending = self.pair, self.guard.pending
        version = None
        if pair.counts_writes:
            if output.is_inference():
                raise pair.error(
                    "torch counts no writes in inference mode, so that it is not seen whether what "
                    f"{pair.first} gave is changed in place; use torch.no_grad() instead"
                )
            version = version_of(output)
        given = weakref.ref(output), version, pair
        before = pending.given.get(pair.first)
        if before is None:
            pending.given[pair.first] = [given]
            return
        # Outside of a call of the model, one that raised may have left it.
        if not pending.depth:
            before[:] = [each for each in before if each[0]() is not None]
        if before and pair.is_alone:
            pending.given.clear()
            raise pair.error(f"{pair.first} was called twice, and {pair.second} not in between")
        before.append(given)


@attrs.frozen(eq=False)
class _Takes:
    """A hook before a module that is the second of pairs."""

    guard: Guard
    pairs: tuple[Pair, ...]

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if torch.compiler.is_compiling():
            return
        value, given = _first(args, kwargs), self.guard.pending.given
        for pair in self.pairs:
            held = given.get(pair.first, ())
            for i, (ref, version, _) in enumerate(held):
                if ref() is value or not pair.is_direct:
                    if len(held) == 1:
                        del given[pair.first]
                    else:
                        del given[pair.first][i]
                    if pair.counts_writes and version != version_of(value):
                        raise pair.error(
                            f"what {pair.first} gave was changed in place before {pair.second}"
                        )
                    return
        given.clear()
        pair = self.pairs[0]
        raise pair.error(f"{pair.second} was called on something else than {pair.first} gave")


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
    names: dict[nn.Module, str] = {}  # one of those that a module has
    merged: dict[tuple[str, str], Pair] = {}
    for pair in pairs:
        first, second = (
            names.setdefault(model.get_submodule(name), name) for name in (pair.first, pair.second)
        )
        pair = attrs.evolve(pair, first=first, second=second)
        merged[first, second] = _merged(merged.get((first, second), pair), pair)
    giving, taking = defaultdict[str, list[Pair]](list), defaultdict[str, list[Pair]](list)
    for pair in merged.values():
        giving[pair.first].append(pair)
        taking[pair.second].append(pair)
    for module, name in names.items():
        if name in giving:
            gives = _Gives(guard, functools.reduce(_merged, giving[name]))
            module.register_forward_hook(gives)
        if name in taking:
            takes = _Takes(guard, tuple(taking[name]))
            module.register_forward_pre_hook(takes, prepend=True, with_kwargs=True)


def _merged(one: Pair, other: Pair) -> Pair:
    """One pair for two places; what holds at both of them."""
    return attrs.evolve(
        one,
        is_direct=one.is_direct and other.is_direct,
        counts_writes=one.counts_writes or other.counts_writes,
        is_alone=one.is_alone and other.is_alone,
    )


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
