"""What matching finds: a site with its links, or the miss that came closest; and their names."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import attrs
from torch import fx, nn

from ..ir.describe import Seen, in_one_line, name_of
from ..rules.spec import Pattern, Step


@attrs.frozen(eq=False)
class Link:
    """A node in its role as a step, and the module that it calls, if it calls one.

    The chain enters it by the argument `takes`, whose value is `source`; `side_inputs` are the
    other values of the graph that it reads. A node that joins branches takes several values,
    `sources`, in the order of the branches. `branch` is the dotted prefix of a step in a branch,
    `sibling` the number of a call among its siblings.
    """

    step: Step
    node: fx.Node
    module: nn.Module | None
    takes: str | tuple[str, ...]
    sources: tuple[fx.Node, ...]
    side_inputs: tuple[fx.Node, ...] = ()
    branch: str = ""
    sibling: int | None = None

    @property
    def source(self) -> fx.Node:
        """The value by which the chain enters."""
        return self.sources[0]

    @property
    def name(self) -> str:
        """The step's name, with that of its branch, `left.conv`, or its number, `linears.0`."""
        number = "" if self.sibling is None else f".{self.sibling}"
        return self.branch + self.step.name + number


@attrs.frozen(eq=False)
class Site:
    """Where a pattern matched: its links in data order, those of branches one after the other.

    The links of a group are its siblings, in the order of the graph.
    """

    pattern: Pattern
    links: tuple[Link, ...]

    @property
    def input(self) -> fx.Node:
        """The value that the chain starts from."""
        return self.links[0].source

    @property
    def last(self) -> fx.Node:
        """The node whose value is the chain's output."""
        return self.links[-1].node

    @property
    def first(self) -> fx.Node:
        """The node that runs before all others of the chain."""
        return min(self.nodes) if self.pattern.branches else self.links[0].node

    @functools.cached_property
    def nodes(self) -> tuple[fx.Node, ...]:
        """The chain's nodes, in data order."""
        return tuple([link.node for link in self.links])

    @property
    def steps(self) -> tuple[tuple[str, str], ...]:
        """Each step's name with what it calls, by qualified name where that is a module."""
        return tuple((link.name, name_of(link.node)) for link in self.links)

    def __str__(self) -> str:
        """The chain in one line."""
        return in_one_line(self.steps)


@attrs.frozen(eq=False)
class Miss:
    """An anchor whose chain stopped: the step that was wanted, and what stood there instead.

    `beside` is the last node that did match, None where that is the anchor itself. `by_another`
    are those of `found` that are the wanted step, but read the chain by another argument. Where the
    chain stopped in a branch, `branch` is its dotted prefix. No step means that the branches did
    not come from one value.
    """

    pattern: Pattern
    step: int | None
    upstream: bool
    beside: Seen | None
    found: tuple[Seen, ...]
    by_another: frozenset[Seen]
    depth: int
    branch: str = ""

    def __str__(self) -> str:
        """The reason as a sentence."""
        said = self._said()
        return f"in branch {self.branch.rstrip('.')}, {said}" if self.branch else said

    def _said(self) -> str:
        who = self.beside or "it"
        if self.step is None and len(self.found) < 2:
            return f"{who} does not join {len(self.pattern.branches)} values of the graph"
        if self.step is None:
            return f"{who} joins branches of different values: {' and '.join(map(str, self.found))}"
        wanted = self.pattern.steps[self.step]
        if not self.found and self.upstream:
            return f"{who} reads no value of the graph"
        if not self.found:
            return f"nothing reads {self.beside or 'its output'}, where {_a(wanted)} is wanted"
        verb = "reads" if self.upstream else "feeds"
        found = (
            f"{each} by another argument" if each in self.by_another else str(each)
            for each in self.found
        )
        return f"{who} {verb} {' and '.join(found)}, not {_a(wanted)}"


def _a(step: Step) -> str:
    """A step's alternatives with the article of the first."""
    said = str(step)
    return f"{'an' if said.lstrip('.')[0] in 'AEIOUaeiou' else 'a'} {said}"


@attrs.frozen(eq=False)
class Alone:
    """A call that has no sibling, with those that are none although they read the same value."""

    step: Step
    reads: Seen
    known: Mapping[str, Any]
    others: tuple[tuple[Seen, Mapping[str, Any]], ...]
    depth: int = 0

    def __str__(self) -> str:
        """The reason as a sentence."""
        if not self.others:
            return f"no other {self.step} reads {self.reads}"
        return "; ".join(self._difference(seen, found) for seen, found in self.others)

    def _difference(self, seen: Seen, found: Mapping[str, Any]) -> str:
        apart = (k for k, v in self.known.items() if k not in found or found[k] != v)
        name = next(apart, "what it must have in common")
        there, here = found.get(name), self.known.get(name)
        return f"{seen}, which reads the same value, differs in {name}: {there}, and here {here}"
