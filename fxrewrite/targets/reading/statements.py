"""Read the body of a function: every way it may go, and what each variable may be then."""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import Any

from torch import nn

from ..reading import objects
from .loops import Loops
from .reader import Reader, UnreadableError
from .sources import Source, captured, parameters
from .values import UNKNOWN, Env, Foreign, Known, Value, constants, hold_code, joined, joined_envs


class Frame(Loops):
    """Reads one function on what it is given; `returned` is what may come back."""

    def __init__(
        self, reader: Reader, source: Source, names: Callable[[str], Any], *, is_root: bool = False
    ) -> None:
        super().__init__(reader, source, names)
        self.returned: Value = frozenset()
        self._is_root = is_root
        # Variables at any moment inside the `try` statements around.
        self._watches: list[list[Env | None]] = []
        self._captured = captured(source.definition)
        self._shared: Env = {}

    def run(self, given: Env) -> Value:
        """What the function may return, given its arguments."""
        self.env = {}
        self.self_value = next(iter(given.values()), UNKNOWN)
        for name, value in given.items():
            self._bind(name, value)
        self.block(self.source.body)
        if self.env is not None:
            self.returned |= {Known(None)}
        before = None
        while before != (before := (len(self.deferred), dict(self._shared))) and self.deferred:
            for node in list(self.deferred.values()):
                self._run_deferred(node)
        return self.returned

    def block(self, statements: list[ast.stmt]) -> None:
        """Read statements one after the other, as far as any way leads."""
        for each in statements:
            if self.env is None:
                return
            self.reader.step()
            self._watch()
            method = getattr(self, f"_{type(each).__name__.lower()}", None)
            if method is None:
                raise UnreadableError(f"{self.at(each)} can't be followed")
            method(each)
            self._watch()

    def store(self, target: ast.expr, value: Value) -> None:
        """Give what stands left of an assignment its value."""
        if isinstance(target, ast.Name):
            self._bind(target.id, value)
        elif isinstance(target, ast.Tuple | ast.List):
            self._unpack(target.elts, value, target)
        elif isinstance(target, ast.Starred):
            self.reader.consume(value, self.at(target))
            self.store(target.value, UNKNOWN)
        elif isinstance(target, ast.Attribute | ast.Subscript):
            self.reader.consume(value, self.at(target))
            self.reader.puts_code |= hold_code([value])
            name = target.attr if isinstance(target, ast.Attribute) else None
            if isinstance(target, ast.Subscript):
                self.used(target.slice)
            for atom in self.value(target.value):
                if isinstance(atom, Known):
                    self.reader.change(atom.value, name)
                    if isinstance(atom.value, nn.Module):  # of which another may take the place
                        self.reader.touch(atom.value, self.at(target))
                else:
                    self.reader.consume(frozenset({atom}), self.at(target))
        else:
            raise UnreadableError(f"{self.at(target)} can't be followed")

    def _bind(self, name: str, value: Value) -> None:
        self.here[name] = value
        if name in self._captured:
            self._shared[name] = joined(self._shared.get(name, frozenset()), value)

    def _unpack(self, targets: list[ast.expr], value: Value, node: ast.AST) -> None:
        found = objects.iterate(value, self, node)
        starred = any(isinstance(each, ast.Starred) for each in targets)
        if isinstance(found, list) and len(found) == len(targets) and not starred:
            for target, each in zip(targets, found, strict=True):
                self.store(target, each)
            return
        either = joined(*found) if isinstance(found, list) else found
        for target in targets:
            self.store(target, either or UNKNOWN)

    def _watch(self) -> None:
        if self.env is not None:
            for watch in self._watches:
                watch[:] = [joined_envs([*watch, self.env])]

    # What follows reads a statement each.

    def _expr(self, node: ast.Expr) -> None:
        self.value(node.value)

    def _assign(self, node: ast.Assign) -> None:
        value = self.value(node.value)
        for target in node.targets:
            self.store(target, value)

    def _annassign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.store(node.target, self.value(node.value))

    def _augassign(self, node: ast.AugAssign) -> None:
        reading: Any = ast.copy_location(_loading(node.target), node.target)
        values = [self.value(reading), self.value(node.value)]
        self.store(node.target, self._computed(node, node.op, values))

    def _return(self, node: ast.Return) -> None:
        value = self.value(node.value) if node.value is not None else frozenset({Known(None)})
        if self._is_root:
            self.reader.consume(value, self.at(node))
        self.returned = joined(self.returned, value)
        self._watch()
        self.env = None

    def _pass(self, node: ast.stmt) -> None:
        """Nothing comes of it."""

    def _import(self, node: ast.Import | ast.ImportFrom) -> None:
        relative = isinstance(node, ast.ImportFrom) and node.level > 0
        for alias in node.names:
            source = node.module or "" if isinstance(node, ast.ImportFrom) else alias.name
            package = "" if relative else source.partition(".")[0]
            found = frozenset({Foreign(package)}) if self.reader.is_foreign(package) else UNKNOWN
            self._bind((alias.asname or alias.name).partition(".")[0], found)

    _importfrom = _import

    def _assert(self, node: ast.Assert) -> None:
        self.truth(node.test)

    def _raise(self, node: ast.Raise) -> None:
        for each in (node.exc, node.cause):
            if each is not None:
                self.used(each)
        self._watch()
        self.env = None

    def _delete(self, node: ast.Delete) -> None:
        for target in node.targets:
            if isinstance(target, ast.Name):
                self.here.pop(target.id, None)
            elif isinstance(target, ast.Attribute | ast.Subscript):
                self.store(target, UNKNOWN)

    def _functiondef(self, node: ast.FunctionDef) -> None:
        for each in (*node.decorator_list, *node.args.defaults):
            self.used(each)
        self._bind(node.name, self.defer(node))

    def _if(self, node: ast.If) -> None:
        test = self.truth(node.test)
        if test is not None:
            self.block(node.body if test else node.orelse)
            return
        before = dict(self.here)
        with self.reader.under(self.reader.conditions, f"if {ast.unparse(node.test)}:"):
            self.block(node.body)
            after, self.env = self.env, before
            self.block(node.orelse)
        self.env = joined_envs([after, self.env])

    def _match(self, node: ast.Match) -> None:
        self.used(node.subject)
        before, ends = self.env, []
        for case in node.cases:
            self.env = dict(before or {})
            for each in ast.walk(case.pattern):
                name = getattr(each, "name", None) or getattr(each, "rest", None)
                if isinstance(name, str):
                    self._bind(name, UNKNOWN)
                if isinstance(each, ast.expr):
                    self.used(each)
            with self.reader.under(self.reader.conditions, f"case {ast.unparse(case.pattern)}:"):
                if case.guard is None or self.truth(case.guard) is not False:
                    self.block(case.body)
            ends.append(self.env)
        self.env = joined_envs([before, *ends])

    def _try(self, node: ast.Try) -> None:
        watch: list[Env | None] = [dict(self.here)]
        guards = [self.at(each) for each in node.handlers[:1]]
        self._watches.append(watch)
        self.reader.guards += guards
        self.block(node.body)
        del self.reader.guards[len(self.reader.guards) - len(guards) :]
        if self.env is not None:
            self.block(node.orelse)
        ends = [self.env]
        for handler in node.handlers:
            self.env = joined_envs(watch)
            if handler.type is not None:
                self.used(handler.type)
            if handler.name:
                self._bind(handler.name, UNKNOWN)
            with self.reader.under(self.reader.conditions, "except"):
                self.block(handler.body)
            ends.append(self.env)
        self._watches.pop()
        self.env = joined_envs(ends)
        if node.finalbody:
            went_on = self.env is not None
            self.env = joined_envs([self.env, *watch])
            self.block(node.finalbody)
            self.env = self.env if went_on else None

    def _with(self, node: ast.With) -> None:
        watch: list[Env | None] = [dict(self.here)]
        may_catch = False
        for each in node.items:
            value = self.value(each.context_expr)
            self.reader.consume(value, self.at(each.context_expr))
            may_catch |= not self._lets_errors_through(each.context_expr)
            if each.optional_vars is not None:
                self.store(each.optional_vars, UNKNOWN)
        guards = [self.at(node)] if may_catch else []
        self.reader.guards += guards
        self._watches.append(watch)
        self.block(node.body)
        self._watches.pop()
        del self.reader.guards[len(self.reader.guards) - len(guards) :]
        if may_catch:
            self.env = joined_envs([self.env, *watch])

    def _lets_errors_through(self, node: ast.expr) -> bool:
        """Whether a context is one of torch's own, which hand every error on."""
        made = node.func if isinstance(node, ast.Call) else node
        found = constants([self.value(made)])
        module = getattr(found[0], "__module__", None) if found else None
        return isinstance(module, str) and module.partition(".")[0] == "torch"

    def _run_deferred(self, node: ast.AST) -> None:
        """Read a function that was made here as if it were called on anything, any time."""
        outer, self.env = self.env, dict(self._shared)
        returned, root = self.returned, self._is_root
        try:
            with (
                self.reader.under(self.reader.loops, id(node)),
                self.reader.under(self.reader.path, id(node)),
            ):
                if isinstance(node, ast.GeneratorExp):
                    self._generatorexp(node)
                    return
                assert isinstance(node, ast.FunctionDef | ast.Lambda)
                if any(isinstance(each, ast.Nonlocal | ast.Global) for each in ast.walk(node)):
                    raise UnreadableError(f"{self.at(node)} sets variables of what is around it")
                self.here.update(dict.fromkeys(parameters(node), UNKNOWN))
                self._is_root = True
                if isinstance(node, ast.Lambda):
                    self.used(node.body)
                else:
                    self.block(node.body)
        finally:
            self.env, self.returned, self._is_root = outer, returned, root


def _loading(target: ast.expr) -> ast.expr:
    """What is written to, as an expression that is read."""
    if isinstance(target, ast.Name):
        return ast.Name(target.id, ast.Load())
    if isinstance(target, ast.Attribute):
        return ast.Attribute(target.value, target.attr, ast.Load())
    assert isinstance(target, ast.Subscript)
    return ast.Subscript(target.value, target.slice, ast.Load())
