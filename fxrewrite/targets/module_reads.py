"""Whether a function may see that a module has become another, but by calling it."""

from __future__ import annotations

import ast
import builtins
import functools
import types
from collections.abc import Iterable, Iterator, Mapping
from types import CodeType
from typing import Any

import attrs
import torch
from torch import nn

from ..tracing.passages import Passage, is_passed_over
from .sources import Scope, asks_metadata, found, last_name

# Of what these are given, they only look for what stands at which place.
_CONTAINERS = frozenset({"enumerate", "iter", "len", "list", "next", "reversed", "tuple", "zip"})
_OF_ATTRIBUTES = frozenset({"delattr", "getattr", "hasattr", "setattr"})
_OF_TENSORS = frozenset(
    {"buffers", "named_buffers", "named_parameters", "parameters", "state_dict"}
)
_UNKNOWN = object()


def read_flaw(
    owners: Iterable[nn.Module], passages: Iterable[Passage], module: nn.Module, new: nn.Module
) -> str | None:
    """Why some code may tell a module from what it becomes, or None; with the line.

    Args:
        owners: the modules that contain it, of which the forwards are looked at, for what they do
            with what is reached by attributes of `self`.
        passages: those of values through calls of functions, where any variable may be the module.
        module: a module of the model.
        new: what stands in its place afterwards.
    """
    passages = list(passages)
    # A function that is given the module, and calls it, is one of the passages itself.
    functions = [function for each in passages if (function := found(each)) is not None]
    handed = {node for each in functions for node in (each.begin, each.end)}
    places = [(each, True) for each in passages]
    for each in owners:
        kind: Any = type(each)  # mypy takes the hash of a class for that of its instances
        places += [(attrs.evolve(forward, owner=each), False) for forward in _forwards(kind)]
    for passage, of_any in places:
        if (function := found(passage)) is None:
            continue
        root, owner = _first_parameter(passage.code), passage.owner
        known = {} if owner is None else {root: owner}
        look = _Look(passage.code, function.scope, known, passage.variables, module, new, of_any)
        for node in _reads(function.scope):
            if node not in handed and look.tells(node):
                what = last_name(node.func if isinstance(node, ast.Call) else node) or "more"
                asked = f"{what} of the {type(module).__name__} may be asked for"
                return f"{asked}, at {function.source.line(node)}"
    return None


@functools.lru_cache(maxsize=1024)
def _forwards(kind: Any) -> tuple[Passage, ...]:
    """A type's forward, and the methods of it that it mentions."""
    known, pending = dict[CodeType, Passage](), ["forward"]
    while pending:
        method = getattr(kind, pending.pop(), None)
        code = getattr(method, "__code__", None)
        if code is None or code in known or is_passed_over(code):
            continue
        root = _first_parameter(code)
        known[code] = Passage(code, root, None, variables=getattr(method, "__globals__", {}))
        function = found(known[code])
        for each in _reads(function.scope) if function is not None else ():
            if isinstance(each, ast.Attribute) and last_name(each.value) == root:
                pending.append(each.attr)
    return tuple(known.values())


def _first_parameter(code: CodeType) -> str:
    """What a method calls its module."""
    return code.co_varnames[0] if code.co_argcount else ""


