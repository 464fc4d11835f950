"""Find a pattern around an anchor node, or say at which step the chain stopped."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import attrs
import torch
from torch import fx, nn

from .declare import Call, Pattern, Step, Value
from .parametrized import without_parametrizations
from .view import GraphView

_FOUND_AT_MOST = 3


@attrs.frozen(eq=False)
class Link:
    """A node in its role as a step, and the module that it calls, if it calls one.

    The chain enters it by the argument `takes`, whose value is `source`; `side_inputs` are the
    other values of the graph that it reads.
    """

    step: Step
    node: fx.Node
    module: nn.Module | None
    takes: str
    source: fx.Node
    side_inputs: tuple[fx.Node, ...] = ()


@attrs.frozen(eq=False)
class Site:
    """Where a pattern matched: its links in data order."""

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
    def nodes(self) -> list[fx.Node]:
        """The chain's nodes, in data order."""
        return [link.node for link in self.links]

    @property
    def steps(self) -> tuple[tuple[str, str], ...]:
        """Each step's name with what it calls, by qualified name where that is a module."""
        return tuple((link.step.name, name_of(link.node)) for link in self.links)

    def __str__(self) -> str:
        """The chain in one line."""
        return " -> ".join(name for _, name in self.steps)


@attrs.frozen
class Seen:
    """What a node was when it was looked at; it is put into words only when asked for."""

    op: str
    name: str
    target: Any
    kind: type[Any] | None

    @classmethod
    def of(cls, node: fx.Node, view: GraphView) -> Seen:
        """What a node is now."""
        module = view.module(node)
        return cls(node.op, node.name, node.target, None if module is None else type(module))

    def __str__(self) -> str:
        """By its module's qualified name, its function or its method."""
        if self.kind is not None:
            return f"{self.target} ({self.kind.__name__})"
        if self.op == "call_function":
            return f"{self.name} ({getattr(self.target, '__name__', self.target)}())"
        if self.op == "call_method":
            return f"{self.name} (.{self.target}())"
        if self.op == "placeholder":
            return f"the model's input {self.target!r}"
        if self.op == "get_attr":
            return f"the model's attribute {self.target}"
        return "the model's output"


@attrs.frozen(eq=False)
class Miss:
    """An anchor whose chain stopped: the step that was wanted, and what stood there instead.

    `beside` is the last node that did match, None where that is the anchor itself. `by_another`
    are those of `found` that are the wanted step, but read the chain by another argument.
    """

    pattern: Pattern
    step: int
    upstream: bool
    beside: Seen | None
    found: tuple[Seen, ...]
    by_another: frozenset[Seen]
    depth: int

    def __str__(self) -> str:
        """The reason as a sentence."""
        wanted = self.pattern.steps[self.step]
        who = self.beside or "it"
        if not self.found and self.upstream:
            return f"{who} reads no value of the graph"
        if not self.found:
            return f"nothing reads {self.beside or 'its output'}, where a {wanted} is wanted"
        verb = "reads" if self.upstream else "feeds"
        found = (
            f"{each} by another argument" if each in self.by_another else str(each)
            for each in self.found
        )
        return f"{who} {verb} {' and '.join(found)}, not a {wanted}"


