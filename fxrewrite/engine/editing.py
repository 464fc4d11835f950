"""Carry out an action at a site; nothing else edits a graph."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import attrs
from torch import fx, nn

from ..ir.describe import PROVENANCE
from ..ir.graph_view import GraphView
from ..ir.spelling import spell, split
from ..module_utils.torch_private import is_erased, pytree
from ..rules.actions import Action, Bypass, Call, Replace, Revise, Split
from ..rules.values import Value
from .match import Link, Site


@attrs.frozen(eq=False)
class NewCall:
    """The call of a new module to be: its node, what it reads, and the link whose name it takes."""

    module: nn.Module
    node: fx.Node
    reads: tuple[fx.Node, ...]
    slot: Link | None


@attrs.frozen(eq=False)
class Kept:
    """A step that stays, and the value that it reads from now on."""

    link: Link
    reads: fx.Node

    @property
    def node(self) -> fx.Node:
        """Its node."""
        return self.link.node


@attrs.frozen(eq=False)
class Edit:
    """What an action puts in a chain's place: its nodes, where they stand, and the new output.

    `reads` are the values that it reads, or hands on, the chain's input first. `steps` are the
    calls of new modules and the steps that stay, in order; there are none where the new `nodes`
    say it all. `now` has for each link what stands there from now on; it is empty where there are
    branches or siblings. Of siblings, `parts` are the new values in their order. What replaces a
    chain stands in one `place`; where it `revises` one, each step stays where it is.
    """

    nodes: tuple[fx.Node, ...]
    place: fx.Node
    result: fx.Node
    reads: tuple[fx.Node, ...]
    steps: tuple[NewCall | Kept, ...] = ()
    now: tuple[fx.Node, ...] = ()
    revises: bool = False
    parts: tuple[fx.Node, ...] = ()

    @functools.cached_property
    def calls(self) -> tuple[NewCall, ...]:
        """The calls of new modules."""
        return tuple(each for each in self.steps if isinstance(each, NewCall))

    @functools.cached_property
    def kept(self) -> tuple[Kept, ...]:
        """The steps that stay."""
        return tuple(each for each in self.steps if isinstance(each, Kept))


@functools.singledispatch
def prepare(action: Action, view: GraphView, site: Site) -> Edit:
    """Make what the action asks for beside the chain, which is still as it was.

    A new module's call takes over the node of its slot when it is carried out, so nothing is made
    for it here where there is a slot.

    Raises:
        TypeError: a Call's function returns something other than one value of the graph, or the
            action reads what is no value beside the chain.
    """
    raise TypeError(f"nothing is known of how to carry out a {type(action).__name__}")


@prepare.register
def _(action: Bypass, view: GraphView, site: Site) -> Edit:
    return Edit((), site.first, site.input, (site.input,), now=_now(site, site.input))


@prepare.register
def _(action: Replace, view: GraphView, site: Site) -> Edit:
    slot = _slot(site, action.slot)
    reads = (site.input, *(_node_of(view, site, value) for value in action.inputs))
    place = site.last if action.inputs else site.first
    node = _module_node(view, place) if slot is None else slot.node
    call = NewCall(action.module, node, reads, slot)
    nodes = (node,) if slot is None else ()
    return Edit(nodes, place, node, reads, (call,), _now(site, node, slot))


@prepare.register
def _(action: Revise, view: GraphView, site: Site) -> Edit:
    if site.pattern.branches:
        raise TypeError("Revise changes steps of a chain, and this one has branches")
    steps: list[NewCall | Kept] = []
    nodes, now = [], []
    value = site.input
    for link in site.links:
        module = action.steps.get(link.step.name)
        if link.step.name not in action.steps:
            steps.append(Kept(link, value))
        elif module is not None:
            slot = link if link.node.op == "call_module" else None
            node = link.node if slot is not None else _module_node(view, link.node)
            nodes += [] if slot is not None else [node]
            steps.append(NewCall(module, node, (value,), slot))
        if module is not None or link.step.name not in action.steps:
            value = steps[-1].node
        now.append(value)
    first = min((each.node for each in steps), default=site.first)
    reads = (site.input,)
    return Edit(tuple(nodes), first, value, reads, tuple(steps), tuple(now), revises=True)


@prepare.register
def _(action: Split, view: GraphView, site: Site) -> Edit:
    """The first sibling's node will call the new module; after it the parts are taken out."""
    first = site.links[0]
    nodes = split(view.graph, first.node, action.sizes, site.pattern.steps[0].dim)
    reads = (site.input,)
    call = NewCall(action.module, first.node, reads, first)
    return Edit(tuple(nodes), first.node, first.node, reads, (call,), parts=tuple(nodes[1:]))


@prepare.register
def _(action: Call, view: GraphView, site: Site) -> Edit:
    if action.node is not None:
        return _made_again(view, site, action.node)
    reads_values = any(isinstance(leaf, Value) for leaf in action.leaves())
    place = site.last if reads_values else site.first

    def lowered(leaf: Any) -> Any:
        return _node_of(view, site, leaf) if isinstance(leaf, Value) else leaf

    args, kwargs = pytree.tree_map(lowered, (action.args, dict(action.kwargs)))
    base = f"{site.last.name}_constant"
    nodes, result = spell(view, place, action.function, (site.input, *args), kwargs, base)
    return _spelt(site, nodes, place, result)


