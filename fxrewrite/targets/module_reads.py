"""Whether a function may see that a module has become another, but by calling it."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterable, Iterator, Sequence
from types import CodeType
from typing import Any

import attrs
import torch
from torch import nn

from ..tracing.passages import Passage, is_passed_over
from .sources import Scope, asks_metadata, found, last_name

# Of what these are given, they only look for what stands at which place.
_CONTAINERS = frozenset({"enumerate", "iter", "len", "list", "next", "reversed", "tuple", "zip"})
_OF_TENSORS = frozenset(
    {"buffers", "named_buffers", "named_parameters", "parameters", "state_dict"}
)


@attrs.frozen
class _Read:
    """What a function does with `self`, or with what is reached from it by a path; or with another.

    `name` is an attribute that it reads or sets, or else a call that is given it: `of` has then the
    names of the types that `isinstance` asks for. A read `is_metadata` where it asks for the type,
    device or shape of a tensor alone.
    """

    path: tuple[str, ...] | None
    name: str
    node: ast.AST
    is_set: bool = False
    is_metadata: bool = False
    is_argument: bool = False
    of: frozenset[str] = frozenset()


def read_flaw(
    owners: Iterable[nn.Module], passages: Iterable[Passage], module: nn.Module, new: nn.Module
) -> str | None:
    """Why some code may tell a module from what it becomes, or None; with the line.

    Args:
        owners: the modules that contain it, of which the forwards are looked at, by paths from
            `self`.
        passages: those of values through calls of functions, which are looked at for any module.
        module: a module of the model.
        new: what stands in its place afterwards.
    """
    passages = list(passages)
    # A function that is given the module, and calls it, is one of the passages itself.
    handed = {node for each in passages for node in found(each)[1:3] if isinstance(node, ast.expr)}
    places = [(each, True) for each in passages]
    for owner in owners:
        kind: Any = type(owner)  # mypy takes the hash of a class for that of its instances
        places += [(Passage(code, "self", None, owner), False) for code in _forward_codes(kind)]
    for passage, of_any in places:
        source, _, _, scope = found(passage)
        for read in _reads(scope) if source is not None and scope is not None else ():
            is_asked = of_any or read.path is not None
            if is_asked and read.node not in handed and _tells(read, passage.owner, module, new):
                assert source is not None
                kind = type(module).__name__
                return f"{read.name} of the {kind} may be asked for, at {source.line(read.node)}"
    return None


@functools.lru_cache(maxsize=1024)
def _forward_codes(kind: Any) -> tuple[CodeType, ...]:
    """The code of a type's forward, and of the methods that it mentions."""
    codes, pending = dict[CodeType, None](), ["forward"]
    while pending:
        code = getattr(getattr(kind, pending.pop(), None), "__code__", None)
        if code is None or code in codes or is_passed_over(code):
            continue
        codes[code] = None
        source, _, _, scope = found(Passage(code, "self", None))
        if source is not None and scope is not None:
            pending += [read.name for read in _reads(scope) if read.path == ()]
    return tuple(codes)


def _tells(read: _Read, owner: Any, module: nn.Module, new: nn.Module) -> bool:
    known = None if read.path is None else _at(owner, read.path)
    if read.is_argument and read.of:
        was, now = ({each.__name__ for each in type(m).__mro__} for m in (module, new))
        return (known is module or read.path is None) and not read.of.isdisjoint(was - now)
    if read.name in _OF_TENSORS and isinstance(known, nn.Module) and known is not module:
        return not read.is_metadata and any(each is module for each in known.modules())
    if known is not module:
        tensors = (*module._parameters, *module._buffers)
        return read.path is None and read.name in tensors and not read.is_metadata
    if read.is_argument or read.is_set:
        return True
    before, after = getattr(module, read.name, None), getattr(new, read.name, None)
    if type(before) is not type(after):
        return True
    return not (read.is_metadata if isinstance(before, torch.Tensor) else bool(before == after))


@functools.lru_cache(maxsize=1024)
def _reads(scope: Scope) -> tuple[_Read, ...]:
    return tuple(_all_reads(scope))


def _all_reads(scope: Scope) -> Iterator[_Read]:
    above = {child: node for node in ast.walk(scope) for child in ast.iter_child_nodes(node)}
    for node in ast.walk(scope):
        if isinstance(node, ast.Attribute):
            is_set = not isinstance(node.ctx, ast.Load)
            is_metadata = _is_metadata(node, above)
            yield _Read(_path(node.value), node.attr, node, is_set, is_metadata)
        elif isinstance(node, ast.Call) and last_name(node.func) not in _CONTAINERS:
            name = last_name(node.func)
            given = [*node.args, *(each.value for each in node.keywords)]
            types = frozenset[str]()
            if name in ("isinstance", "issubclass", "type"):
                given, asked = given[:1], given[1:]
                types = frozenset(last_name(e) for each in asked for e in ast.walk(each)) - {""}
            for each in given:
                path = _path(each.value if isinstance(each, ast.Starred) else each)
                if path or types:
                    yield _Read(path, name, node, is_argument=True, of=types)


def _is_metadata(node: ast.Attribute, above: dict[ast.AST, ast.AST]) -> bool:
    """Whether of a tensor, or of the first of several, no number is asked for."""
    parent: ast.AST | None = above.get(node)
    if node.attr in _OF_TENSORS and isinstance(parent, ast.Call):
        outer = above.get(parent)
        if not isinstance(outer, ast.Call) or last_name(outer.func) != "next":
            return False
        parent = above.get(outer)
    return isinstance(parent, ast.Attribute) and asks_metadata(parent.attr)


def _path(node: ast.expr) -> tuple[str, ...] | None:
    """The attributes by which something is reached from `self`, if it is."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return tuple(reversed(names)) if isinstance(node, ast.Name) and node.id == "self" else None


def _at(owner: Any, path: Sequence[str]) -> Any:
    for name in path:
        owner = getattr(owner, name, None)
    return owner
