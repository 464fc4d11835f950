"""Find a pattern around an anchor node, or say at which step the chain stopped."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from torch import fx

from ..ir.arguments import is_default
from ..ir.describe import Seen
from ..ir.graph_view import GraphView
from ..ir.op_traits import traits_of
from ..rules.spec import Branch, Pattern, Step
from .match import Link, Miss, Site

FOUND_AT_MOST = 3
_FAR = 1000


class Matcher:
    """Matches one pattern at one anchor; steps before it are sought upstream, the others down.

    The anchor may stand for another step than the pattern's own: the one `at` that index. A branch
    is matched from `behind`: from the node that joins it, by the argument that it comes in by.
    """

    def __init__(
        self,
        pattern: Pattern,
        view: GraphView,
        anchor: fx.Node,
        at: int | None = None,
        branch: str = "",
        behind: tuple[fx.Node, tuple[str, fx.Node]] | None = None,
    ) -> None:
        self.pattern, self.view, self.anchor = pattern, view, anchor
        self.at = pattern.anchor if at is None else at
        self.branch, self.behind = branch, behind
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
        if i < 0 and self.pattern.branches:
            return self._joined(step, node)
        inputs = self._inputs(step, node)
        if i < 0:
            return [self._link(step, node, inputs[0])] if inputs else None
        wanted = self.pattern.steps[i]
        for entry in inputs:
            if self._may_be(wanted, entry[1]):
                links = self._upstream(i - 1, wanted, entry[1])
                if links is not None:
                    links.append(self._link(step, node, entry))
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
            entry = next((each for each in inputs if self._may_be(wanted, each[1])), None)
            if entry is None:
                break
            run.append(self._link(step, node, entry))
            step, node = wanted, run[-1].source
        while (links := self._upstream(i - 1, step, node)) is None and run:
            last = run.pop()
            step, node = last.step, last.node
        return None if links is None else [*links, *reversed(run)]

    def _may_be(self, wanted: Step, producer: fx.Node) -> bool:
        """Whether a node upstream can be the wanted step."""
        # Branches part at a value with several readers, so what may be absent ends there.
        if self.branch and wanted.optional and len(producer.users) > 1:
            return False
        return accepts(wanted, producer, self.view)

    def _joined(self, step: Step, node: fx.Node) -> list[Link] | None:
        """The links of the branches that this node joins, and its own."""
        branches = self.pattern.branches
        for entries in _orders(self.view, step, node, len(branches)):
            found = [self._branch(*each, node) for each in zip(branches, entries, strict=True)]
            chains = [each for each in found if each is not None]
            if len(chains) == len(branches):
                starts = dict.fromkeys(start for start, _ in chains)
                if len(starts) == 1:
                    links = [link for _, chain in chains for link in chain]
                    return [*links, self._link(step, node, *entries)]
                self._note(None, node, starts, upstream=True)
        if self.miss is None:
            self._note(None, node, (), upstream=True)
        return None

    def _branch(
        self, branch: Branch, entry: tuple[str, fx.Node], join: fx.Node
    ) -> tuple[fx.Node, list[Link]] | None:
        """The value that a branch starts from and its links, none where the branch is absent."""
        if branch.optional and len(entry[1].users) > 1:
            return entry[1], []
        path = f"{self.branch}{branch.name}."
        last = len(branch.pattern.steps)
        inner = Matcher(branch.pattern, self.view, self.anchor, last, path, (join, entry))
        links = inner._upstream(last - 1, Step("", captures_call=True), join)
        if links is not None:
            return links[0].source, links[:-1]
        if inner.miss is not None and (self.miss is None or inner.miss.depth > self.miss.depth):
            self.miss = inner.miss
        return None

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
                entry = next((each for each in inputs if each[1] is node), None)
                if entry is not None:
                    links.append(self._link(wanted, reader, entry))
        return links

    def _inputs(self, step: Step, node: fx.Node) -> list[tuple[str, fx.Node]]:
        """The arguments by which a chain may enter this node."""
        if self.behind is not None and node is self.behind[0]:
            return [self.behind[1]]
        inputs = list(self.view.inputs(node).items())
        if not step.captures_call:
            return inputs[:1]
        if step.chain is not None:
            return [entry for entry in inputs if entry[0] == step.chain]
        # A chain starts from a value rather than from a constant.
        return sorted(inputs, key=lambda entry: self.view.is_constant(entry[1]))

    def _link(self, step: Step, node: fx.Node, *entries: tuple[str, fx.Node]) -> Link:
        names, sources = zip(*entries, strict=True)
        takes = names if len(names) > 1 else names[0]
        module = self.view.module(node)
        if len(node.args) + len(node.kwargs) == 1:
            return Link(step, node, module, takes, sources, branch=self.branch)
        read: list[fx.Node] = []
        fx.node.map_arg((node.args, node.kwargs), read.append)
        for source in sources:
            read.remove(source)
        side = tuple(each for each in read if not self.view.is_constant(each))
        return Link(step, node, module, takes, sources, side, self.branch)

    def _note(
        self, step: int | None, node: fx.Node, found: Iterable[fx.Node], *, upstream: bool
    ) -> None:
        depth = abs((step or 0) - self.at)
        if self.behind is not None:  # a branch leads further than any step beside it
            depth += _FAR * self.branch.count(".")
        if step is None and found:  # nothing leads further than where all branches were there
            depth += _FAR * _FAR
        if self.miss is None or depth > self.miss.depth:
            beside = None if node is self.anchor else Seen.of(node, self.view)
            nearest = list(itertools.islice(found, FOUND_AT_MOST))
            by_another: Iterable[fx.Node] = ()
            if step is not None and not upstream:
                wanted = self.pattern.steps[step]
                by_another = (n for n in nearest if accepts(wanted, n, self.view))
            self.miss = Miss(
                self.pattern,
                step,
                upstream,
                beside,
                tuple([Seen.of(each, self.view) for each in nearest]),
                frozenset(Seen.of(each, self.view) for each in by_another),
                depth,
                self.branch,
            )


def _orders(
    view: GraphView, step: Step, node: fx.Node, count: int
) -> Iterable[tuple[tuple[str, fx.Node], ...]]:
    """The ways in which that many branches may come into a node, each by an argument."""
    inputs = view.inputs(node)
    if isinstance(step.chain, tuple):
        given = tuple((name, inputs[name]) for name in step.chain if name in inputs)
        return [given] if len(given) == count else []
    entries = [entry for entry in inputs.items() if not view.is_constant(entry[1])]
    # With a further argument, such as torch.add's alpha, the sides may differ.
    further = {k: v for k, v in view.arguments(node).items() if k not in inputs}
    is_plain = all(is_default(view.callee(node), k, v) for k, v in further.items())
    is_symmetric = is_plain and traits_of(node, view.module(node)).commutative
    return (itertools.permutations if is_symmetric else itertools.combinations)(entries, count)


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
