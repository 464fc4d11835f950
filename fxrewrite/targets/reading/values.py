"""What an expression of a forward may be: a set of atoms, one for each way to get there."""

from __future__ import annotations

import itertools
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeAlias

import attrs
import torch
from torch import nn

# What is alike wherever it comes from, and holds no module.
PLAIN = (
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    type(None),
    type(...),
    torch.dtype,
    torch.device,
    torch.memory_format,
    torch.Size,
)
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
# More plain values than this in one place say no more than that anything may stand there.
_MOST_PLAIN = 8


class Known:
    """An object that is there before the forward runs, and is the same in each run."""

    __slots__ = ("_key", "value")

    def __init__(self, value: Any) -> None:
        self.value = value
        self._key = _key(value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Known) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def __repr__(self) -> str:
        return f"Known({self.value!r:.40})"

    @property
    def is_plain(self) -> bool:
        """Whether it is a number, a text or the like."""
        return isinstance(self.value, PLAIN)


@attrs.frozen
class Output:
    """What a call of a module gives."""

    call: Call


@attrs.frozen
class Items:
    """A tuple, each item a value by itself."""

    items: tuple[Value, ...]


@attrs.frozen
class Many:
    """Something to iterate over, nobody knows how long; each item is this value."""

    item: Value


@attrs.frozen
class TensorOf:
    """One of the tensors of a module and all inside it."""

    owner: Known


@attrs.frozen
class Keywords:
    """A dictionary by names, such as the keyword arguments that a function takes all together.

    `made` is the identity of the code that makes it.
    """

    items: tuple[tuple[str, Value], ...]
    made: int


@attrs.frozen
class Foreign:
    """Something of a library that none of the model's modules come with."""

    package: str


class _Single:
    def __init__(self, name: str) -> None:
        self._name = name

    def __repr__(self) -> str:
        return self._name


ANYTHING, UNBOUND, CODE = _Single("ANYTHING"), _Single("UNBOUND"), _Single("CODE")
Atom: TypeAlias = "Known | Output | Items | Many | TensorOf | Keywords | Foreign | _Single"
Value: TypeAlias = "frozenset[Atom]"
Env: TypeAlias = "dict[str, Value]"

UNKNOWN: Value = frozenset({ANYTHING})
# A function or generator that is made in a forward.
DEFERRED: Value = frozenset({CODE})


@attrs.define(eq=False)
class Call:
    """One place where a module is called, on one way through all functions that lead there.

    `inputs` is what it may be called on, and `on_one` whether that is one value that stands alone.
    `readers` is who may read what it gives, with where: a further call, or None for anything else.
    `loops` are those around it that run nobody knows how often. `guarded` is where an error that it
    raises may be caught. `late` is whether anything may have happened since what it is called on
    was made.
    """

    module: nn.Module
    where: str
    loops: tuple[int, ...]
    inputs: set[Atom] = attrs.field(factory=set)
    on_one: bool = True
    readers: dict[Call | None, str] = attrs.field(factory=dict)
    guarded: str = ""
    late: bool = False
    time: int = 0


def known(value: Any) -> Value:
    """The value that is this object for sure."""
    return frozenset({Known(value)})


def joined(*values: Value) -> Value:
    """What may be any of these values."""
    found = frozenset().union(*values)
    if len(found) > _MOST_PLAIN:
        plain = {each for each in found if isinstance(each, Known) and each.is_plain}
        if len(plain) > _MOST_PLAIN:
            return (found - plain) | UNKNOWN
    return found


def joined_envs(envs: Iterable[Env | None]) -> Env | None:
    """The variables where several ways meet; None where no way leads there."""
    reached = [env for env in envs if env is not None]
    if len(reached) < 2:
        return dict(reached[0]) if reached else None
    missing = frozenset({UNBOUND})
    names = dict.fromkeys(name for env in reached for name in env)
    return {name: joined(*(env.get(name, missing) for env in reached)) for name in names}


def constants(values: Iterable[Value]) -> list[Any] | None:
    """The objects that these values are, if each is one object for sure; else None."""
    found = []
    for value in values:
        atom = next(iter(value)) if len(value) == 1 else None
        if isinstance(atom, Known):
            found.append(atom.value)
        elif isinstance(atom, Items):
            inner = constants(atom.items)
            if inner is None:
                return None
            found.append(tuple(inner))
        else:
            return None
    return found


def _key(value: Any) -> Any:
    if isinstance(value, PLAIN):
        return type(value), value if value == value else id(value)
    if type(value) is tuple:
        return (tuple, *map(_key, value))
    if isinstance(value, slice):
        return slice, _key(value.start), _key(value.stop), _key(value.step)
    if isinstance(value, types.MethodType):
        return types.MethodType, id(value.__func__), id(value.__self__)
    if is_bound_builtin(value):
        return value.__name__, _key(value.__self__)
    return id(value)


def is_bound_builtin(value: Any) -> bool:
    """Whether an object is a method in C of another, as `[].append` is, and no function."""
    is_builtin = isinstance(value, types.BuiltinMethodType)
    return is_builtin and not isinstance(value.__self__, types.ModuleType | type(None))


def is_plain(value: Any) -> bool:
    """Whether an object is plain, or a tuple or slice of what is plain."""
    if type(value) is tuple:
        return all(map(is_plain, value))
    if isinstance(value, slice):
        return is_plain((value.start, value.stop, value.step))
    return isinstance(value, PLAIN)


def is_container(obj: Any) -> bool:
    """Whether it is one of torch's containers, or a subclass that iterates as they do."""
    kind: Any = type(obj)
    bases = [base for base in _CONTAINERS if isinstance(obj, base)]
    return bool(bases) and all(
        getattr(kind, name, None) is getattr(bases[0], name, None)
        for name in ("__iter__", "__getitem__", "__len__", "keys", "values", "items")
    )


def atoms_of(values: Iterable[Value]) -> Iterator[Atom]:
    """All atoms of some values, those inside of others too."""
    for atom in itertools.chain(*values):
        yield atom
        if isinstance(atom, Items):
            yield from atoms_of(atom.items)
        elif isinstance(atom, Keywords):
            yield from atoms_of(each for _, each in atom.items)
        elif isinstance(atom, Many):
            yield from atoms_of([atom.item])


def hold_code(values: Iterable[Value]) -> bool:
    """Whether a function may be, or be in, what is made of these values."""
    return any(map(_is_code, atoms_of(values)))


def _is_code(atom: Atom) -> bool:
    if isinstance(atom, Known):
        return callable(atom.value) and not isinstance(atom.value, nn.Module | type)
    return atom is CODE


def names_of(mapping: Mapping[str, Value], made: object) -> Value:
    """Values by name as one value, with the code that makes it."""
    return frozenset({Keywords(tuple(mapping.items()), id(made))})
