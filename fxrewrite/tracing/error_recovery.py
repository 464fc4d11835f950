"""Trace past a module whose forward can't be traced, which then is one node of the graph."""

from __future__ import annotations

import itertools
from types import CodeType
from typing import Any, TypeAlias

from torch import fx

from .passages import stack

Answers: TypeAlias = "bool | list[bool]"
MOST_QUESTIONS = 12


def tolerant(tracer: fx.Tracer, leaves: set[str]) -> dict[str, Exception]:
    """Let a tracer go on where a submodule's forward raises; gives what each such one raised.

    So one pass over a model finds all that stops tracing, and nothing is traced again for it. What
    was recorded of the forward before it raised is taken back.

    Args:
        tracer: a tracer of our own. It is changed in place.
        leaves: the qualified names that the tracer takes for leaves; those that raise are added.
    """
    raised: dict[str, Exception] = {}
    unanswered = _note_questions(tracer)
    call_module, getattr_ = tracer.call_module, tracer.getattr
    reads: dict[str, fx.Proxy] = {}

    def get(name: str, value: Any, cache: dict[str, fx.Proxy]) -> Any:
        nonlocal reads
        reads = cache
        return getattr_(name, value, cache)

    def call(module: Any, forward: Any, args: Any, kwargs: Any) -> Any:
        nodes = tracer.graph.nodes
        count, depth, before = len(nodes), len(tracer.module_stack), len(unanswered)
        try:
            result = call_module(module, forward, args, kwargs)
            if len(unanswered) > before:
                raise unanswered[before]  # which the forward has caught
            return result
        except Exception as error:
            name = tracer.path_of_module(module)
            if tracer.is_leaf_module(module, name):
                raise
            raised[name] = error
        del unanswered[before:]
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

    def trace(*args: Any, **kwargs: Any) -> fx.Graph:
        graph = trace_(*args, **kwargs)
        if unanswered:
            raise unanswered[0]
        return graph

    trace_, tracer.trace = tracer.trace, trace  # type: ignore[method-assign]
    tracer.call_module = call  # type: ignore[method-assign, assignment]
    tracer.getattr = get  # type: ignore[method-assign, assignment]
    return raised


def answer_questions(tracer: fx.Tracer, guess: Answers) -> None:
    """Let a tracer answer whether a value is true, where the model's own forward asks for it.

    Args:
        tracer: a tracer of our own. It is changed in place.
        guess: one answer, which each place is given once, and then what ends a loop; or the answers
            in the order of the questions. Those that are missing are yes, and added.
    """
    to_bool, asked, count = tracer.to_bool, set[tuple[CodeType, int]](), itertools.count()

    def answer(value: fx.Proxy) -> bool:
        if tracer.module_stack:
            return to_bool(value)
        if isinstance(guess, list):
            at = next(count)
            if at == MOST_QUESTIONS:
                return to_bool(value)
            guess.extend([True] * (at + 1 - len(guess)))
            return guess[at]
        place = stack()[-1]
        is_first = (place.code, place.at) not in asked
        asked.add((place.code, place.at))
        return guess and is_first

    tracer.to_bool = answer  # type: ignore[method-assign, assignment]


def _note_questions(tracer: fx.Tracer) -> list[Exception]:
    """The errors with which a tracer answers questions, also those that a forward catches."""
    noted: list[Exception] = []

    def noting(answer: Any) -> Any:
        def ask(value: fx.Proxy) -> Any:
            try:
                return answer(value)
            except Exception as error:
                noted.append(error)
                raise

        return ask

    tracer.to_bool = noting(tracer.to_bool)  # type: ignore[method-assign]
    tracer.iter = noting(tracer.iter)  # type: ignore[method-assign]
    tracer.keys = noting(tracer.keys)  # type: ignore[method-assign]
    return noted
