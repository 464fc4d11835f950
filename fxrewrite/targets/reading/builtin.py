"""What Python's own functions give, and those methods of containers that only read."""

from __future__ import annotations

import ast
import types
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..reading import objects
from .values import (
    UNKNOWN,
    Items,
    Known,
    Many,
    TensorOf,
    Value,
    constants,
    is_bound_builtin,
    is_plain,
    joined,
    known,
)

if TYPE_CHECKING:
    from .binding import Arguments
    from .expressions import Expressions

_COMPUTED = (abs, bool, divmod, float, int, len, max, min, pow, repr, round, str, sum, slice)
_READING = frozenset({"children", "named_children", "get_submodule", "items", "keys", "values"})
# Loops that are known to run more often are read like those of unknown length.
MOST_TURNS = 1024
_READING_ITEMS = frozenset({"items", "keys", "values", "get", "index", "count"})


def call(function: Any, given: Arguments, at: Expressions, node: ast.AST) -> Value | None:
    """What a call of one of Python's own functions gives; None where it is none that is known."""
    if is_bound_builtin(function):
        return method(function.__self__, function.__name__, given, at)
    is_plain_function = isinstance(function, type | types.BuiltinFunctionType)
    read = _READERS.get(function) if is_plain_function else None
    if read is not None and given.exact and not given.keywords:
        found: Value | None = read(given.positional, at, node)
        return found
    if function in _COMPUTED and given.exact and not given.keywords:
        operands = constants(given.positional)
        if operands is not None and all(map(is_plain, operands)):
            try:
                return known(function(*operands))
            except Exception:
                return UNKNOWN
    return None


def method(owner: Any, name: str, given: Arguments, at: Expressions) -> Value | None:
    """What a method of a container gives; None where it is none that is known to only read."""
    found = constants(given.values)
    if isinstance(owner, nn.Module) and name == "parameters":
        is_read = _is_torchs(owner, name) and found is not None and all(map(is_plain, found))
        return frozenset({Many(frozenset({TensorOf(Known(owner))}))}) if is_read else None
    if is_plain(owner):
        if found is None or not all(map(is_plain, found)):
            return None
        try:
            return known(getattr(owner, name)(*found)) if not given.keywords else UNKNOWN
        except Exception:
            return UNKNOWN
    if isinstance(owner, dict | list | tuple | set | frozenset):
        if name not in _READING_ITEMS:
            at.reader.change(owner, None)
            return None
        reads = found is not None and all(map(is_plain, found))
    else:
        is_own = isinstance(owner, nn.Module) and _is_torchs(owner, name)
        reads = is_own and name in _READING and found is not None and all(map(is_plain, found))
    if not reads or at.reader.is_changing(owner, None) or given.keywords:
        return None
    key = ("method", id(owner), name, repr(found))
    try:
        result = at.reader.once(key, lambda: getattr(owner, name)(*(found or ())))
        several = name not in ("get", "index", "count", "get_submodule")
        return (
            known(at.reader.once((*key, "items"), lambda: tuple(result)))
            if several
            else known(result)
        )
    except Exception:
        return UNKNOWN


def _is_torchs(owner: nn.Module, name: str) -> bool:
    kind: Any = type(owner)
    function = getattr(kind, name, None)
    return (getattr(function, "__globals__", {}).get("__name__") or "").startswith("torch.")


def _isinstance(given: tuple[Value, ...], at: Expressions, node: ast.AST) -> Value:
    kinds = constants(given[1:])
    results = []
    for atom in given[0]:
        if isinstance(atom, Known) and not isinstance(atom.value, torch.Tensor) and kinds:
            _looked_at(atom, at, node)
            try:
                results.append(known(isinstance(atom.value, kinds[0])))
            except TypeError:
                return UNKNOWN
        else:
            results.append(UNKNOWN)
    return joined(*results)


def _looked_at(atom: Known, at: Expressions, node: ast.AST) -> None:
    """A leaf may give way to a module of another type, so its type must not be asked for."""
    obj = atom.value
    if isinstance(obj, nn.Module) and id(obj) in at.reader.modules and at.reader.is_leaf(obj):
        at.reader.touch(obj, at.at(node))


