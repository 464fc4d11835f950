"""Whether code of a model may part the calls of a chain, on some way that it may go."""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
import types
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from ..reading import calls, objects
from .binding import Arguments
from .expressions import Expressions
from .held import is_of_library
from .outline import outline
from .reader import Reader
from .sources import Source
from .values import UNKNOWN, Call, Known, Output, Value, known

_NOWHERE = ast.Pass()
# How often a model's code is read at most until it sets no further attribute.
_MOST_READINGS = 20


class _Asked:
    """A module of whose tensors the type or device is asked for, and where."""

    def __init__(self, owner: nn.Module, where: str) -> None:
        self.owner, self.where = owner, where
        self.inside = {id(each): each for each in owner.modules()}
        self.kinds = _kinds(owner)

    def has_tensors(self, after: Mapping[int, nn.Module], gone: Collection[int]) -> bool:
        """Whether any is left once modules have become others."""
        for key, module in self.inside.items():
            if key in after:
                found = next(after[key].parameters(), None)
            else:
                found = None if key in gone else next(module.parameters(recurse=False), None)
            if found is not None:
                return True
        return False


class Flows:
    """Who calls the modules of a model on what, on every way that the model's forward may go.

    Nothing runs. Both sides of a condition are read, unless what it asks is settled by attributes
    that no code of the forward sets; `training` never is. Code that can't be followed is taken to
    do anything with what it can get at.

    Args:
        model: the model, in whose forward reading begins.
        is_leaf: whether a module is called as a whole, and its forward not read.
        is_run: whether a run of the model is there to say what else is called. Then somebody else's
            code that is given a module is taken to call that, and not what is inside of it.
    """

    def __init__(
        self, model: nn.Module, is_leaf: Callable[[nn.Module], bool], *, is_run: bool = False
    ) -> None:
        self._model, self._is_leaf, self._is_run = model, is_leaf, is_run
        self._names: dict[int, str] = {id(each): name for name, each in model.named_modules()}

    @functools.cached_property
    def _reader(self) -> Reader:
        """What was read, which takes long, and is asked for only where a site may be rewritten."""
        return _read(self._model, self._is_leaf)

    @functools.cached_property
    def _calls(self) -> dict[int, list[Call]]:
        """The calls of each module, by its identity."""
        found: dict[int, list[Call]] = {}
        for call in self._reader.calls.values():
            found.setdefault(id(call.module), []).append(call)
        return found

    def refusal(
        self,
        chain: Sequence[nn.Module],
        changed: Mapping[nn.Module, nn.Module],
        gone: Collection[int],
        *,
        late: bool,
    ) -> str | None:
        """Why these modules can't be changed as if each were called on what the last one gave.

        Args:
            chain: the modules of a chain, in the order of its calls.
            changed: what those of them become that are to become others.
            gone: the identities of modules that hand on what they are given by now.
            late: whether what the first one reads would be read only where the last one is called.
        """
        for module, new in changed.items():
            where = self._reader.escaped.get(id(module))
            if where is not None:
                return f"{self._name(module)} may also be used by {where}"
            where = self._reader.handed.get(id(module))
            is_seen = self._is_run and id(module) in self._calls and not self._reader.puts_code
            if where is not None and not is_seen:
                return (
                    f"{self._name(module)} may also be used by {where}; with example_inputs, code "
                    "of another library is taken to call only what it is given"
                )
            for name, at in self._reader.looked_at.get(id(module), {}).items():
                if not _is_alike(module, new, name):
                    return f"{self._name(module)}.{name} may be read, and would change, by {at}"
        reason = self._asked(changed, gone)
        if reason is not None:
            return reason
        for first, second in itertools.pairwise(chain):
            reason = self._parted(first, second, gone, late=late)
            if reason is not None:
                return reason
        return None

    def handed(self, module: nn.Module) -> str | None:
        """Where somebody else's code is given what a module is inside of, if anywhere."""
        return self._reader.handed.get(id(module))

    def most_calls(self, module: nn.Module) -> int | None:
        """How often a forward calls a module at most; None if nobody knows."""
        calls = self._calls.get(id(module), ())
        nobody_knows = self._reader.is_recursive or any(call.loops for call in calls)
        return None if nobody_knows else len(calls)

    def outline(self, modules: Collection[nn.Module]) -> tuple[fx.Graph, dict[fx.Node, str]]:
        """A graph of the calls of these modules, with what its inputs and output are, in words."""
        wanted = set(map(id, modules))
        calls = (each for each in self._reader.calls.values() if id(each.module) in wanted)
        return outline(calls, self._names)

    def _asked(self, changed: Mapping[nn.Module, nn.Module], gone: Collection[int]) -> str | None:
        """Why the tensors of some module would be of another type or device than is asked for."""
        after = {id(module): new for module, new in changed.items()}
        new = {kind for each in after.values() for kind in _kinds(each)}
        for asked in self._asked_of:
            if not asked.inside.keys().isdisjoint(after):
                has_tensors = asked.has_tensors(after, gone)
                if len(asked.kinds) > 1 or not new <= asked.kinds or not has_tensors:
                    name = self._name(asked.owner) or type(asked.owner).__name__
                    return (
                        f"the type or device of tensors of {name} may be asked for, by "
                        f"{asked.where}"
                    )
        return None

    @functools.cached_property
    def _asked_of(self) -> list[_Asked]:
        return [_Asked(owner, where) for owner, where in self._reader.asked.values()]

    def _parted(
        self, first: nn.Module, second: nn.Module, gone: Collection[int], *, late: bool
    ) -> str | None:
        paired: set[Call] = set()
        for call in self._calls.get(id(second), ()):
            reader, found = call, None
            while found is None:
                made = self._made(reader, late=late)
                if isinstance(made, str):
                    return made
                if made.module is first:
                    found = made
                elif id(made.module) not in gone:
                    return (
                        f"{self._name(second)} may also read what {self._name(made.module)} gives, "
                        f"at {call.where}"
                    )
                reader = made
            paired.add(found)
        for call in self._calls.get(id(first), ()):
            if call not in paired and call.readers:
                return self._read_elsewhere(call)
        return None

    def _made(self, reader: Call, *, late: bool) -> Call | str:
        """The one call that made what another call reads, and is read by no other; or why not."""
        name = self._name(reader.module)
        if reader.guarded:
            return f"an error of {name} may be caught, by {reader.guarded}"
        made = next(iter(reader.inputs)) if len(reader.inputs) == 1 else None
        if not isinstance(made, Output):
            return f"{name} may also be called on something else, at {reader.where}"
        if set(made.call.readers) != {reader}:
            return self._read_elsewhere(made.call, but=reader)
        before = self._name(made.call.module)
        if made.call.guarded:
            return f"an error of {before} may be caught, by {made.call.guarded}"
        if made.call.loops != reader.loops:
            return f"{name} may be called more often than {before}, at {reader.where}"
        if late and reader.late:
            return f"something may happen between {before} and {name}, at {reader.where}"
        return made.call

    def _read_elsewhere(self, call: Call, but: Call | None = None) -> str:
        where = next(at for each, at in call.readers.items() if each is None or each is not but)
        return f"what {self._name(call.module)} gives may also go elsewhere, by {where}"

    def _name(self, module: nn.Module) -> str:
        return self._names[id(module)]