class Matcher:
    """Matches one pattern at one anchor; steps before it are sought upstream, the others down.

    The anchor may be made to stand for another step than the pattern's own by `at`.
    """

    def __init__(
        self, pattern: Pattern, view: GraphView, anchor: fx.Node, at: int | None = None
    ) -> None:
        self.pattern = pattern
        self.view = view
        self.anchor = anchor
        self.at = pattern.anchor if at is None else at
        self.miss: Miss | None = None

    def match(self) -> Site | Miss:
        """The site at the anchor, or the miss that came closest."""
        at, anchor = self.at, self.anchor
        before = self._upstream(at - 1, self.pattern.steps[at], anchor)
        if before is not None:
            after = self._downstream(at + 1, anchor)
            if after is not None:
                return Site(self.pattern, (*before, *after))
        if self.miss is None:
            self._note(max(at - 1, 0), anchor, [], upstream=True)
        assert self.miss is not None
        return self.miss

    def _upstream(self, i: int, step: Step, node: fx.Node) -> list[Link] | None:
        """The links of steps `..i` that feed this node, and its own."""
        if i >= 0 and self.pattern.steps[i].repeats:
            return self._repeated(i, step, node)
        inputs = self._inputs(step, node)
        if i < 0:
            return [self._link(step, node, inputs, 0)] if inputs else None
        wanted = self.pattern.steps[i]
        for at, (_, producer) in enumerate(inputs):
            if accepts(wanted, producer, self.view):
                links = self._upstream(i - 1, wanted, producer)
                if links is not None:
                    links.append(self._link(step, node, inputs, at))
                    return links
        if wanted.optional:
            return self._upstream(i - 1, step, node)
        self._note(i, node, [each for _, each in inputs], upstream=True)
        return None

    def _repeated(self, i: int, step: Step, node: fx.Node) -> list[Link] | None:
        """As `_upstream`, where step `i` may come any number of times: the most that fit."""
        wanted = self.pattern.steps[i]
        run: list[Link] = []
        while True:
            inputs = self._inputs(step, node)
            fits = (at for at, (_, each) in enumerate(inputs) if accepts(wanted, each, self.view))
            at = next(fits, None)
            if at is None:
                break
            run.append(self._link(step, node, inputs, at))
            step, node = wanted, run[-1].source
        while (links := self._upstream(i - 1, step, node)) is None and run:
            last = run.pop()
            step, node = last.step, last.node
        return None if links is None else [*links, *reversed(run)]

    def _downstream(self, i: int, node: fx.Node) -> list[Link] | None:
        """The links of steps `i..` that follow this node."""
        if i == len(self.pattern.steps):
            return []
        wanted = self.pattern.steps[i]
        if wanted.repeats:
            return self._repeated_downstream(i, node)
        # A step that may be absent is not worth a second reader, which would refuse the chain.
        if not wanted.optional or len(node.users) == 1:
            for link in self._readers(wanted, node):
                links = self._downstream(i + 1, link.node)
                if links is not None:
                    return [link, *links]
        if wanted.optional:
            return self._downstream(i + 1, node)
        self._note(i, node, node.users, upstream=False)
        return None

    def _repeated_downstream(self, i: int, node: fx.Node) -> list[Link] | None:
        run: list[Link] = []
        at = node
        while len(at.users) == 1 and (following := self._readers(self.pattern.steps[i], at)):
            run.append(following[0])
            at = following[0].node
        while (links := self._downstream(i + 1, at)) is None and run:
            at = run.pop().source
        return None if links is None else [*run, *links]

    def _readers(self, wanted: Step, node: fx.Node) -> list[Link]:
        """The links of those readers of a node that are the wanted step, by the right argument."""
        links = []
        for reader in node.users:
            if accepts(wanted, reader, self.view):
                inputs = self._inputs(wanted, reader)
                at = next((at for at, (_, value) in enumerate(inputs) if value is node), None)
                if at is not None:
                    links.append(self._link(wanted, reader, inputs, at))
        return links

    def _inputs(self, step: Step, node: fx.Node) -> list[tuple[str, fx.Node]]:
        """The arguments by which a chain may enter this node."""
        inputs = list(self.view.inputs(node).items())
        if not step.captures_call:
            return inputs[:1]
        if step.chain is not None:
            return [entry for entry in inputs if entry[0] == step.chain]
        # A chain starts from a value rather than from a constant.
        return sorted(inputs, key=lambda entry: self.view.is_constant(entry[1]))

    def _link(self, step: Step, node: fx.Node, inputs: list[tuple[str, fx.Node]], at: int) -> Link:
        takes, source = inputs[at]
        module = self.view.module(node)
        if len(node.args) + len(node.kwargs) == 1:
            return Link(step, node, module, takes, source)
        read: list[fx.Node] = []
        fx.node.map_arg((node.args, node.kwargs), read.append)
        read.remove(source)
        side = tuple(each for each in read if not self.view.is_constant(each))
        return Link(step, node, module, takes, source, side)

    def _note(self, step: int, node: fx.Node, found: Iterable[fx.Node], *, upstream: bool) -> None:
        depth = abs(step - self.at)
        if self.miss is None or depth > self.miss.depth:
            beside = None if node is self.anchor else Seen.of(node, self.view)
            nearest = list(itertools.islice(found, _FOUND_AT_MOST))
            wanted = self.pattern.steps[step]
            by_another = () if upstream else (n for n in nearest if accepts(wanted, n, self.view))
            self.miss = Miss(
                self.pattern,
                step,
                upstream,
                beside,
                tuple([Seen.of(each, self.view) for each in nearest]),
                frozenset(Seen.of(each, self.view) for each in by_another),
                depth,
            )


