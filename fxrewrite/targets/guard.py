"""Notice, when a model runs, that modules which were rewritten together are called apart."""

from __future__ import annotations

import functools
import itertools
import sys
import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Any, ClassVar, NoReturn

import attrs
import torch
from torch import nn

from ..engine.bindings import Shown
from ..errors import GuardError
from ..module_utils.torch_private import HOOK_STATE, HOOKS, version_of
from .module_copy import copied

_WATCH = "_fxrewrite_watch"  # the attribute of a guarded module that has its watch


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


class Guard(threading.local):
    """What the modules of one model have given and nobody has taken yet, in each thread by itself.

    The model itself carries two hooks, `enter` and `leave`.
    """

    def __init__(self) -> None:
        self.given: dict[str, list[tuple[weakref.ref[torch.Tensor], object, Pair]]] = {}
        self.depth = 0
        self._outermost: FrameType | None = None
        self._handled: BaseException | None = None
        self._raised: GuardError | None = None

    def __reduce__(self) -> Any:
        return Guard, ()

    def enter(self, module: nn.Module, args: Any) -> None:
        """Before the model runs: what a call that raised has left is forgotten."""
        if torch.compiler.is_compiling():
            return
        # Ctrl-C ends a call without its hooks.
        if not self.depth or not _is_running(self._outermost):
            self.given.clear()
            self.depth, self._raised = 0, None
            self._outermost, self._handled = sys._getframe(1), sys.exc_info()[1]
        self.depth += 1

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """After it ran: all that was given has been taken, unless the forward raised."""
        if torch.compiler.is_compiling():
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
            _, _, pair = left[0]
            raise pair.error(f"what {pair.first} gave was not given to {pair.second}")

    def fail(self, error: GuardError) -> NoReturn:
        """Raise, and forget what was given."""
        self.given.clear()
        self._raised = error
        raise error


def _is_running(frame: FrameType | None) -> bool:
    """Whether a frame is one of the calls that are under way in this thread."""
    now: FrameType | None = sys._getframe(1)
    while now is not None and now is not frame:
        now = now.f_back
    return now is not None


@attrs.frozen(eq=False)
class _Watch:
    """What is noticed of the calls of one module.

    It `takes` what the first ones of these pairs gave, it is the first one of the pair that it
    `gives` for, and it may be called on tensors of the kinds that it `expects`, on any if none.
    """

    name: str
    guard: Guard
    takes: tuple[Pair, ...] = ()
    gives: Pair | None = None
    expects: frozenset[Shown] = frozenset()

    def before(self, value: Any) -> None:
        """Look at what the module is called on."""
        if self.takes:
            self._take(value)
        if self.expects and Shown(value.dim(), value.dtype) not in self.expects:
            known = " or ".join(sorted(f"{each.rank} of {each.dtype}" for each in self.expects))
            self.guard.fail(
                GuardError(
                    f"{self.name} was called on a tensor of {value.dim()} dimensions and "
                    f"{value.dtype}, and was rewritten for {known}, which it was called on in the "
                    "run on example_inputs. Give rewrite() example_inputs that go this way."
                )
            )

    def _take(self, value: Any) -> None:
        given = self.guard.given
        for pair in self.takes:
            held = given.get(pair.first, ())
            for i, (ref, version, _) in enumerate(held):
                if ref() is value or not pair.is_direct:
                    if len(held) == 1:
                        del given[pair.first]
                    else:
                        del given[pair.first][i]
                    if pair.counts_writes and version != version_of(value):
                        what = f"what {pair.first} gave was changed in place before {pair.second}"
                        self.guard.fail(pair.error(what))
                    return
        pair = self.takes[0]
        what = f"{pair.second} was called on something else than {pair.first} gave"
        self.guard.fail(pair.error(what))

    def after(self, pair: Pair, output: Any) -> None:
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
        now, given = (weakref.ref(output), version, pair), guard.given
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


class _Guarded:
    """A module that is watched: its class is one of its own, so that no hook has to be called."""

    plain_type: ClassVar[type[nn.Module]]

    def __init_subclass__(cls) -> None:
        """A class that keeps a list of its subclasses need not know of this one."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        """As its plain type, which alone has a name."""
        make, args, *rest = super().__reduce_ex__(protocol)
        named = tuple(self.plain_type if each is type(self) else each for each in args)
        return _remade, (make, named), *rest


def _remade(make: Callable[..., nn.Module], args: Sequence[Any]) -> nn.Module:
    made = make(*args)
    made.__class__ = _guarded_type(type(made))
    return made


@functools.lru_cache(maxsize=1024)
def _guarded_type(kind: Any) -> Any:
    @functools.wraps(kind.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return kind.forward(self, *args, **kwargs)
        watch = self._fxrewrite_watch
        watch.before(args[0] if args else next(iter(kwargs.values()), None))
        output = kind.forward(self, *args, **kwargs)
        if watch.gives is not None:
            watch.after(watch.gives, output)
        return output

    name = f"Guarded{kind.__name__}"
    own = {"forward": forward, "plain_type": kind, "__module__": kind.__module__}
    return type(kind)(name, (_Guarded, kind), {**own, "__qualname__": name})


def guarded(
    model: nn.Module, pairs: Sequence[Pair], expected: Mapping[str, frozenset[Shown]]
) -> None:
    """Let a model notice calls that were not seen; it is changed.

    Args:
        model: the model.
        pairs: modules of which the second one is only called on what the first one gave.
        expected: by name, what a module may be called on.
    """
    guard = Guard()
    if pairs:
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
    kinds = defaultdict[nn.Module, frozenset[Shown]](frozenset)
    for name, known in expected.items():
        module = model.get_submodule(name)
        kinds[names.setdefault(module, name) and module] = known
    giving, taking = defaultdict[str, list[Pair]](list), defaultdict[str, list[Pair]](list)
    for pair in merged.values():
        giving[pair.first].append(pair)
        taking[pair.second].append(pair)
    for module, name in names.items():
        gives = functools.reduce(_merged, giving[name]) if name in giving else None
        takes = tuple(taking[name]) if name in taking else ()
        module.__dict__[_WATCH] = _Watch(name, guard, takes, gives, kinds[module])
        module.__class__ = _guarded_type(type(module))


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

    The guard takes about a microsecond a call, and `torch.jit.script` can't compile it.

    >>> layer = unguarded(nn.Linear(2, 3))
    >>> layer.weight.shape
    torch.Size([3, 2])

    Args:
        model: what `rewrite` gave. It is left as it is; the copy shares its tensors.
    """
    made = copied(model, {})
    for module in made.modules():
        if isinstance(module, _Guarded):
            module.__class__ = module.plain_type
            del module.__dict__[_WATCH]
        state = module.__dict__
        for hooks in [state.get(name) or {} for name in HOOKS]:
            ours = [k for k, each in hooks.items() if isinstance(_owner(each), Guard)]
            for key, held in itertools.product(ours, map(state.get, HOOK_STATE)):
                if isinstance(held, dict):
                    held.pop(key, None)
    return made


def _owner(hook: Any) -> Any:
    return getattr(hook, "__self__", None)
