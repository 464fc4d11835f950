"""Carry out an action at a site; nothing else edits a graph."""

from __future__ import annotations

import operator
from typing import Any

import attrs
import torch
from torch import fx, nn
from torch.fx.proxy import GraphAppendingTracer

from ..ir.describe import PROVENANCE
from ..ir.graph_view import GraphView
from ..module_utils.torch_private import is_erased, pytree
from ..rules.actions import Action, Bypass, Replace, Revise, Split
from ..rules.values import Call, Value
from .match import Link, Site


@attrs.frozen(eq=False)
class NewCall:
    """The call of a new module to be: its node, what it reads, and the link whose name it takes."""

    module: nn.Module
    node: fx.Node
    reads: tuple[fx.Node, ...]
    slot: Link | None


@attrs.frozen(eq=False)
class Made:
    """What an action puts in a chain's place: its nodes, where they stand, and the new output.

    `reads` are the values that it reads, or hands on, the chain's input first; `calls` are the
    calls of new modules; `kept` are those of the chain's nodes that stay, each with the value that
    it reads from now on. `now` has for each link what stands there from now on; it is empty where
    there are branches or siblings. Of siblings, `parts` are the new values in their order.
    """

    nodes: tuple[fx.Node, ...]
    place: fx.Node
    result: fx.Node
    reads: tuple[fx.Node, ...]
    calls: tuple[NewCall, ...] = ()
    kept: tuple[tuple[Link, fx.Node], ...] = ()
    now: tuple[fx.Node, ...] = ()
    revises: bool = False
    parts: tuple[fx.Node, ...] = ()


def prepare(view: GraphView, site: Site, action: Action, slot: Link | None) -> Made:
    """Make what the action asks for beside the chain, which is still as it was.

    A new module's call takes over the node of its slot when it is carried out, so nothing is made
    for it here where there is a slot.

    Raises:
        TypeError: a Call's function returns something other than one value of the graph, or the
            action reads what is no value beside the chain.
    """
    first = site.first
    if isinstance(action, Bypass):
        return Made((), first, site.input, (site.input,), now=_now(site, site.input))
    if isinstance(action, Replace):
        reads = (site.input, *(_node_of(view, site, value) for value in action.inputs))
        place = site.last if action.inputs else first
        node = _module_node(view, place) if slot is None else slot.node
        nodes = (node,) if slot is None else ()
        call = NewCall(action.module, node, reads, slot)
        return Made(nodes, place, node, reads, (call,), now=_now(site, node, slot))
    if isinstance(action, Revise):
        return _revised(view, site, action)
    if isinstance(action, Split):
        return _split(view, site, action)
    if action.node is not None:
        return _made_again(view, site, action.node)
    place = site.last if _Speller.reads_values(action) else first
    before = place.prev
    tracer = _Speller(view, site)
    with view.graph.inserting_before(place):
        args = tracer.lift((site.input, *action.args))
        result = action.function(*args, **tracer.lift(action.kwargs))
    spelt = []
    while before.next is not place:
        before = before.next
        spelt.append(before)
        view.count(before, +1)
    if not isinstance(result, fx.Proxy):
        raise TypeError(f"the function of its Call returned a {type(result).__name__}, not a value")
    return _made(site, spelt, place, result.node)


def _module_node(view: GraphView, place: fx.Node) -> fx.Node:
    with view.graph.inserting_before(place):
        return view.graph.create_node("call_module", "")


def _revised(view: GraphView, site: Site, action: Revise) -> Made:
    if site.pattern.branches:
        raise TypeError("Revise changes steps of a chain, and this one has branches")
    nodes, calls, kept, now = [], [], [], []
    value = site.input
    for link in site.links:
        module = action.steps.get(link.step.name)
        if link.step.name not in action.steps:
            kept.append((link, value))
            value = link.node
        elif module is not None:
            slot = link if link.node.op == "call_module" else None
            node = link.node if slot is not None else _module_node(view, link.node)
            nodes += [] if slot is not None else [node]
            calls.append(NewCall(module, node, (value,), slot))
            value = node
        now.append(value)
    reading = [call.node for call in calls] + [link.node for link, _ in kept]
    first = min(reading, default=site.links[0].node)
    reads = (site.input,)
    return Made(
        tuple(nodes), first, value, reads, tuple(calls), tuple(kept), tuple(now), revises=True
    )


def _split(view: GraphView, site: Site, action: Split) -> Made:
    """The first sibling's node will call the new module; after it the parts are taken out."""
    first = site.links[0]
    with view.graph.inserting_after(first.node):
        dim = site.pattern.steps[0].dim
        split = view.graph.call_function(
            torch.split_with_sizes, (first.node, list(action.sizes), dim)
        )
    parts: list[fx.Node] = []
    for i in range(len(site.links)):
        with view.graph.inserting_after(parts[-1] if parts else split):
            parts.append(view.graph.call_function(operator.getitem, (split, i)))
    reads = (site.input,)
    call = NewCall(action.module, first.node, reads, first)
    nodes = (split, *parts)
    return Made(nodes, first.node, first.node, reads, (call,), parts=tuple(parts))


def _made(site: Site, nodes: list[fx.Node], place: fx.Node, result: fx.Node) -> Made:
    read = dict.fromkeys((site.input, *(each for node in nodes for each in node.all_input_nodes)))
    outside = [each for each in (*read, result) if each not in nodes and each.op != "get_attr"]
    read = dict.fromkeys(outside)
    return Made(tuple(nodes), place, result, tuple(read), now=_now(site, result))


def _now(site: Site, result: fx.Node, slot: Link | None = None) -> tuple[fx.Node, ...]:
    """At each link, the result, but before the slot what the chain starts from."""
    if site.pattern.branches:
        return ()
    before = 0 if slot is None else site.links.index(slot)
    return (site.input,) * before + (result,) * (len(site.links) - before)


