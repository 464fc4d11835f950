"""Whether a function may see that a module has become another, but by calling it."""

from __future__ import annotations

import ast
import functools
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
    """What a function does with a module, or with what is reached from that by a path; or another.

    The module is the function's parameter `root`: `self`, or one that it is given as an argument.
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
    root: str = ""


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
        codes = _forward_codes(kind)
        places += [(Passage(e, _first_parameter(e), None, owner), False) for e in codes]
    for passage, of_any in places:
        source, _, _, scope = found(passage)
        root = _first_parameter(passage.code)
        for read in _reads(scope, root) if source is not None and scope is not None else ():
            if read.node in handed or not (of_any or read.is_set or read.path is not None):
                continue
            if _tells(read, passage.owner, module, new, _variables(passage)):
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
        source, _, _, scope = found(Passage(code, _first_parameter(code), None))
        if source is not None and scope is not None:
            reads = _reads(scope, _first_parameter(code))
            pending += [read.name for read in reads if read.path == ()]
    return tuple(codes)


def _first_parameter(code: CodeType) -> str:
    """What a method calls its module."""
    return code.co_varnames[0] if code.co_argcount else ""


def _variables(passage: Passage) -> dict[str, Any]:
    """The global variables of a method, as far as it is found by its owner."""
    method = getattr(type(passage.owner), passage.code.co_name, None)
    is_same = getattr(method, "__code__", None) is passage.code
    return method.__globals__ if is_same and method is not None else {}


def _tells(
    read: _Read,
    owner: Any,
    module: nn.Module,
    new: nn.Module,
    variables: Mapping[str, Any],
    inside: tuple[types.FunctionType, ...] = (),
) -> bool:
    may_be_any = read.path is None or owner is None
    known = None if may_be_any else _at(owner, read.path or ())
    if read.is_argument and read.of:
        was, now = ({each.__name__ for each in type(m).__mro__} for m in (module, new))
        return (known is module or may_be_any) and not read.of.isdisjoint(was - now)
    sets_mode = read.name in ("train", "eval") or (read.name == "training" and read.is_set)
    if sets_mode and isinstance(known, nn.Module) and not read.is_argument:
        return any(each is module for each in known.modules())
    if read.name in _OF_TENSORS and isinstance(known, nn.Module) and known is not module:
        return not read.is_metadata and any(each is module for each in known.modules())
    if known is not module:
        if known is None and read.is_set:
            return read.name in module.__dict__
        tensors = (*module._parameters, *module._buffers)
        return may_be_any and read.name in tensors and not read.is_metadata
    if read.is_argument:
        return _is_seen_inside(read, module, new, variables, inside)
    if read.is_set:
        return True
    before, after = getattr(module, read.name, None), getattr(new, read.name, None)
    if type(before) is not type(after):
        return True
    return not (read.is_metadata if isinstance(before, torch.Tensor) else bool(before == after))


def _is_seen_inside(
    read: _Read,
    module: nn.Module,
    new: nn.Module,
    variables: Mapping[str, Any],
    inside: tuple[types.FunctionType, ...],
) -> bool:
    """Whether a function that is given the module may tell, by what it does with the parameter."""
    call, name = read.node, read.name
    function = variables.get(name) if isinstance(call, ast.Call) else None
    if not isinstance(function, types.FunctionType) or function in inside:
        return True
    assert isinstance(call, ast.Call)
    code, positional = function.__code__, call.args
    names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    given = dict(zip(names[: code.co_argcount], positional, strict=False))
    given |= {each.arg: each.value for each in call.keywords if each.arg in names}
    parameters = [key for key, value in given.items() if _path(value, read.root) == read.path]
    _, _, _, scope = found(Passage(code, name, None))
    if scope is None or not parameters or any(isinstance(e, ast.Starred) for e in positional):
        return True
    return any(
        each.path is not None
        and _tells(each, module, module, new, function.__globals__, (*inside, function))
        for parameter in parameters
        for each in _reads(scope, parameter, is_module=True)
    )


@functools.lru_cache(maxsize=1024)
def _reads(scope: Scope, root: str, is_module: bool = False) -> tuple[_Read, ...]:
    return tuple(_all_reads(scope, root, is_module))


def _all_reads(scope: Scope, root: str, is_module: bool) -> Iterator[_Read]:
    above = {child: node for node in ast.walk(scope) for child in ast.iter_child_nodes(node)}
    for node in ast.walk(scope):
        if isinstance(node, ast.Attribute):
            is_set = not isinstance(node.ctx, ast.Load)
            is_metadata = _is_metadata(node, above)
            yield _Read(_path(node.value, root), node.attr, node, is_set, is_metadata, root=root)
        elif isinstance(node, ast.Call) and last_name(node.func) not in _CONTAINERS:
            name = last_name(node.func)
            given = [*node.args, *(each.value for each in node.keywords)]
            of = frozenset[str]()
            if name in ("isinstance", "issubclass", "type"):
                given, asked = given[:1], given[1:]
                of = frozenset(last_name(e) for each in asked for e in ast.walk(each)) - {""}
            for each in given:
                path = _path(each.value if isinstance(each, ast.Starred) else each, root)
                if path or of or (path is not None and is_module):
                    yield _Read(path, name, node, is_argument=True, of=of, root=root)
        elif is_module and isinstance(node, ast.Name) and node.id == root:
            is_told = isinstance(above[node], ast.Attribute | ast.Call | ast.keyword)
            yield from () if is_told else [_Read((), root, node, is_set=True, root=root)]


def _is_metadata(node: ast.Attribute, above: dict[ast.AST, ast.AST]) -> bool:
    """Whether of a tensor, or of the first of several, no number is asked for."""
    parent: ast.AST | None = above.get(node)
    if node.attr in _OF_TENSORS and isinstance(parent, ast.Call):
        outer = above.get(parent)
        if not isinstance(outer, ast.Call) or last_name(outer.func) != "next":
            return False
        parent = above.get(outer)
    return isinstance(parent, ast.Attribute) and asks_metadata(parent.attr)


def _path(node: ast.expr, root: str) -> tuple[str, ...] | None:
    """The attributes by which something is reached from a variable, if it is."""
    names: list[str] = []
    while True:
        if isinstance(node, ast.Attribute):
            names.append(node.attr)
        elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
            names.append(str(node.slice.value))
        else:
            break
        node = node.value
    return tuple(reversed(names)) if isinstance(node, ast.Name) and node.id == root else None


def _at(owner: Any, path: Sequence[str]) -> Any:
    for name in path:
        if isinstance(owner, list | tuple):
            owner = owner[int(name)] if name.isdigit() and int(name) < len(owner) else None
        else:
            owner = owner.get(name) if isinstance(owner, dict) else getattr(owner, name, None)
    return owner
