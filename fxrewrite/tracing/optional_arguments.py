"""Arguments that decide a forward's way and may be left out; a graph goes as where they are."""

from __future__ import annotations

import inspect
from typing import Any

from torch import fx, nn

from ..module_utils.running import arguments_of
from .leaves import LeafModules
from .traced import Traced
from .tracer import attempt

_PLAIN = (bool, int, float, str, type(None))


def attempt_as_graph(
    model: nn.Module,
    leaf_modules: LeafModules = (),
    tracer: fx.Tracer | type[fx.Tracer] | None = None,
    example_inputs: Any = None,
) -> Traced:
    """As `attempt`, with the arguments at their default that decide what the graph is.

    Those are the ones that the forward asks of what they are, or that it branches on; one that the
    model does not run without is left as it is, and so is one that the example inputs give. The
    graph checks that they are left out.
    """
    plain = found = attempt(model, leaf_modules, tracer)
    if isinstance(model, fx.GraphModule):
        return found
    optional = _optional_arguments(model, example_inputs)
    left_out: dict[str, str] = {}
    tried: set[str] = set()
    while new := {n: line for n in optional if n not in tried and (line := _asks(found, n))}:
        tried |= new.keys()
        # What is left out last is the first argument, which is the input of most models.
        but_first = {name: line for name, line in new.items() if name != optional[0]}
        # Without those, others may decide that were not asked of before.
        line = next(iter(new.values()))
        rest = dict.fromkeys((n for n in optional[1:] if n not in tried), line)
        trials = new, but_first, *({name: line} for name, line in new.items()), new | rest
        for trial in filter(None, trials):
            other = attempt(model, leaf_modules, tracer, left_out | trial)
            if other.is_whole:
                found, left_out = other, left_out | trial
                if trial in (new, but_first, new | rest):
                    break
    if not found.is_whole:
        return plain
    for name in () if plain.is_whole else tuple(left_out):
        rest = {each: line for each, line in left_out.items() if each != name}
        other = attempt(model, leaf_modules, tracer, rest)
        if other.is_whole and not _asks(other, name):
            found, left_out = other, rest
    return found


def _optional_arguments(model: nn.Module, example_inputs: Any) -> list[str]:
    """The arguments of a model's forward that have a plain default, and are not given."""
    args, kwargs = arguments_of(() if example_inputs is None else example_inputs)
    try:
        signature = inspect.signature(type(model).forward)
        given = signature.bind_partial(model, *args, **kwargs).arguments
    except (TypeError, ValueError):
        return []
    parameters = signature.parameters.items()
    return [n for n, each in parameters if type(each.default) in _PLAIN and given.get(n) is None]


def _asks(traced: Traced, argument: str) -> str:
    """The line that asks of an argument, or that may do so since tracing stopped there."""
    lines = [each.line for each in traced.assumptions if each.argument == argument]
    lines += [each.line or each.reason for each in traced.stops]
    return lines[0] if lines else ""