def discard(view: GraphView, made: Made) -> None:
    """Take back what was prepared."""
    for node in reversed(made.nodes):
        _erase(view, node)


def call_module(view: GraphView, made: Made, call: NewCall, target: str) -> None:
    """Let a prepared node call its new module under this name."""
    node = call.node
    if call.slot is not None:
        view.count(node, -1)
        # What replaces the whole chain stands in one place; a revised step stays where it is.
        if node is made.result and node is not made.place and not made.revises:
            made.place.prepend(node)
    # What FX keeps up to date on assignment is not cheap, and most sites need none of it.
    if node.target != target:
        node.target = target
    if node.args != call.reads:
        node.args = call.reads
    if node.kwargs:
        node.kwargs = {}
    view.place(target, call.module)
    view.count(node, +1)


def hand_over(view: GraphView, site: Site, made: Made) -> list[fx.Node]:
    """Move the readers of the chain to what was made, and erase what is left of the chain.

    Gives the nodes that stand there now, in order.
    """
    if made.parts:
        return _hand_over_parts(view, site, made)
    last, result = site.last, made.result
    if result is not site.input:
        for node in made.nodes:
            node.meta = _provenance(last)
        if all(result is not link.node for link, _ in made.kept):
            result.meta = last.meta
    for link, value in made.kept:
        if value is not link.source:
            link.node.replace_input_with(link.source, value)
    if result is not last:
        last.replace_all_uses_with(result)
    for node, now in zip(site.nodes[:-1], made.now, strict=False):
        if now is not node:
            for reader in [each for each in node.users if each not in site.nodes]:
                reader.replace_input_with(node, now)  # it asks for the shape alone
    stay = {result, *(call.node for call in made.calls), *(link.node for link, _ in made.kept)}
    for node in reversed(site.nodes):
        if node not in stay:
            read = [each for each in node.all_input_nodes if view.is_constant(each)]
            _erase(view, node)
            _erase_unread(view, read)
    ours = [*made.nodes, *(node for node in site.nodes if node in stay)]
    return sorted(ours) if made.revises else ours


def _hand_over_parts(view: GraphView, site: Site, made: Made) -> list[fx.Node]:
    """Move the readers of each sibling to its part, and erase the siblings but the first."""
    split = made.nodes[0]
    for link, part in zip(site.links, made.parts, strict=True):
        part.meta = dict(link.node.meta)
        link.node.replace_all_uses_with(part, delete_user_cb=lambda user: user is not split)
    for link in site.links[1:]:
        _erase(view, link.node)
    # What was known of the first sibling's value is not true of the whole.
    made.result.meta = _provenance(made.result)
    split.meta = _provenance(made.result)
    return [made.result, *made.nodes]


def _erase_unread(view: GraphView, constants: list[fx.Node]) -> None:
    """What only the replaced chain read goes with it."""
    while constants:
        node = constants.pop()
        if not node.users and not is_erased(node):
            constants += node.all_input_nodes
            _erase(view, node)


def _made_again(view: GraphView, site: Site, node: fx.Node) -> Made:
    """The same call once more, reading the chain's input where it read the chain."""
    sources = next(link.sources for link in site.links if link.node is node)
    if len(sources) > 1:
        raise TypeError(f"{node.name} joins branches, so it can't be made again without them")

    def moved(each: fx.Node) -> fx.Node:
        return site.input if each is sources[0] else each

    with view.graph.inserting_before(node):
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), moved)
        again = view.graph.create_node(node.op, node.target, args, kwargs)
    view.count(again, +1)
    return _made(site, [again], node, again)


def _erase(view: GraphView, node: fx.Node) -> None:
    view.count(node, -1)
    view.graph.erase_node(node)


def _provenance(node: fx.Node) -> dict[str, Any]:
    """Where a node came from, without what is known of its value."""
    return {k: v for k, v in node.meta.items() if k in PROVENANCE}


def _node_of(view: GraphView, site: Site, value: Value) -> fx.Node:
    known = value.node if isinstance(value, Value) else None
    if known is None or known.graph is not view.graph or is_erased(known):
        raise TypeError(f"expected a Value that this match captured, found {value!r}")
    if known in site.nodes:
        raise TypeError(f"{value!r} goes with the chain, so its replacement can't read it")
    return known


class _Speller(GraphAppendingTracer):
    """Traces a function into the graph at hand; tensors become attributes of the model."""

    def __init__(self, view: GraphView, site: Site) -> None:
        super().__init__(view.graph)
        self._view = view
        self._site = site
        self._base = f"{site.last.name}_constant"

    @staticmethod
    def reads_values(action: Call) -> bool:
        leaves = pytree.tree_leaves((action.args, action.kwargs))
        return any(isinstance(leaf, Value) for leaf in leaves)

    def lift(self, argument: Any) -> Any:
        """The argument with nodes, values and tensors in it made proxies."""
        return pytree.tree_map(self._lift_leaf, argument)

    def _lift_leaf(self, leaf: Any) -> Any:
        if isinstance(leaf, Value):
            leaf = _node_of(self._view, self._site, leaf)
        if isinstance(leaf, torch.Tensor):
            leaf = self._constant(leaf)
        return self.proxy(leaf) if isinstance(leaf, fx.Node) else leaf

    def create_arg(self, a: Any) -> Any:
        """Lower an argument; a tensor that the function closes over becomes an attribute too."""
        return self._constant(a) if isinstance(a, torch.Tensor) else super().create_arg(a)

    def _constant(self, tensor: torch.Tensor) -> fx.Node:
        target = self._view.free_name(self._base)
        self._view.place(target, tensor)
        return self.graph.create_node("get_attr", target)
