"""What Python does while FX traces that a graph would not have: draws, and changed leaves."""

from __future__ import annotations

import inspect
import random
import sys
from collections.abc import Collection
from types import FrameType
from typing import Any

import torch
from torch import fx, nn
from typing_extensions import override

from ..module_utils.state import Snapshot, changes
from ..module_utils.torch_private import TorchDispatchMode
from .forward_code import is_of_a_forward, line_of
from .stops import NotInGraphError


class Draws:
    """Stops where the forward of a module draws random numbers, as a context around tracing.

    Args:
        tracer: a tracer of our own. It is changed in place.
    """

    def __init__(self, tracer: fx.Tracer) -> None:
        self.line = ""
        self._call_module, self._outside = tracer.call_module, sys.getprofile()
        tracer.call_module = self._call  # type: ignore[method-assign, assignment]

    def __enter__(self) -> None:
        sys.setprofile(self._on_call)

    def __exit__(self, *_: object) -> None:
        sys.setprofile(self._outside)

    def _on_call(self, frame: FrameType, event: str, called: Any) -> None:
        """Note the line of a forward that calls a method of a generator."""
        owner = getattr(called, "__self__", None) if event == "c_call" else None
        is_numpy = type(owner).__module__.startswith("numpy.random")
        if not self.line and (is_numpy or isinstance(owner, random.Random)):
            caller: FrameType | None = frame
            while caller is not None and not is_of_a_forward(caller.f_code):
                caller = caller.f_back
            self.line = "" if caller is None else line_of(caller)

    def _call(self, module: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        before = Generators()
        result = self._call_module(module, forward, args, kwargs)
        if (drawn := before.difference()) is not None:
            before.restore()
            raise self.error(drawn)
        return result

    def error(self, drawn: str) -> NotInGraphError:
        """The error for what draws from this generator."""
        line, self.line = self.line, ""
        return NotInGraphError(draws(drawn), line)


def draws(what: str) -> str:
    """Why a graph can't be had of what draws random numbers so."""
    return f"it draws random numbers by {what}, which a graph would keep as they are"


class ModelState(Snapshot):
    """A snapshot of a model that can also be compared with a part of it."""

    def __init__(self, model: nn.Module, skipped: Collection[str]) -> None:
        self._places: dict[int, slice] = {}
        super().__init__({"": model}, skipped=skipped)

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
    """What Python's, NumPy's and torch's global generators of random numbers would draw next."""

    def __init__(self) -> None:
        numpy = sys.modules.get("numpy")
        self._python = random.getstate()
        self._numpy: Any = None if numpy is None else numpy.random.get_state()
        self._torch = torch.get_rng_state()

    def difference(self) -> str | None:
        """Which of them has been drawn from since, in words, or None."""
        now = Generators()
        if now._python != self._python:
            return "Python's random"
        if self._numpy is not None:
            (_, mine, *rest), (_, others, *more) = self._numpy, now._numpy
            if rest != more or mine.tobytes() != others.tobytes():
                return "numpy.random"
        return None if torch.equal(now._torch, self._torch) else "torch's generator"

    def restore(self) -> None:
        """Let them draw the same once more."""
        random.setstate(self._python)
        if self._numpy is not None:
            sys.modules["numpy"].random.set_state(self._numpy)
        torch.set_rng_state(self._torch)
