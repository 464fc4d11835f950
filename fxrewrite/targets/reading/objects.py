"""What reading an attribute or an item of an object gives, and what it tells of its truth."""

from __future__ import annotations

import ast
import inspect
import types
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .reader import Reader
from .values import (
    CODE,
    DEFERRED,
    PLAIN,
    UNKNOWN,
    Atom,
    Foreign,
    Items,
    Keywords,
    Known,
    Many,
    Output,
    TensorOf,
    Value,
    constants,
    is_container,
    is_plain,
    joined,
    known,
)

if TYPE_CHECKING:
    from .expressions import Expressions

MISSING = object()
_WITHOUT_STATE = (types.ModuleType, super, list, dict, set, frozenset, tuple)
_REGISTRIES = ("_parameters", "_buffers", "_modules")


def truth(atom: Atom, reader: Reader) -> bool | None:
    """Whether what is there counts as true, or None where that may change."""
    if isinstance(atom, Items):
        return bool(atom.items)
    if isinstance(atom, Keywords):
        items = reader.keywords(atom)
        return None if items is None else bool(items)
    if not isinstance(atom, Known):
        return None
    value = atom.value
    if is_plain(value) or isinstance(value, types.FunctionType | types.MethodType | type):
        return bool(value)
    if is_container(value) or isinstance(value, dict | list | set | frozenset):
        return None if reader.is_changing(value, None) else bool(value)
    kind = type(value)
    plain = not hasattr(kind, "__bool__") and not hasattr(kind, "__len__")
    return True if plain else None


def is_key(atom: Atom, container: Atom, reader: Reader) -> bool | None:
    """Whether a text or number is in a dictionary or set that stays as it is; None if unclear."""
    if not isinstance(atom, Known) or not isinstance(container, Known):
        return None
    key, held = atom.value, container.value
    if type(key) not in (str, int) or type(held) not in (dict, set, frozenset):
        return None
    return None if reader.is_changing(held, None) else key in held


def attribute(atom: Atom, name: str, at: Expressions, node: ast.AST) -> Value:
    """What `atom.name` may give."""
    if isinstance(atom, Foreign) or atom is CODE:
        return frozenset({atom})
    if isinstance(atom, TensorOf) and name in ("device", "dtype"):
        at.reader.ask(atom.owner.value, at.at(node))
        return UNKNOWN
    if not isinstance(atom, Known):
        if isinstance(atom, Output | Items | Many | TensorOf | Keywords):  # a method of it, say
            at.reader.consume(frozenset({atom}), at.at(node))
        return UNKNOWN
    obj = atom.value
    if isinstance(obj, torch.Tensor):
        return UNKNOWN
    if isinstance(obj, nn.Module) and id(obj) in at.reader.modules:
        if name == "training":
            return UNKNOWN
        if at.reader.is_leaf(obj):
            if is_plain(_own(obj, name)):
                at.reader.look_at(obj, name, at.at(node))
            else:
                at.reader.touch(obj, at.at(node))
    if isinstance(obj, (*PLAIN, *_WITHOUT_STATE)):
        found = getattr(obj, name, MISSING)
        if found is MISSING:  # which raises
            return frozenset() if obj is None else UNKNOWN
        return known(found)
    found = _own(obj, name)
    if found is MISSING:
        return _of_class(obj, name, at, node)
    return known(found) | UNKNOWN if at.reader.is_changing(obj, name) else known(found)


def _own(obj: Any, name: str) -> Any:
    """What an object itself has under a name."""
    state = getattr(obj, "__dict__", None)
    if isinstance(obj, type):
        return MISSING
    if isinstance(obj, nn.Module):
        for registry in _REGISTRIES:
            if name in obj.__dict__.get(registry, ()):
                return obj.__dict__[registry][name]
    if isinstance(state, dict) and name in state:
        return state[name]
    return MISSING


