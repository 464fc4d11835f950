"""How values get from call to call in a forward, and what may happen to them on the way."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from torch import nn

from ..engine.match import Site
from ..ir.aliases import hands_on
from ..ir.graph_view import GraphView
from ..tracing.passages import Passage
from .guard import Pair, Place, place_of
from .local_proof import flaw
from .sources import line_of


class Calls(Protocol):
    """How values get from one node of a graph to another one that reads it."""

    def is_decided(self, first: str, second: str) -> bool:
        """Whether the forwards in which these two calls stand go one way alone."""

    def passages(self, first: str, second: str) -> Sequence[tuple[Passage, ...] | None]:
        """By which code, for each time that it was seen; None where that is not known."""


class ValuePaths:
    """The calls of a graph as the forward has them, whatever is rewritten meanwhile.

    A path is the names of nodes, each of which reads the one before.

    Args:
        view: the graph.
        calls: how values get from call to call.
        is_certain: whether the modules can't be called otherwise than in the graph.
    """

    def __init__(self, view: GraphView, calls: Calls, is_certain: bool) -> None:
        self._view, self._calls, self._is_certain = view, calls, is_certain
        self._reads = {n.name: [e.name for e in n.all_input_nodes] for n in view.graph.nodes}
        self.modules = {
            node.name: str(node.target)
            for node in view.graph.find_nodes(op="call_module")
            if node.target in view.modules
        }
        self.count = Counter(view.modules[each] for each in self.modules.values())
        self.gone: set[str] = set()

    def of(self, site: Site) -> list[str] | None:
        """The path of a chain's value, through what is gone by now; None if it is not known."""
        path = [site.links[0].node.name]
        for link in site.links[1:]:
            between, name = list[str](), link.node.name
            while True:
                before = [e for e in self._reads[name] if e == path[-1] or e in self.gone]
                if len(before) != 1:
                    return None
                if before[0] == path[-1]:
                    break
                name = before[0]
                between.append(name)
            path += [*reversed(between), link.node.name]
        return path

    def flaw(self, path: Sequence[str], late: bool) -> str | None:
        """Why what a node of a path gives may also go elsewhere, or None.

        Args:
            path: the path.
            late: whether nothing else may be called before a value is taken.
        """
        for first, second in itertools.pairwise(path):
            is_decided = self._is_certain or self._calls.is_decided(first, second)
            reason = None if is_decided else self._flaw([first, second], late=late, strict=False)
            if reason is not None:
                name = self.modules.get(first, first)
                return f"what {name} gives may also go elsewhere: {reason}"
        return None

    def passages(self, path: Sequence[str]) -> list[Passage]:
        """The code by which the value goes, as far as it is known."""
        return [each for way in self._ways(path) for each in way or ()]

    def firsts(self, chain: Sequence[nn.Module]) -> dict[nn.Module, list[nn.Module]]:
        """For each of these that is called several times, those whose values it is called on."""
        several = {each: list[nn.Module]() for each in chain if self.count[each] > 1}
        for node, name in self.modules.items() if several else ():
            module, before = self._view.modules[name], self._reads[node]
            while len(before) == 1 and (before[0] in self.gone or self._is_idle(before[0])):
                before = self._reads[before[0]]
            if module in several and len(before) == 1 and before[0] in self.modules:
                several[module].append(self._view.modules[self.modules[before[0]]])
        return {module: found for module, found in several.items() if found}

    def pairs(
        self,
        path: Sequence[str],
        counts_writes: bool,
        late: bool,
        is_called_once: Callable[[str], bool],
    ) -> Iterator[Pair]:
        """The modules on a path that follow one on the other, idle ones left out."""
        called = [each for each in path if each in self.modules]
        ends = path[0], path[-1]
        called = [each for each in called if each in ends or not self._is_idle(each)]
        for first, second in itertools.pairwise(called):
            part = path[path.index(first) : path.index(second) + 1]
            is_direct = all(map(self._is_idle, part[1:-1]))
            known = self.passages(part) if is_direct else []
            ways = self._calls.passages(part[0], part[1])
            is_decided = not is_direct or self._calls.is_decided(first, second)
            names = self.modules[first], self.modules[second]
            yield Pair(
                *names,
                (line_of(known[0], giving=True), line_of(known[-1])) if known else ("", ""),
                is_direct=is_direct,
                counts_writes=counts_writes and not is_decided and self._flaw(part) is not None,
                is_alone=all(map(is_called_once, names)),
                seen=frozenset(_giving(way) for way in ways if way),
                is_late=late,
            )

    def _ways(self, path: Sequence[str]) -> Iterator[tuple[Passage, ...] | None]:
        for first, second in itertools.pairwise(path):
            yield from self._calls.passages(first, second)

    def _flaw(self, path: Sequence[str], late: bool = False, strict: bool = True) -> str | None:
        for way in self._ways(path):
            if way is None:
                return "it is not known by which code"
            for each in way:
                if (reason := flaw(each, strict=strict, late=late)) is not None:
                    return reason
        return None

    def _is_idle(self, node: str) -> bool:
        return node in self.modules and hands_on(self._view.modules[self.modules[node]])


def _giving(way: Sequence[Passage]) -> Place:
    """Where the call is that gives a value, in the innermost of the functions that return it."""
    returning = [each for each in way if each.end is None]
    each = returning[-1] if returning else way[0]
    assert isinstance(each.begin, int)
    return place_of(each.code, each.begin)