def _hasattr(given: tuple[Value, ...], at: Expressions, node: ast.AST) -> Value | None:
    found = constants(given)
    if found is None or len(found) != 2 or not isinstance(found[1], str):
        return None
    obj, name = found
    if isinstance(obj, torch.Tensor) or at.reader.is_changing(obj, name):
        return UNKNOWN
    for atom in given[0]:
        assert isinstance(atom, Known | Items)
        if isinstance(atom, Known):
            _looked_at(atom, at, node)
    return known(hasattr(obj, name))


def _getattr(given: tuple[Value, ...], at: Expressions, node: ast.AST) -> Value | None:
    names = constants(given[1:2])
    if not names or not isinstance(names[0], str):
        return None
    found = []
    for atom in given[0]:
        there = not isinstance(atom, Known) or hasattr(atom.value, names[0])
        if there or len(given) < 3:
            found.append(objects.attribute(atom, names[0], at, node))
        else:
            found.append(given[2])
    return joined(*found)


def _type(given: tuple[Value, ...], at: Expressions, node: ast.AST) -> Value | None:
    found = constants(given)
    if found is None or len(found) != 1 or isinstance(found[0], torch.Tensor):
        return None
    for atom in given[0]:
        if isinstance(atom, Known):
            _looked_at(atom, at, node)
    return known(type(found[0]))


def _len(given: tuple[Value, ...], at: Expressions, node: ast.AST) -> Value | None:
    found = objects.iterate(given[0], at, node) if len(given) == 1 else UNKNOWN
    return known(len(found)) if isinstance(found, list) else UNKNOWN


def _range(given: tuple[Value, ...], at: Expressions, node: ast.AST) -> Value | None:
    found = constants(given)
    if found is None or not all(isinstance(each, int) for each in found):
        for value in given:
            at.reader.consume(value, at.at(node))
        return frozenset({Many(UNKNOWN)})
    turns = range(*found)
    return (
        _sequence(list(map(known, turns)))
        if len(turns) <= MOST_TURNS
        else frozenset({Many(UNKNOWN)})
    )


def _tuple(given: tuple[Value, ...], at: Expressions, node: ast.AST) -> Value | None:
    found = objects.iterate(given[0], at, node) if given else []
    return _sequence(found)


def _reversed(given: tuple[Value, ...], at: Expressions, node: ast.AST) -> Value | None:
    found = objects.iterate(given[0], at, node)
    return _sequence(found[::-1] if isinstance(found, list) else found)


def _enumerate(given: tuple[Value, ...], at: Expressions, node: ast.AST) -> Value | None:
    start = constants(given[1:])
    found = objects.iterate(given[0], at, node)
    if isinstance(found, list) and start is not None and all(isinstance(e, int) for e in start):
        first = start[0] if start else 0
        pairs = [frozenset({Items((known(first + i), e))}) for i, e in enumerate(found)]
        return frozenset({Items(tuple(pairs))})
    item = joined(*found) if isinstance(found, list) else found
    return frozenset({Many(frozenset({Items((UNKNOWN, item))}))})


def _zip(given: tuple[Value, ...], at: Expressions, node: ast.AST) -> Value | None:
    found = [objects.iterate(each, at, node) for each in given]
    if all(isinstance(each, list) for each in found):
        rows = [frozenset({Items(tuple(row))}) for row in zip(*found, strict=False)]
        return frozenset({Items(tuple(rows))})
    items = [joined(*each) if isinstance(each, list) else each for each in found]
    return frozenset({Many(frozenset({Items(tuple(items))}))})


def _next(given: tuple[Value, ...], at: Expressions, node: ast.AST) -> Value | None:
    if len(given[0]) != 1 or not isinstance(next(iter(given[0])), Many):
        return None
    return joined(objects.iterate(given[0], at, node), *given[1:])  # type: ignore[arg-type]


def _sequence(found: list[Value] | Value) -> Value:
    return frozenset({Items(tuple(found)) if isinstance(found, list) else Many(found)})


_READERS: dict[Any, Any] = {
    isinstance: _isinstance,
    hasattr: _hasattr,
    getattr: _getattr,
    type: _type,
    len: _len,
    range: _range,
    tuple: _tuple,
    reversed: _reversed,
    enumerate: _enumerate,
    zip: _zip,
    next: _next,
}