def discard(view: GraphView, edit: Edit) -> None:
    """Take back what was prepared."""
    for node in reversed(edit.nodes):
        _erase(view, node)


def commit(view: GraphView, site: Site, edit: Edit, targets: Sequence[str]) -> list[fx.Node]:
    """Put what was prepared in the chain's place, new modules under these qualified names.

    Gives the nodes that stand there now, in order.
    """
    for node in site.nodes:
        view.forget_write(node)
    for call, target in zip(edit.calls, targets, strict=True):
        _call_module(view, edit, call, target)
    nodes = _part_uses(view, site, edit) if edit.parts else _replace_uses(view, site, edit)
    for node in nodes:
        view.note_write(node)
    return nodes


def _call_module(view: GraphView, edit: Edit, call: NewCall, target: str) -> None:
    """Let a prepared node call its new module under this name."""
    node = call.node
    if call.slot is not None:
        view.count(node, -1)
        if node is edit.result and node is not edit.place and not edit.revises:
            edit.place.prepend(node)
    # What FX keeps up to date on assignment is not cheap, and most sites need none of it.
    if node.target != target:
        node.target = target
    if node.args != call.reads:
        node.args = call.reads
    if node.kwargs:
        node.kwargs = {}
    view.place(target, call.module)
    view.count(node, +1)


def _replace_uses(view: GraphView, site: Site, edit: Edit) -> list[fx.Node]:
    """Move the readers of the chain to what was made, and erase what is left of the chain."""
    last, result = site.last, edit.result
    stay = {result, *(each.node for each in edit.steps)}
    if result is not site.input:
        for node in edit.nodes:
            node.meta = _provenance(last)
        if all(result is not each.node for each in edit.kept):
            result.meta = last.meta
    for each in edit.kept:
        if each.reads is not each.link.source:
            each.node.replace_input_with(each.link.source, each.reads)
    if result is not last:
        last.replace_all_uses_with(result)
    for node, now in zip(site.nodes[:-1], edit.now, strict=False):
        if now is not node:
            for reader in [each for each in node.users if each not in site.nodes]:
                reader.replace_input_with(node, now)  # it asks for the shape alone
    for node in reversed(site.nodes):
        if node not in stay:
            read = [each for each in node.all_input_nodes if view.is_constant(each)]
            _erase(view, node)
            _erase_unread(view, read)
    ours = [*edit.nodes, *(node for node in site.nodes if node in stay)]
    return sorted(ours) if edit.revises else ours


def _part_uses(view: GraphView, site: Site, edit: Edit) -> list[fx.Node]:
    """Move the readers of each sibling to its part, and erase the siblings but the first."""
    first = edit.nodes[0]
    for link, part in zip(site.links, edit.parts, strict=True):
        part.meta = dict(link.node.meta)
        link.node.replace_all_uses_with(part, delete_user_cb=lambda user: user is not first)
    for link in site.links[1:]:
        _erase(view, link.node)
    # What was known of the first sibling's value is not true of the whole.
    edit.result.meta = _provenance(edit.result)
    first.meta = _provenance(edit.result)
    return [edit.result, *edit.nodes]


def _erase_unread(view: GraphView, constants: list[fx.Node]) -> None:
    """What only the replaced chain read goes with it."""
    while constants:
        node = constants.pop()
        if not node.users and not is_erased(node):
            constants += node.all_input_nodes
            _erase(view, node)


def _erase(view: GraphView, node: fx.Node) -> None:
    view.count(node, -1)
    view.graph.erase_node(node)


def _made_again(view: GraphView, site: Site, node: fx.Node) -> Edit:
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
    return _spelt(site, [again], node, again)


def _spelt(site: Site, nodes: list[fx.Node], place: fx.Node, result: fx.Node) -> Edit:
    read = dict.fromkeys((site.input, *(each for node in nodes for each in node.all_input_nodes)))
    outside = [each for each in (*read, result) if each not in nodes]
    return Edit(tuple(nodes), place, result, tuple(dict.fromkeys(outside)), now=_now(site, result))


def _now(site: Site, result: fx.Node, slot: Link | None = None) -> tuple[fx.Node, ...]:
    """At each link, the result, but before the slot what the chain starts from."""
    if site.pattern.branches:
        return ()
    before = 0 if slot is None else site.links.index(slot)
    return (site.input,) * before + (result,) * (len(site.links) - before)


def _slot(site: Site, name: str | None) -> Link | None:
    """The link whose node and name a new module takes over, if the chain has such a one."""
    calling = (link for link in site.links if link.node.op == "call_module")
    return next((link for link in calling if name is None or link.name == name), None)


def _module_node(view: GraphView, place: fx.Node) -> fx.Node:
    with view.graph.inserting_before(place):
        return view.graph.create_node("call_module", "")


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
