"""A graph of the calls that a run of a model showed."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeAlias

import attrs
import torch
from torch import fx

from ..engine.bindings import Shown
from ..tracing.passages import Passage, Stack


@attrs.define(eq=False)
class Call:
    """A call of a module, and the call that gave the very tensor which it was given.

    `given` is that tensor's shape and type, None if it was not called on one tensor alone, `gave`
    that of what it gave. `how` is the code by which the tensor got there, `readers` are the
    functions that read what it gave. `handled` is what had been raised before the call.
    """

    module: int
    source: Call | None
    given: Shown | None
    how: tuple[Passage, ...] | None
    stack: Stack
    gave: Shown | None = None
    handled: BaseException | None = attrs.field(factory=lambda: sys.exc_info()[1])
    readers: list[str] = attrs.field(factory=list)


Group: TypeAlias = "tuple[Call, ...]"


class ObservedGraph:
    """A graph of calls of modules, as they were in a run, and of what they read.

    A module is one node, or one for each module that it read, where it is clear which of them each
    further one read. `remarks` say what its inputs, readers and output are, in words.

    Args:
        calls: by the identity of a module, its calls.
        names: the modules' names.
        wanted: the identities of those whose calls the graph has, beside the calls that they read.
    """

    def __init__(
        self, calls: Mapping[int, list[Call]], names: Mapping[int, str], wanted: set[int]
    ) -> None:
        self.graph, self.remarks = fx.Graph(), dict[fx.Node, str]()
        self._calls: dict[str, Group] = {}
        self._names = names
        read = (call.source for key in wanted for call in calls.get(key, ()))
        wanted = wanted | {source.module for source in read if source is not None}
        groups = _groups([call for key in wanted for call in calls.get(key, ())])
        self._group_of = {call: group for group in groups for call in group}
        self._nodes: dict[Group, fx.Node | None] = {}
        for group in groups:
            self._node(group)
        others = [e for each in calls.values() for e in each if e not in self._group_of]
        for group, node in self._nodes.items():
            readers = [name for call in group for name in call.readers]
            readers += ["another module"] * any(each.source in group for each in others)
            for name in dict.fromkeys(readers):
                self.remarks[self.graph.call_function(_reader(name), (node,))] = name
        unread = tuple(node for node in self._nodes.values() if node is not None and not node.users)
        self.remarks[self.graph.output(unread)] = "code that can't be traced"

    def is_decided(self, first: str, second: str) -> bool:
        """A run shows one way of several."""
        return False

    def passages(self, first: str, second: str) -> list[tuple[Passage, ...] | None]:
        """How the value of a node got to another one, in each call of that."""
        return list(dict.fromkeys(call.how for call in self._calls[second]))

    def _node(self, group: Group) -> fx.Node | None:
        """The node of calls, behind that of those which they read; None in a circle of them."""
        if group in self._nodes:
            return self._nodes[group]
        self._nodes[group] = None
        known = self._group_of
        sources = {None if each.source is None else known.get(each.source) for each in group}
        (before,) = sources if len(sources) == 1 else (None,)
        source = None if before is None else self._node(before)
        if source is None:
            source = self.graph.placeholder("untraced")
            self.remarks[source] = "a value of code that can't be traced"
        reads_one = all(call.given is not None for call in group)
        name = self._names[group[0].module]
        node = self._nodes[group] = self.graph.call_module(
            name, (source,) * (1 if reads_one else 2)
        )
        _record(source, {call.given for call in group})
        _record(node, {call.gave for call in group})
        self._calls[node.name] = group
        return node


def _groups(calls: Sequence[Call]) -> list[tuple[Call, ...]]:
    """The calls of each module, apart where they read different modules, if that can be told.

    They are not apart where a further module would read some of several of them.
    """
    together: set[int] = set()
    while True:
        groups: dict[tuple[int, int], list[Call]] = {}
        for call in calls:
            groups.setdefault(_key(call, together), []).append(call)
        unclear: set[int] = set()
        for group in groups.values():
            sources = {_key(call.source, together) for call in group if call.source is not None}
            modules = Counter(module for module, _ in sources)
            unclear |= {module for module, count in modules.items() if count > 1}
        if not unclear:
            return [tuple(group) for group in groups.values()]
        together |= unclear


def _key(call: Call, together: Collection[int]) -> tuple[int, int]:
    is_apart = call.source is not None and call.module not in together
    return call.module, call.source.module if is_apart and call.source is not None else 0


def _record(node: fx.Node, shown: Collection[Shown | None]) -> None:
    """Record of a value the shape that it had each time, if it was the same, for rules to see."""
    (kind,) = shown if len(shown) == 1 else (None,)
    if kind is not None and kind.shape is not None:
        node.meta["val"] = torch.empty(kind.shape, dtype=kind.dtype, device="meta")


def _reader(name: str) -> Callable[..., None]:
    def reader(*args: Any) -> None:
        raise AssertionError("what was observed does not run")

    reader.__name__ = name
    return reader
