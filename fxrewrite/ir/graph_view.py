"""A graph as the engine sees it: an overlay of a model, with what is written and who shares it."""

from __future__ import annotations

import bisect
import functools
from collections.abc import Container, Iterable, Iterator

from torch import fx, nn

from .aliases import lends, written_by
from .overlay import Overlay


class GraphView(Overlay):
    """A graph of our own to edit, with what is known of its writes in place and its aliases.

    What is written is looked for when it is first asked for, and kept up to date by `note_write`
    and `forget_write` from then on.
    """

    @functools.cached_property
    def _writes(self) -> list[fx.Node]:
        """The nodes that write in place, in order; some of them may be gone."""
        return [node for node in self.graph.nodes if written_by(node, self)]

    @functools.cached_property
    def _live(self) -> set[fx.Node]:
        return set(self._writes)

    @functools.cached_property
    def written_values(self) -> set[fx.Node]:
        """The values that writes in place reach."""
        return {
            origin
            for write in self._writes
            for value in written_by(write, self)
            for origin in self.storage(value)
        }

    @functools.cached_property
    def written_tensors(self) -> set[int]:
        """The identities of the model's tensors that the model may write to."""
        written = {
            id(self.attribute(each)) for each in self.written_values if each.op == "get_attr"
        }
        # What a layer updates in training mode may be read by another one, in eval mode.
        training = (module for module in self._called_modules if module.training)
        written.update(id(each) for module in training for each in module.buffers())
        return written

    @functools.cached_property
    def held_inside(self) -> set[int]:
        """The identities of buffers that a called module has, and one inside a called one as well.

        The code of the module that is called whole may write to them.
        """
        called = self._called_modules
        inner = (child for module in called if module._modules for child in module.children())
        inside = {id(each) for child in inner for each in child.buffers()}
        own = {id(each) for module in called for each in module._buffers.values()}
        return own & inside

    @property
    def _called_modules(self) -> list[nn.Module]:
        modules = dict.fromkeys(self.module(node) for node in self.graph.nodes)
        return [module for module in modules if module is not None]

    def note_write(self, node: fx.Node) -> None:
        """Note a new node, or one that calls something else now."""
        if written_by(node, self):
            self._live.add(node)
            bisect.insort(self._writes, node)

    def forget_write(self, node: fx.Node) -> None:
        """Note that a node is gone."""
        self._live.discard(node)

    def writes_between(self, first: fx.Node, last: fx.Node) -> list[fx.Node]:
        """The writes strictly between two nodes, in graph order."""
        if not self._live:
            return []
        start = bisect.bisect_right(self._writes, first)
        stop = bisect.bisect_left(self._writes, last)
        return [node for node in self._writes[start:stop] if node in self._live]

    def write_between(
        self, first: fx.Node, last: fx.Node, values: Iterable[fx.Node], own: Container[fx.Node] = ()
    ) -> fx.Node | None:
        """A write strictly between two nodes, none of `own`, that may reach one of the values."""
        for write in self.writes_between(first, last):
            if write not in own and any(self.touches(write, each) for each in values):
                return write
        return None

    def storage(self, value: fx.Node) -> set[fx.Node]:
        """The values whose storage this one may share: itself, and what it may be a view of."""
        pending, seen = [value], {value}
        while pending:
            sources = [each for each in lends(pending.pop(), self) if each not in seen]
            pending += sources
            seen.update(sources)
        return seen

    def touches(self, write: fx.Node, value: fx.Node) -> bool:
        """Whether a write may reach the storage of a value."""
        storage = self.storage(value)
        return any(storage & self.storage(each) for each in written_by(write, self))

    def seen_elsewhere(self, value: fx.Node, own: set[fx.Node]) -> fx.Node | None:
        """What shares a value's storage and is given from outside, or read by others than `own`."""
        storage = self.storage(value) - own
        for each in sorted(storage, key=lambda node: node.name):  # a set has no order of its own
            if each.op in ("placeholder", "get_attr") or not (own | storage).issuperset(each.users):
                return each
        return None

    def later_write(self, value: fx.Node, after: fx.Node) -> fx.Node | None:
        """A node after another that writes to this value, or to what may be a view of it."""
        if not self._live:
            return None
        writes = (
            reader
            for node, reader in self._readers(value)
            if after < reader and node in written_by(reader, self)
        )
        return next(writes, None)

    def is_returned(self, value: fx.Node) -> bool:
        """Whether the graph returns this value, or what may be a view of it."""
        return any(reader.op == "output" for _, reader in self._readers(value))

    def _readers(self, value: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
        """Each reader of a value, or of what may be a view of it, with the node that it reads."""
        pending, seen = [value], {value}
        while pending:
            node = pending.pop()
            for reader in node.users:
                yield node, reader
                if reader not in seen and node in lends(reader, self):
                    seen.add(reader)
                    pending.append(reader)