@attrs.frozen
class _Look:
    """A look at a function for what may tell a module from a new one.

    `known` are parameters whose value is known, `variables` are the function's global ones. Any
    other variable may be the module if it is `of_any`.
    """

    code: CodeType
    scope: Scope
    known: Mapping[str, Any]
    variables: Mapping[str, Any]
    module: nn.Module
    new: nn.Module
    of_any: bool = False
    inside: tuple[types.FunctionType, ...] = ()

    def tells(self, node: ast.AST) -> bool:
        """Whether an expression may tell the two apart."""
        if isinstance(node, ast.Attribute):
            is_set = not isinstance(node.ctx, ast.Load)
            return self._attribute(node.attr, node.value, node, is_set)
        if isinstance(node, ast.Call):
            return self._call(node)
        is_other_use = not isinstance(
            _above(self.scope)[node], ast.Attribute | ast.Call | ast.keyword
        )
        return is_other_use and last_name(node) in self.known

    def _attribute(self, name: str, of: ast.expr, node: ast.expr, is_set: bool) -> bool:
        held, is_metadata = self._value(of), _is_metadata(node, self.scope)
        if name in ("train", "eval"):
            return self._may_hold(held)
        if name in _OF_TENSORS and held is not self.module:
            return not is_metadata and self._may_hold(held)
        if held is not self.module and held is not _UNKNOWN:
            return False
        if is_set:
            return held is self.module or name in self.module.__dict__
        if name == "__class__":
            return self._asks_type(node, held)
        if held is _UNKNOWN and (not self.of_any or is_metadata or hasattr(nn.Module, name)):
            return False
        return self._differs(name, is_metadata)

    def _differs(self, name: str, is_metadata: bool) -> bool:
        before, after = (_attribute(each, name) for each in (self.module, self.new))
        if type(before) is not type(after) or before is _UNKNOWN:
            return True
        if isinstance(before, torch.Tensor):
            return not is_metadata
        return before is not after and not bool(before == after)

    def _call(self, node: ast.Call) -> bool:
        name = last_name(node.func)
        given = [*node.args, *(each.value for each in node.keywords)]
        given = [each.value if isinstance(each, ast.Starred) else each for each in given]
        if name in _CONTAINERS or not given:
            return False
        first = self._value(given[0])
        if name in ("isinstance", "issubclass") and len(given) == 2:
            return self._may_be(first) and self._is_asked_apart(given[1])
        if name == "type" and len(given) == 1:
            return self._asks_type(node, first)
        if name in _OF_ATTRIBUTES and first is not self.module and len(given) > 1:
            key = self._value(given[1])
            is_set = name in ("setattr", "delattr")
            return isinstance(key, str) and self._attribute(key, given[0], node, is_set)
        return any(map(self._is_or_has, given)) and self._tells(node)

    def _is_or_has(self, node: ast.expr) -> bool:
        """Whether an argument is the module, or a container with it where that is looked for."""
        held = self._value(node)
        if isinstance(held, list | tuple | nn.ModuleList | nn.Sequential):
            return self.of_any and any(each is self.module for each in held)
        if isinstance(held, dict | nn.ModuleDict):
            return self.of_any and any(each is self.module for each in held.values())
        return held is self.module

    def _asks_type(self, node: ast.expr, held: Any) -> bool:
        """Whether the answer to a question for a type may be one of theirs, or go anywhere.

        A guarded module has a type of its own, so that it is no answer that both give the same.
        """
        above = _above(self.scope)[node]
        if not self._may_be(held) or not isinstance(above, ast.Compare):
            return self._may_be(held)
        others = [each for each in (above.left, *above.comparators) if each is not node]
        kinds = [kind for each in others for kind in self._kinds(each)]
        return any(each in (_UNKNOWN, type(self.module), type(self.new)) for each in kinds)

    def _may_be(self, held: Any) -> bool:
        return held is self.module or (held is _UNKNOWN and self.of_any)

    def _may_hold(self, held: Any) -> bool:
        if isinstance(held, nn.Module):
            return any(each is self.module for each in held.modules())
        return self._may_be(held)

    def _is_asked_apart(self, node: ast.expr) -> bool:
        """Whether one of the two alone is an instance of types that an expression names."""
        kinds = tuple(self._kinds(node))
        return _UNKNOWN in kinds or isinstance(self.module, kinds) != isinstance(self.new, kinds)

    def _kinds(self, node: ast.expr) -> Iterator[Any]:
        """The types that an expression names, or what is not known to be one."""
        if isinstance(node, ast.BinOp):
            yield from (*self._kinds(node.left), *self._kinds(node.right))
            return
        value = self._value(node)
        for each in value if isinstance(value, tuple) else (value,):
            kind = type(None) if each is None else each
            yield kind if isinstance(kind, type) else _UNKNOWN

    def _tells(self, call: ast.Call) -> bool:
        """Whether a function that is given the module tells, by what it does with a parameter."""
        function = self._value(call.func)
        if not isinstance(function, types.FunctionType) or function in self.inside:
            return True
        code = function.__code__
        names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        given = dict(zip(names[: code.co_argcount], call.args, strict=False))
        given |= {each.arg: each.value for each in call.keywords if each.arg in names}
        held = [key for key, value in given.items() if self._value(value) is self.module]
        inside = found(Passage(code, code.co_name, None))
        if inside is None or not held or any(isinstance(e, ast.Starred) for e in call.args):
            return True
        look = attrs.evolve(
            self,
            code=code,
            scope=inside.scope,
            known=dict.fromkeys(held, self.module),
            variables=function.__globals__,
            of_any=False,
            inside=(*self.inside, function),
        )
        return any(look.tells(each) for each in _reads(inside.scope, strict=True))

    def _value(self, node: ast.expr) -> Any:
        """What an expression is, as far as that is known from attributes and global variables."""
        match node:
            case ast.Constant():
                return node.value
            case ast.Name():
                if node.id in self.known:
                    return self.known[node.id]
                if node.id in _local_names(self.code):
                    return _UNKNOWN
                return self.variables.get(node.id, vars(builtins).get(node.id, _UNKNOWN))
            case ast.Attribute():
                return _attribute(self._value(node.value), node.attr)
            case ast.Subscript():
                return _item(self._value(node.value), self._value(node.slice))
            case ast.Tuple() | ast.List():
                return tuple(self._value(each) for each in node.elts)
        return _UNKNOWN


