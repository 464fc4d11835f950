"""Read a loop or a comprehension: turn by turn, or until nothing new comes of it."""

from __future__ import annotations

import ast
import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from ..reading import objects
from .builtin import MOST_TURNS
from .expressions import Expressions
from .reader import Reader, UnreadableError
from .sources import Source
from .values import UNKNOWN, Env, Value, joined, joined_envs

# How often the body of a loop is read at most until nothing new comes of it.
_MOST_ROUNDS = 40


class Loops(Expressions):
    """Reads the loops of one function."""

    def __init__(self, reader: Reader, source: Source, names: Callable[[str], Any]) -> None:
        super().__init__(reader, source, names)
        # The variables where `break` and `continue` left the loop at hand, or a turn of it.
        self._exits: list[Env | None] = []
        self._turns: list[Env | None] = []
        # The variables at the end of the last loop that was read, and where it was broken off.
        self._left: Env | None = None
        self._broken: tuple[Env | None, ...] = ()

    def block(self, statements: list[ast.stmt]) -> None:
        """Read statements one after the other, as far as any way leads."""
        raise NotImplementedError

    def _break(self, node: ast.Break) -> None:
        self._exits.append(self.env)
        self.env = None

    def _continue(self, node: ast.Continue) -> None:
        self._turns.append(self.env)
        self.env = None

    def _for(self, node: ast.For) -> None:
        self.repeat(node, node.iter, node.target, lambda: self.block(node.body))
        if self._left is not None and node.orelse:
            self.env = self._left
            self.block(node.orelse)
            self._left = self.env
        self.env = joined_envs([self._left, *self._broken])

    def repeat(
        self, node: ast.AST, iterable: ast.expr, target: ast.expr, body: Callable[[], None]
    ) -> None:
        """Read a loop: turn by turn where its length is known, else until nothing new comes."""
        found = objects.iterate(self.value(iterable), self, iterable)
        if isinstance(found, list) and len(found) > MOST_TURNS:
            found = joined(*found)
        with self._loop():
            if isinstance(found, list):
                for i, each in enumerate(found):
                    if self.env is None:
                        break
                    with self.reader.under(self.reader.path, (id(node), i)):
                        self.store(target, each)
                        body()
                    self.env = joined_envs([self.env, *self._turns])
                    self._turns = []
            else:

                def turn() -> None:
                    self.store(target, found)
                    body()

                self._until_settled(node, turn)
            left, broken = self.env, tuple(self._exits)
        self._left, self._broken = left, broken
        if isinstance(node, ast.comprehension):
            self.env = joined_envs([left, *broken])

    def _while(self, node: ast.While) -> None:
        ends: list[Env | None] = []

        def turn() -> None:
            test = self.truth(node.test)
            if test is not True:
                ends.append(dict(self.here))
            if test is False:
                self.env = None
            else:
                self.block(node.body)

        with self._loop():
            self._until_settled(node, turn)
            broken = tuple(self._exits)
        self.env = joined_envs(ends)
        if self.env is not None:
            self.block(node.orelse)
        self.env = joined_envs([self.env, *broken])

    def _until_settled(self, node: ast.AST, turn: Callable[[], None]) -> None:
        condition = self.at(node).partition("`")[2].partition("`")[0]
        with (
            self.reader.under(self.reader.loops, id(node)),
            self.reader.under(self.reader.conditions, condition),
        ):
            for _ in range(_MOST_ROUNDS):
                before = dict(self.here)
                turn()
                self.env = joined_envs([before, self.env, *self._turns])
                self._turns = []
                if self.env == before:
                    return
        raise UnreadableError(f"{self.at(node)} does not settle")

    @contextlib.contextmanager
    def _loop(self) -> Iterator[None]:
        """Keep apart what `break` and `continue` belong to."""
        before = self._exits, self._turns
        self._exits, self._turns = [], []
        yield
        self._exits, self._turns = before

    def _generatorexp(self, node: ast.GeneratorExp) -> Value:
        self.deferred[id(node)] = node
        return self._comprehension(node, [node.elt])

    def _listcomp(self, node: ast.ListComp) -> Value:
        return self._comprehension(node, [node.elt])

    def _setcomp(self, node: ast.SetComp) -> Value:
        return self._comprehension(node, [node.elt])

    def _dictcomp(self, node: ast.DictComp) -> Value:
        return self._comprehension(node, [node.key, node.value])

    def _comprehension(self, node: Any, elements: list[ast.expr]) -> Value:
        outer = dict(self.here)
        self._generate(node.generators, elements)
        self.env = outer
        return UNKNOWN

    def _generate(self, generators: list[ast.comprehension], elements: list[ast.expr]) -> None:
        if not generators:
            for element in elements:
                self.used(element)
            return
        first, *rest = generators

        def body() -> None:
            depth = len(self.reader.conditions)
            for test in first.ifs:
                holds = self.truth(test)
                if holds is False:
                    break
                if holds is None:
                    self.reader.conditions.append(ast.unparse(test))
            else:
                self._generate(rest, elements)
            del self.reader.conditions[depth:]

        self.repeat(first, first.iter, first.target, body)
