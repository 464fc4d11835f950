"""Code that can't be traced, as a graph of the calls that were read in it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import fx

from .values import Call, Output


def outline(calls: Iterable[Call], names: Mapping[int, str]) -> tuple[fx.Graph, dict[fx.Node, str]]:
    """A graph in which a module reads another one if all its calls read what that one gives.

    It says where to look and what reports are to say. It does not run, and proves nothing: whether
    the calls of two modules belong together on every way through the code, `Flows` has to say.

    Args:
        calls: the calls of the modules that are to be in the graph.
        names: the qualified names of these modules, by identity.

    Returns:
        The graph, with one node for each module, and what inputs and output are, in words.
    """
    by_module: dict[int, list[Call]] = {}
    for call in calls:
        by_module.setdefault(id(call.module), []).append(call)
    graph, nodes, remarks = fx.Graph(), dict[int, fx.Node](), dict[fx.Node, str]()
    for key, found in by_module.items():
        source = nodes.get(_source(found))
        if source is None:
            source = graph.placeholder("untraced")
            remarks[source] = f"a value of code that can't be traced, at {found[0].where}"
        inputs = (source,) if all(call.on_one for call in found) else (source, source)
        nodes[key] = graph.call_module(names[key], inputs)
    ends = [nodes[key] for key, found in by_module.items() if _leaves(found, nodes)]
    remarks[graph.output(tuple(ends))] = "code that can't be traced"
    return graph, remarks


def _source(calls: Iterable[Call]) -> int:
    """The identity of the module whose values are all that these calls read; 0 if there is none."""
    read = {atom for call in calls for atom in call.inputs}
    modules = {id(atom.call.module) if isinstance(atom, Output) else 0 for atom in read}
    return modules.pop() if len(modules) == 1 else 0


def _leaves(calls: Iterable[Call], nodes: Mapping[int, fx.Node]) -> bool:
    """Whether what these calls of a module give may be read by nothing, or by no other node."""
    readers = {reader for call in calls for reader in call.readers}
    node = {nodes[id(call.module)] for call in calls}
    known = (nodes.get(id(reader.module)) for reader in readers if reader is not None)
    return (
        not readers
        or None in readers
        or any(each is None or node.isdisjoint(each.all_input_nodes) for each in known)
    )
