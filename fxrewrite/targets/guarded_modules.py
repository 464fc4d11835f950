"""Modules that look at what they are called on and what they give, and plain ones again."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import attrs
from torch import nn
from torch.compiler import is_compiling

from ..engine.bindings import Shown
from ..module_utils.torch_private import HOOKS
from .guard import Guard, Pair, Watch
from .module_copy import copied

_WATCH = "_fxrewrite_watch"  # the attribute of a guarded module that has its watch


class _Guarded:
    """A module that is watched: its class is one of its own, so that no hook has to be called."""

    plain_type: ClassVar[type[nn.Module]]

    def __init_subclass__(cls) -> None:
        """A class that keeps a list of its subclasses need not know of this one."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        """As its plain type, which alone has a name."""
        reduced: Any = super().__reduce_ex__(protocol)
        make, args, *rest = reduced
        named = tuple(self.plain_type if each is type(self) else each for each in args)
        return _remade, (make, named), *rest


def _remade(make: Callable[..., Any], args: Sequence[Any]) -> Any:
    made = make(*args)
    kind: Any = type(made)  # mypy takes the hash of a class for that of its instances
    made.__class__ = _guarded_type(kind)
    return made


@functools.lru_cache(maxsize=1024)
def _guarded_type(kind: Any) -> Any:
    """A subclass of a type whose forward looks at what it is called on, and at what it gives."""

    @functools.wraps(kind.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if is_compiling():
            return kind.forward(self, *args, **kwargs)
        watch = self._fxrewrite_watch
        value = args[0] if args else next(iter(kwargs.values()), None)
        if watch.takes:
            watch.take(value)
        if watch.expects:
            watch.expect(value)
        output = kind.forward(self, *args, **kwargs)
        if watch.gives is not None:
            watch.give(watch.gives, output)
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
    if pairs or expected:
        model.register_forward_pre_hook(guard.enter, prepend=True)
        model.register_forward_hook(guard.leave, always_call=True)
    names: dict[nn.Module, str] = {}  # one of those that a module has

    def name_of(name: str) -> str:
        return names.setdefault(model.get_submodule(name), name)

    merged: dict[tuple[str, str], Pair] = {}
    for pair in pairs:
        pair = attrs.evolve(pair, first=name_of(pair.first), second=name_of(pair.second))
        key = pair.first, pair.second
        merged[key] = pair.merged(merged.get(key, pair))
    kinds = {name_of(name): known for name, known in expected.items()}
    giving, taking = defaultdict[str, list[Pair]](list), defaultdict[str, list[Pair]](list)
    for pair in merged.values():
        giving[pair.first].append(pair)
        taking[pair.second].append(pair)
    for module, name in names.items():
        gives = functools.reduce(Pair.merged, giving[name]) if name in giving else None
        watch = Watch(name, guard, tuple(taking[name]), gives, kinds.get(name, frozenset()))
        kind: Any = type(module)
        module.__dict__[_WATCH], module.__class__ = watch, _guarded_type(kind)


def unguarded(model: nn.Module) -> nn.Module:
    """A copy of a rewritten model whose modules no longer notice calls that were not seen.

    The guard takes one to two microseconds a call, and `torch.jit.script` can't compile it.

    >>> layer = unguarded(nn.Linear(2, 3))
    >>> layer.weight.shape
    torch.Size([3, 2])

    Args:
        model: what `rewrite` gave. It is left as it is; the copy shares its tensors.
    """
    made = copied(model, {})
    for module in made.modules():
        state, kind = module.__dict__, type(module)
        if _WATCH in state:
            state[_WATCH] = Watch("", Guard())
        if (plain := vars(kind).get("plain_type")) is not None:  # or it was parametrized since
            module.__class__ = plain
            del state[_WATCH]
        for hooks in [state.get(name) or {} for name in HOOKS]:
            owners = {key: getattr(hook, "__self__", None) for key, hook in hooks.items()}
            for key in [key for key, owner in owners.items() if isinstance(owner, Guard)]:
                del hooks[key]
    return made