def _attribute(held: Any, name: str) -> Any:
    if held is _UNKNOWN:
        return _UNKNOWN
    if isinstance(held, types.ModuleType):  # which might import what is asked for
        return vars(held).get(name, _UNKNOWN)
    try:
        return getattr(held, name, None)
    except Exception:  # of a property
        return _UNKNOWN


def _item(held: Any, key: Any) -> Any:
    if held is _UNKNOWN or not isinstance(key, str | int):
        return _UNKNOWN
    if isinstance(held, nn.Module):
        return _attribute(held, str(key))
    try:
        return held[key]
    except (IndexError, KeyError, TypeError):
        return None


@functools.lru_cache(maxsize=1024)
def _reads(scope: Scope, strict: bool = False) -> tuple[ast.AST, ...]:
    kinds = (ast.Attribute, ast.Call, *[ast.Name] * strict)
    return tuple(each for each in ast.walk(scope) if isinstance(each, kinds))


@functools.lru_cache(maxsize=1024)
def _above(scope: Scope) -> dict[ast.AST, ast.AST]:
    return {child: node for node in ast.walk(scope) for child in ast.iter_child_nodes(node)}


@functools.lru_cache(maxsize=1024)
def _local_names(code: CodeType) -> frozenset[str]:
    """The variables of a function, of those inside of it, and of those around it that it reads."""
    inside = [_local_names(each) for each in code.co_consts if isinstance(each, CodeType)]
    return frozenset(code.co_varnames + code.co_cellvars + code.co_freevars).union(*inside)


def _is_metadata(node: ast.AST, scope: Scope) -> bool:
    """Whether of a tensor, or of the first of several, no number is asked for."""
    above = _above(scope)
    parent: ast.AST | None = above.get(node)
    if getattr(node, "attr", "") in _OF_TENSORS and isinstance(parent, ast.Call):
        outer = above.get(parent)
        if not isinstance(outer, ast.Call) or last_name(outer.func) != "next":
            return False
        parent = above.get(outer)
    return isinstance(parent, ast.Attribute) and asks_metadata(parent.attr)