def _kinds(module: nn.Module) -> set[tuple[torch.dtype, torch.device]]:
    return {(each.dtype, each.device) for each in module.parameters()}


def _is_alike(module: nn.Module, new: nn.Module, name: str) -> bool:
    """Whether reading a plain attribute gives the same of both modules."""
    found, other = getattr(module, name), getattr(new, name, None)
    return type(found) is type(other) and bool(found == other)


class _Outside(Expressions):
    """Where a model is called from."""

    def __init__(self, reader: Reader) -> None:
        definition = ast.parse("lambda: None", mode="eval").body
        assert isinstance(definition, ast.Lambda)
        super().__init__(reader, Source(definition, "", ""), lambda name: objects.MISSING)

    def at(self, node: ast.AST) -> str:
        """In words."""
        return "whoever calls the model"


def _read(model: nn.Module, is_leaf: Callable[[nn.Module], bool]) -> Reader:
    """Read a model's code; once more where it sets attributes, which then may be anything."""
    reader = Reader(model, is_leaf)
    for _ in range(_MOST_READINGS):
        _read_once(model, reader)
        again = Reader(model, is_leaf, reader)
        if again.changing == reader.changing_before:
            return reader
        reader = again
    reader.escape(model, "code that sets ever more attributes")
    return reader


def _read_once(model: nn.Module, reader: Reader) -> None:
    outside = _Outside(reader)
    kind: Any = type(model)
    forward = model.__dict__.get("forward", kind.forward)
    plain = isinstance(forward, types.FunctionType) and is_of_library(kind.__call__)
    for name in ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_backward_pre_hooks"):
        for hook in model.__dict__[name].values():
            calls.read_hook(hook, model, outside, _NOWHERE)
    if not plain:
        returned = calls.call(Known(model), Arguments(others=UNKNOWN), outside, _NOWHERE)
        reader.consume(returned, outside.at(_NOWHERE))
        return
    code = forward.__code__
    given = (known(model),) if "forward" not in model.__dict__ else ()
    count = code.co_argcount + code.co_kwonlyargcount
    count += bool(code.co_flags & inspect.CO_VARARGS)
    count += bool(code.co_flags & inspect.CO_VARKEYWORDS)
    env: dict[str, Value] = dict.fromkeys(code.co_varnames[:count], UNKNOWN)
    env |= dict(zip(code.co_varnames, given, strict=False))

    def otherwise(why: str) -> Value:
        reader.escape(model, why)
        return UNKNOWN

    calls.read(forward, env, reader, otherwise, is_root=True)