def _of_class(obj: Any, name: str, at: Expressions, node: ast.AST) -> Value:
    """What an object has from its class; a property is read as the function that it is."""
    cls = obj if isinstance(obj, type) else type(obj)
    found = inspect.getattr_static(cls, name, MISSING)
    if isinstance(found, staticmethod):
        return known(found.__func__)
    if isinstance(found, classmethod):
        return known(types.MethodType(found.__func__, cls))
    if isinstance(found, types.FunctionType):
        return known(found if isinstance(obj, type) else types.MethodType(found, obj))
    if isinstance(found, property) and isinstance(found.fget, types.FunctionType):
        return at.inline(types.MethodType(found.fget, obj), node)
    if found is not MISSING and not hasattr(type(found), "__get__"):
        changing = at.reader.is_changing(obj, name) or at.reader.is_changing(cls, name)
        return known(found) | UNKNOWN if changing else known(found)
    if found is MISSING and isinstance(obj, nn.Module):
        getter = inspect.getattr_static(cls, "__getattr__", None)
        if getter is inspect.getattr_static(nn.Module, "__getattr__"):
            return UNKNOWN  # which raises
    at.reader.escape(obj, at.at(node))
    return UNKNOWN


def items_of(obj: Any) -> list[Any] | None:
    """What iterating over an object gives that is there already; None where nobody can say."""
    if isinstance(obj, list | tuple | dict | str | range):
        return list(obj)
    return list(obj) if is_container(obj) else None


def iterate(value: Value, at: Expressions, node: ast.AST) -> list[Value] | Value:
    """The items that iterating gives, one by one; or, of unknown number, what each may be."""
    if len(value) == 1:
        (atom,) = value
        if isinstance(atom, Items):
            return list(atom.items)
        if isinstance(atom, Known) and not at.reader.is_changing(atom.value, None):
            found = items_of(atom.value)
            if found is not None:
                return [known(each) for each in found]
    return joined(*[_item_of(atom, at, node) for atom in value])


def _item_of(atom: Atom, at: Expressions, node: ast.AST) -> Value:
    if isinstance(atom, Items):
        return joined(UNKNOWN, *atom.items)
    if isinstance(atom, Many):
        return atom.item
    if atom is CODE:
        return DEFERRED
    if isinstance(atom, Known):
        found = items_of(atom.value)
        if found is not None:
            extra = UNKNOWN if at.reader.is_changing(atom.value, None) else frozenset()
            return joined(extra, *map(known, found)) or UNKNOWN
    at.reader.consume(frozenset({atom}), at.at(node))
    return UNKNOWN


def item(atom: Atom, index: Value, at: Expressions, node: ast.AST) -> Value:
    """What `atom[index]` may give."""
    indices = constants([index])
    plain = indices is not None and is_plain(indices[0])
    if isinstance(atom, Items):
        if indices is not None and plain:
            try:
                found = atom.items[indices[0]]
            except (TypeError, IndexError):
                return UNKNOWN
            return frozenset({Items(found)}) if isinstance(indices[0], slice) else found
        return joined(UNKNOWN, *atom.items)
    if isinstance(atom, Many):
        return atom.item
    if atom is CODE:
        return DEFERRED
    if isinstance(atom, Known):
        obj = atom.value
        if isinstance(obj, torch.Tensor):
            at.reader.consume(index, at.at(node))
            return UNKNOWN
        if isinstance(obj, list | tuple | dict | str) or is_container(obj):
            return _item_of_known(obj, indices[0] if indices and plain else MISSING, at, node)
    at.reader.consume(frozenset({atom}) | index, at.at(node))
    return UNKNOWN


def _item_of_known(obj: Any, index: Any, at: Expressions, node: ast.AST) -> Value:
    changing = at.reader.is_changing(obj, None)
    if index is not MISSING and not changing:
        try:
            return known(at.reader.once(("item", id(obj), repr(index)), lambda: obj[index]))
        except (TypeError, IndexError, KeyError, AttributeError, ValueError):
            return UNKNOWN
    values: Iterable[Any] = obj.values() if isinstance(obj, dict | nn.ModuleDict) else obj
    found = joined(*[known(each) for each in values])
    if isinstance(index, slice):  # of which anything may come
        at.reader.escape(obj, at.at(node))
    return found | UNKNOWN
