"""Read a call: of a function, by reading its body; of a module, by noting it or its forward."""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ...ir.aliases import hands_on
from ..reading import builtin, objects
from .binding import Arguments, bound
from .held import is_of_library
from .reader import Entered, Reader, UnreadableError
from .sources import source_of
from .values import (
    ANYTHING,
    CODE,
    DEFERRED,
    UNKNOWN,
    Atom,
    Env,
    Foreign,
    Items,
    Known,
    Output,
    Value,
    atoms_of,
    constants,
    hold_code,
    joined,
    known,
)

if TYPE_CHECKING:
    from .expressions import Expressions

_MOST_DEEP = 40
_CALL_IMPLS = tuple(
    getattr(nn.Module, name)
    for name in ("__call__", "_call_impl", "_wrapped_call_impl")
    if hasattr(nn.Module, name)
)


def call(callee: Atom, given: Arguments, at: Expressions, node: ast.AST) -> Value:
    """What a call may give; the modules that it calls are noted."""
    if isinstance(callee, Foreign):
        return opaque(None, given, at, node, package=callee.package)
    if not isinstance(callee, Known):
        at.reader.consume(frozenset({callee}), at.at(node))
        result = opaque(None, given, at, node)
        return result | DEFERRED if callee is CODE else result
    function = callee.value
    if isinstance(function, nn.Module):
        return _module(function, given, at, node)
    if isinstance(function, functools.partial):
        together = Arguments(
            (*map(known, function.args), *given.positional),
            {**{k: known(v) for k, v in function.keywords.items()}, **given.keywords},
            given.others,
        )
        return call(Known(function.func), together, at, node)
    if isinstance(function, types.MethodType):
        return _method(function, given, at, node)
    if isinstance(function, types.FunctionType):
        return _function(function, given, at, node)
    if (found := builtin.call(function, given, at, node)) is not None:
        return found
    if isinstance(function, type) and not is_of_library(function):
        return _constructor(function, given, at, node)
    own = inspect.getattr_static(type(function), "__call__", None)
    if isinstance(own, types.FunctionType) and not isinstance(function, type):
        return _function(own, given.after(known(function)), at, node)
    return opaque(function, given, at, node)


def opaque(
    function: Any,
    given: Arguments,
    at: Expressions,
    node: ast.AST,
    where: str = "",
    package: str = "",
) -> Value:
    """The value of a call that is not read: it may do anything with what it can get at."""
    where = where or at.at(node)
    package = package or (getattr(function, "__module__", None) or "").partition(".")[0]
    comes_alone = at.reader.is_foreign(package) and not getattr(function, "__closure__", None)
    trusted = comes_alone and all(map(_leads_nowhere, atoms_of(given.values)))
    for atom in itertools.chain(*given.values):
        if trusted and isinstance(atom, Known) and isinstance(atom.value, nn.Module):
            at.reader.hand(atom.value, where)
        else:
            at.reader.consume(frozenset({atom}), where)
    if function is not None:
        at.reader.escape(function, where)
    return UNKNOWN | DEFERRED if hold_code(given.values) else UNKNOWN


def _leads_nowhere(atom: Atom) -> bool:
    """Whether it brings no code of the model's own that could reach into a module."""
    if isinstance(atom, Known):
        return atom.is_plain or isinstance(atom.value, nn.Module | torch.Tensor)
    return isinstance(atom, Output | Items) or atom is ANYTHING


def _constructor(cls: type, given: Arguments, at: Expressions, node: ast.AST) -> Value:
    """Read how an object is made; of the object nothing further is known."""
    make = inspect.getattr_static(cls, "__init__", None)
    plain = type(cls) is type and inspect.getattr_static(cls, "__new__") is object.__new__
    if plain and isinstance(make, types.FunctionType):
        _function(make, given.after(UNKNOWN), at, node)
        return UNKNOWN
    return opaque(cls, given, at, node)


def _method(method: types.MethodType, given: Arguments, at: Expressions, node: ast.AST) -> Value:
    function, owner = method.__func__, method.__self__
    if isinstance(owner, nn.Module) and function in _CALL_IMPLS:
        return _forward(owner, given, at, node)
    if (found := builtin.method(owner, method.__name__, given, at)) is not None:
        return found
    if isinstance(function, types.FunctionType):
        return _function(function, given.after(known(owner)), at, node)
    return call(Known(function), given.after(known(owner)), at, node)