def name_of(node: fx.Node) -> str:
    """What reports call a node: the qualified name of the module it calls, or else its own."""
    return str(node.target) if node.op == "call_module" else node.name


def accepts(step: Step, node: fx.Node, view: GraphView) -> bool:
    """Whether a node calls what a step names, and reads nothing that the step does not allow."""
    return calls(step, node, view) and (step.side_inputs or reads_one_value(node, view))


def reads_one_value(node: fx.Node, view: GraphView) -> bool:
    """Whether all but one of a node's inputs are constants of the model."""
    return sum(not view.is_constant(each) for each in node.all_input_nodes) == 1


def calls(step: Step, node: fx.Node, view: GraphView) -> bool:
    """Whether a node calls one of a step's module types, functions or methods."""
    if node.op == "call_module":
        return isinstance(view.module(node), step.modules) if step.modules else False
    if node.op == "call_function":
        return node.target in step.functions
    return node.op == "call_method" and node.target in step.methods


def describe(node: fx.Node, view: GraphView) -> str:
    """A node as a message names it: by its module's qualified name, its function or its method."""
    return str(Seen.of(node, view))


def capture(site: Site, view: GraphView) -> Any:
    """The match that a rule is given: an instance of the pattern's class."""
    fields: dict[str, Any] = {}
    for link in site.links:
        value = _captured(link, view)
        if link.step.repeats:
            value = (*fields.get(link.step.name, ()), value)
        fields[link.step.name] = value
    for name, index in site.pattern.values:
        following = {step.name for step in site.pattern.steps[index:]}
        reads = (link.source for link in site.links if link.step.name in following)
        fields[name] = value_of(next(reads, site.last))
    return site.pattern.cls(**fields)


def _captured(link: Link, view: GraphView) -> Any:
    plain = None if link.module is None else without_parametrizations(link.module)
    if not link.step.captures_call:
        return plain
    kwargs = {
        name: fx.node.map_arg(value, lambda node: _resolved(node, view))
        for name, value in view.arguments(link.node).items()
        if name != link.takes
    }
    function = link.node.target if plain is None else plain
    return Call.captured(function, kwargs, link.takes, link.node)


def _resolved(node: fx.Node, view: GraphView) -> Any:
    if view.is_constant(node):
        value = view.constant(node)
        if isinstance(value, torch.Tensor | nn.Module):
            return value
    return value_of(node)


def value_of(node: fx.Node) -> Value:
    """A node's value as a rule sees it."""
    known = node.meta.get("val")
    if not isinstance(known, torch.Tensor):
        return Value(node.name, node=node)
    # A size that only data decides is a symbol, and no guard can go by it.
    is_known = all(isinstance(size, int) for size in known.shape)
    shape = tuple(known.shape) if is_known else None
    return Value(node.name, shape, known.dtype, len(known.shape), node)
