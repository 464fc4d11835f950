"""What is found while a model's code is read: calls, what becomes of values, what escapes."""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import attrs
import torch
from torch import nn

from .held import is_installed, is_library, reached
from .values import (
    PLAIN,
    Atom,
    Call,
    Env,
    Items,
    Keywords,
    Known,
    Many,
    Output,
    TensorOf,
    Value,
    atoms_of,
    is_container,
    known,
)

# How many statements and expressions may be read; a model that takes more is not read to its end.
_MOST_STEPS = 3_000_000


class UnreadableError(Exception):
    """Code that can't be followed; whatever it can get at may be used in any way."""


@attrs.define(eq=False)
class Entered:
    """A function that is being read, of which object, on what, and under how many guards."""

    code: types.CodeType
    owner: int
    env: Env
    guards: int
    recurs: bool = False

    def is_of(self, other: Entered) -> bool:
        """Whether it is the same function of the same object."""
        return (self.code, self.owner) == (other.code, other.owner)


class Reader:
    """The state of reading a model's code: where it is, and what was found so far.

    `calls` has each call of a module that is a leaf, by the way that leads there; `escaped` has, by
    identity, where a module may be used otherwise than by a call that was read; `looked_at` has,
    by identity and name, where a plain attribute of a leaf is read; `handed` has, by identity,
    where code of somebody else gets what a module is inside of. What an earlier reader, `before`,
    found to change is known from the start.
    """

    def __init__(
        self,
        model: nn.Module,
        is_leaf: Callable[[nn.Module], bool],
        before: Reader | None = None,
    ) -> None:
        self.is_leaf = is_leaf
        self.modules = {id(each): each for each in model.modules()}
        self.calls: dict[Any, Call] = {}
        self.escaped: dict[int, str] = {}
        self.looked_at: dict[int, dict[str, str]] = {}
        self.handed: dict[int, str] = {}
        # Modules of whose tensors the type or the device is asked for, and where.
        self.asked: dict[int, tuple[nn.Module, str]] = {}
        # Attributes that code of the forward sets, and containers that it changes.
        self.changing: set[tuple[int, str | None]] = (
            set() if before is None else set(before.changing)
        )
        self.changing_before = frozenset(self.changing)
        self.path: list[Any] = []
        self.loops: list[int] = []
        self.guards: list[str] = []
        self.conditions: list[str] = []
        self.functions: list[Entered] = []
        self.is_recursive = False
        # Whether a function is put somewhere, from where code of somebody else might take it.
        self.puts_code = False
        self.clock = 0
        self._steps = 0
        self._kept: dict[Any, Any] = {} if before is None else before._kept
        self._reached: dict[int, tuple[Any, tuple[nn.Module, ...]]] = {}

    def step(self) -> None:
        """Count one more statement or expression."""
        self._steps += 1
        if self._steps > _MOST_STEPS:
            raise UnreadableError("it is too long")

    def call(
        self, module: nn.Module, node: Any, given: Iterable[Value], where: str, *, on_one: bool
    ) -> Output:
        """Note that a leaf may be called on these values; gives what it returns."""
        key = (id(module), *self.path, id(node))
        if key not in self.calls:
            self.calls[key] = Call(module, where, tuple(self.loops))
        call = self.calls[key]
        call.on_one &= on_one
        call.guarded = call.guarded or (self.guards[-1] if self.guards else "")
        for value in given:
            for atom in value:
                call.inputs.add(atom)
                if isinstance(atom, Output):
                    atom.call.readers.setdefault(call, where)
                    call.late |= atom.call.time != self.clock
                else:
                    self.consume(frozenset({atom}), where)
        self.clock += 1
        call.time = self.clock
        return Output(call)

    def consume(self, value: Value, where: str) -> None:
        """Note that something which was not read may do anything with a value."""
        for atom in value:
            if isinstance(atom, Output):
                self.clock += 1
                atom.call.readers.setdefault(None, self._under(where))
            elif isinstance(atom, Known):
                self.escape(atom.value, where)
            elif isinstance(atom, TensorOf):
                self.escape(atom.owner.value, where)
            elif isinstance(atom, Items):
                for each in atom.items:
                    self.consume(each, where)
            elif isinstance(atom, Keywords):
                self.changing.add((atom.made, None))
                for _, each in atom.items:
                    self.consume(each, where)
            elif isinstance(atom, Many):
                self.consume(atom.item, where)
            else:
                self.clock += 1

    def escape(self, obj: Any, where: str) -> None:
        """Note that the modules which an object leads to may be used in any way."""
        if isinstance(obj, PLAIN):
            return
        self.clock += 1
        for module in self.reach(obj):
            self.touch(module, where)

    def look_at(self, module: nn.Module, name: str, where: str) -> None:
        """Note that a plain attribute of a leaf is read."""
        self.looked_at.setdefault(id(module), {}).setdefault(name, self._under(where))

    def ask(self, module: nn.Module, where: str) -> None:
        """Note that the type or the device of a module's tensors is asked for."""
        self.asked.setdefault(id(module), (module, self._under(where)))

    def hand(self, module: nn.Module, where: str) -> None:
        """Note that somebody else's code is given a module, and so may call it as a whole."""
        self.clock += 1
        self.touch(module, where)
        for child in module.children():
            if is_container(module):
                self.hand(child, where)
            else:
                for each in child.modules():
                    self.handed.setdefault(id(each), self._under(where))

    def is_foreign(self, package: str) -> bool:
        """Whether a library is an installed one that none of the model's modules come with."""
        return package not in self._packages and is_installed(package) and not is_library(package)

    @functools.cached_property
    def _packages(self) -> set[str]:
        kinds = (cls for each in self.modules.values() for cls in type(each).__mro__)
        return {cls.__module__.partition(".")[0] for cls in kinds} | {"__main__"}

    def touch(self, module: nn.Module, where: str) -> None:
        """Note that a module may be used otherwise than by a call that is read."""
        self.escaped.setdefault(id(module), self._under(where))

    def change(self, obj: Any, name: str | None) -> None:
        """Note that code of the forward sets an attribute, or, without a name, changes items."""
        self._kept[id(obj)] = obj
        self.changing.add((id(obj), name))

    def is_changing(self, obj: Any, name: str | None) -> bool:
        """Whether code of the forward may set an attribute or change what a container holds."""
        return (id(obj), name) in self.changing

    def keywords(self, atom: Atom) -> dict[str, Value] | None:
        """The items of a dictionary that stays as it was made; None for anything else."""
        if isinstance(atom, Keywords) and (atom.made, None) not in self.changing:
            return dict(atom.items)
        if isinstance(atom, Known) and isinstance(atom.value, dict):
            is_fixed = not self.is_changing(atom.value, None)
            return {str(k): known(v) for k, v in atom.value.items()} if is_fixed else None
        return None

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """An object that is made once for all the times that it is asked for."""
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]

    def reach(self, obj: Any) -> tuple[nn.Module, ...]:
        """The modules of the model that an object is, holds or closes over."""
        if isinstance(obj, (*PLAIN, torch.Tensor, types.ModuleType)):
            return ()
        if id(obj) not in self._reached:
            found = tuple(each for each in reached(obj) if id(each) in self.modules)
            self._reached[id(obj)] = (obj, found)
        return self._reached[id(obj)][1]

    def recurs(self, entry: Entered) -> bool:
        """Whether a function calls itself on what it was called on, which says nothing new."""
        if any(isinstance(atom, Output) for atom in atoms_of(entry.env.values())):
            return False
        for each in self.functions:
            if each.is_of(entry) and each.env == entry.env and each.guards == entry.guards:
                each.recurs = self.is_recursive = True
                self.clock += 1
                return True
        return False

    def stacks(self) -> tuple[list[Any], ...]:
        """A copy of the stacks that say where reading is."""
        return self.path[:], self.loops[:], self.guards[:], self.conditions[:], self.functions[:]

    def give_up(self, stacks: tuple[list[Any], ...], where: str) -> None:
        """Leave a function that can't be followed: what was called in it may be used in any way."""
        self.path[:], self.loops[:], self.guards[:], self.conditions[:], self.functions[:] = stacks
        prefix = tuple(self.path)
        for key, call in self.calls.items():
            if key[1 : len(prefix) + 1] == prefix:
                self.touch(call.module, where)
                call.readers.setdefault(None, where)

    @contextlib.contextmanager
    def under(self, stack: list[Any], entry: Any) -> Iterator[None]:
        """Keep an entry on one of the stacks meanwhile."""
        stack.append(entry)
        try:
            yield
        finally:
            stack.pop()

    def _under(self, where: str) -> str:
        return f"{where}, under `{self.conditions[-1]}`" if self.conditions else where