def _function(
    function: types.FunctionType, given: Arguments, at: Expressions, node: ast.AST
) -> Value:
    """Read a function's body on what it is given."""
    if function is checkpoint and given.positional:
        return joined(*[call(atom, given.without(1), at, node) for atom in given.positional[0]])
    wrapped = getattr(function, "__wrapped__", None)
    if function is not nn.Sequential.forward and is_of_library(function):
        if isinstance(wrapped, types.FunctionType):
            return _function(wrapped, given, at, node)
        return opaque(function, given, at, node)
    env = bound(function, given)
    owner = constants(given.positional[:1])
    functions = at.reader.functions
    if env is None or len(functions) > _MOST_DEEP:
        return opaque(function, given, at, node)
    entry = Entered(function.__code__, id(owner[0]) if owner else 0, env, len(at.reader.guards))
    if at.reader.recurs(entry):
        return UNKNOWN
    if sum(each.is_of(entry) for each in functions) > 1:
        return opaque(function, given, at, node)
    with at.reader.under(functions, entry):
        result = read(function, env, at.reader, lambda why: opaque(function, given, at, node, why))
    if entry.recurs:  # where it calls itself, what it gives is somebody else's
        at.reader.consume(result, at.at(node))
    return result


def read(
    function: types.FunctionType,
    env: Env,
    reader: Reader,
    otherwise: Callable[[str], Value],
    *,
    is_root: bool = False,
) -> Value:
    """What a function may return, given its arguments by name; `otherwise` if it can't be read."""
    from .statements import Frame

    source = reader.once(("source", function.__code__), lambda: source_of(function.__code__))
    if source is None:
        code = function.__code__
        return otherwise(f"{code.co_name} ({code.co_filename}), whose source can't be read")
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))

    def names(name: str) -> Any:
        if name in cells:
            try:
                return cells[name].cell_contents
            except ValueError:
                return objects.MISSING
        return function.__globals__.get(name, objects.MISSING)

    frame = Frame(reader, source, names, is_root=is_root)
    stacks = reader.stacks()
    try:
        return frame.run(env)
    except (UnreadableError, RecursionError) as error:
        reader.give_up(stacks, str(error))
        return otherwise(str(error))


def _module(module: nn.Module, given: Arguments, at: Expressions, node: ast.AST) -> Value:
    """Read the call of a module, with its hooks."""
    state = module.__dict__
    for each in state["_forward_pre_hooks"].values():
        if read_hook(each, module, at, node):
            for value in given.values:
                at.reader.consume(value, at.at(node))
            unknown = tuple(UNKNOWN for _ in given.positional)
            others = UNKNOWN if given.others else given.others
            given = Arguments(unknown, dict.fromkeys(given.keywords, UNKNOWN), others)
    kind: Any = type(module)
    if isinstance(kind.__call__, types.FunctionType) and not is_of_library(kind.__call__):
        result = _function(kind.__call__, given.after(known(module)), at, node)
    else:
        result = _forward(module, given, at, node)
    for name in ("_forward_hooks", "_backward_hooks", "_backward_pre_hooks"):
        for each in state[name].values():
            if read_hook(each, module, at, node) and name == "_forward_hooks":
                at.reader.consume(result, at.at(node))
                result = UNKNOWN
    return result


def read_hook(hook: Any, module: nn.Module, at: Expressions, node: ast.AST) -> bool:
    """Read a hook; false where it is one of torch's own, which keep to the module."""
    function = hook.__func__ if isinstance(hook, types.MethodType) else hook
    if is_of_library(function if hasattr(function, "__code__") else type(function)):
        return False
    count = getattr(getattr(function, "__code__", None), "co_argcount", 3) - (function is not hook)
    given = Arguments((known(module), *[UNKNOWN] * (count - 1)))
    with at.reader.under(at.reader.path, id(hook)):
        at.reader.consume(call(Known(hook), given, at, node), at.at(node))
    return True


def _forward(module: nn.Module, given: Arguments, at: Expressions, node: ast.AST) -> Value:
    reader = at.reader
    kind: Any = type(module)
    if id(module) in reader.modules and reader.is_leaf(module):
        for inner in module.modules():
            if inner is not module:
                reader.touch(inner, at.at(node))
        if hands_on(module) and not module.training and len(given.values) == 1:
            return given.values[0]
        found = reader.call(module, node, given.values, at.at(node), on_one=given.is_one)
        return frozenset({found})
    own = module.__dict__.get("forward")
    if own is not None:
        return call(Known(own), given, at, node)
    if isinstance(kind.forward, types.FunctionType) and "_orig_mod" not in module._modules:
        return _function(kind.forward, given.after(known(module)), at, node)
    return opaque(module, given, at, node)
