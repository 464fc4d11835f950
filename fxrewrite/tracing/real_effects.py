"""What Python does while FX traces that a graph would not have: draws, and changed leaves."""

from __future__ import annotations

import functools
import inspect
import random
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from types import FrameType
from typing import Any, TypeAlias

import torch
from torch import fx, nn
from typing_extensions import override

from ..module_utils.state import Snapshot, changes
from ..module_utils.torch_private import TorchDispatchMode
from .forward_code import first_line, is_of_a_forward, line_of
from .stops import NotInGraphError


class Draws:
    """Stops where the forward of a module draws random numbers, as a context around tracing.

    Args:
        tracer: a tracer of our own. It is changed in place.
        held: generators that the model has itself.
    """

    def __init__(self, tracer: fx.Tracer, held: Sequence[Any]) -> None:
        self.line, self._held = "", held
        self._call_module, self._outside = tracer.call_module, sys.getprofile()
        tracer.call_module = self._call  # type: ignore[method-assign, assignment]

    def __enter__(self) -> None:
        sys.setprofile(self._on_call)

    def __exit__(self, *_: object) -> None:
        sys.setprofile(self._outside)

    def _on_call(self, frame: FrameType, event: str, called: Any) -> None:
        """Note the line of a forward that calls a method of a generator of Python's."""
        if event != "c_call" or called.__name__.endswith("state"):  # which we ask for, to compare
            return
        if not self.line and isinstance(getattr(called, "__self__", None), random.Random):
            caller: FrameType | None = frame
            while caller is not None and not is_of_a_forward(caller.f_code):
                caller = caller.f_back
            self.line = "" if caller is None else line_of(caller)

    def _call(self, module: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        before = Generators(self._held)
        result = self._call_module(module, forward, args, kwargs)
        if (drawn := before.difference()) is not None:
            before.restore()
            raise self.error(drawn, module)
        return result

    def error(self, drawn: str, module: nn.Module) -> NotInGraphError:
        """The error for a module that draws from this generator, in whatever line of its forward.

        Python tells nothing of calls of NumPy.
        """
        line, self.line = self.line, ""
        return NotInGraphError(draws(drawn), line or first_line(module))


def draws(what: str) -> str:
    """Why a graph can't be had of what draws random numbers so."""
    return f"it draws random numbers by {what}, which a graph would keep as they are"


class ModelState(Snapshot):
    """A snapshot of a model that can also be compared with a part of it.

    `generators` are those of random numbers that the model has.
    """

    def __init__(self, model: nn.Module, skipped: Collection[str]) -> None:
        self._places: dict[int, slice] = {}
        self.generators: list[Any] = []
        super().__init__({"": model}, skipped=skipped)

    @override
    def _visit(self, path: Any, value: Any) -> None:
        kind: Any = type(value)  # mypy takes the hash of a class for that of its instances
        if _is_generator(kind):
            self.generators.append(value)
        super()._visit(path, value)

    @override
    def _visit_module(self, path: Any, module: nn.Module) -> None:
        start = len(self._parts)
        super()._visit_module(path, module)
        self._places[id(module)] = slice(start, len(self._parts))

    def restore_in(self, module: nn.Module) -> str | None:
        """Put back what has changed in a module, and name the first such thing, or None."""
        found = None
        for each in module.modules() if module._modules else (module,):
            place = self._places.get(id(each), slice(0))
            for part, name in changes(self._parts[place]):
                found = found or name
                part.restore()
        return found


class ChangedError(NotInGraphError):
    """A forward calls a module that is not as it was when tracing began."""


def check_calls(tracer: fx.Tracer, before: ModelState, *, of_all: bool) -> None:
    """Stop where a module is called that is not as it was when tracing began.

    A graph calls it as it is afterwards, when its forward may have put everything back.

    Args:
        tracer: a tracer of our own. It is changed in place.
        before: what the model was.
        of_all: whether to check what is called for all that is in it, or leaves alone. That takes
            longer, and tells which forward has changed them.
    """
    call_module = tracer.call_module

    def call(module: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        is_checked = of_all or not module._modules or is_leaf(module)
        # What was changed is put back, as the forward does not get to do any more.
        if is_checked and (changed := before.restore_in(module)) is not None:
            name = tracer.path_of_module(module)
            raise ChangedError(f"it calls {name} after it has changed {changed}")
        if kwargs or len(args) != 1:  # what it can't be called with raises here as it does later
            inspect.signature(type(module).forward).bind(module, *args, **kwargs)
        return call_module(module, forward, args, kwargs)

    def is_leaf(module: nn.Module) -> bool:
        return tracer.is_leaf_module(module, tracer.path_of_module(module))

    tracer.call_module = call  # type: ignore[method-assign, assignment]


class NoDraws(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Raises where an operation draws random numbers that is carried out while FX traces."""

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise NotInGraphError(draws(func.overloadpacket.__name__))
        return func(*args, **(kwargs or {}))


class Generators:
    """What generators of random numbers would draw next: the global ones, and those of a model."""

    def __init__(self, held: Iterable[Any] = ()) -> None:
        numpy = sys.modules.get("numpy")
        known: list[_Known] = [("Python's random", random.getstate, random.setstate)]
        known.append(("torch's generator", torch.get_rng_state, torch.set_rng_state))
        if numpy is not None:
            get = functools.partial(numpy.random.get_state, legacy=False)
            known.append(("numpy.random", get, numpy.random.set_state))
        self._states = [(*each, each[1]()) for each in (*known, *map(_accessors, held))]

    def difference(self) -> str | None:
        """Which of them has been drawn from since, in words, or None."""
        return next((name for name, get, _, was in self._states if not _equal(get(), was)), None)

    def restore(self) -> None:
        """Let them draw the same once more."""
        for _, _, put, was in self._states:
            put(was)


_Known: TypeAlias = tuple[str, Callable[[], Any], Callable[[Any], object]]


@functools.lru_cache(maxsize=4096)  # it is asked of all that a model holds
def _is_generator(kind: Any) -> bool:
    """Whether what is of this type draws random numbers, and can tell which ones come next."""
    kinds: tuple[Any, ...] = (random.Random, torch.Generator)
    if (numpy := sys.modules.get("numpy")) is not None:
        kinds = (*kinds, numpy.random.Generator, numpy.random.RandomState)
    return issubclass(kind, kinds) and not issubclass(kind, random.SystemRandom)


def _accessors(generator: Any) -> _Known:
    """What a generator is called, and how its state is read and set."""
    name = f"a {torch.typename(generator)} of its own"
    if isinstance(generator, random.Random):
        return name, generator.getstate, generator.setstate
    if isinstance(generator, torch.Generator):
        return name, generator.get_state, generator.set_state
    if hasattr(generator, "bit_generator"):
        bits = generator.bit_generator
        return name, lambda: bits.state, functools.partial(setattr, bits, "state")
    return name, functools.partial(generator.get_state, legacy=False), generator.set_state


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return all(_equal(each, other[key]) for key, each in one.items())
    same = one == other
    return bool(same.all() if hasattr(same, "all") else same)
