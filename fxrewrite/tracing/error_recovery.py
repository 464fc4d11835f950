"""Trace past a module whose forward can't be traced, which then is one node of the graph."""

from __future__ import annotations

from typing import Any

from torch import fx


def tolerant(tracer: fx.Tracer, leaves: set[str]) -> dict[str, Exception]:
    """Let a tracer go on where a submodule's forward raises; gives what each such one raised.

    So one pass over a model finds all that stops tracing, and nothing is traced again for it. What
    was recorded of the forward before it raised is taken back.

    Args:
        tracer: a tracer of our own. It is changed in place.
        leaves: the qualified names that the tracer takes for leaves; those that raise are added.
    """
    raised: dict[str, Exception] = {}
    call_module, getattr_ = tracer.call_module, tracer.getattr
    reads: dict[str, fx.Proxy] = {}

    def get(name: str, value: Any, cache: dict[str, fx.Proxy]) -> Any:
        nonlocal reads
        reads = cache
        return getattr_(name, value, cache)

    def call(module: Any, forward: Any, args: Any, kwargs: Any) -> Any:
        nodes = tracer.graph.nodes
        count, depth = len(nodes), len(tracer.module_stack)
        try:
            return call_module(module, forward, args, kwargs)
        except Exception as error:
            name = tracer.path_of_module(module)
            if tracer.is_leaf_module(module, name):
                raise
            raised[name] = error
        leaves.add(name)
        while len(tracer.module_stack) > depth:
            tracer.module_stack.popitem()
        taken_back = set()
        while len(nodes) > count:
            node = next(iter(reversed(nodes)))
            taken_back.add(node)
            tracer.graph.erase_node(node)
        for read in [name for name, proxy in reads.items() if proxy.node in taken_back]:
            del reads[read]  # FX reads a parameter once, and hands that out from then on
        return call_module(module, forward, args, kwargs)

    tracer.call_module = call  # type: ignore[method-assign, assignment]
    tracer.getattr = get  # type: ignore[method-assign, assignment]
    return raised
