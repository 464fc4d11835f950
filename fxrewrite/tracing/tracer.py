"""Make a graph of a model: named types are leaves, and what can't be traced is explained."""

from __future__ import annotations

import copy
import functools
import gc
import threading
from collections.abc import Callable, Container, Mapping
from contextlib import ExitStack
from typing import Any

import attrs
from torch import fx, nn

from ..module_utils.names import fresh_name, parent_name
from ..module_utils.torch_private import FX_CONSTANTS
from .error_recovery import Answers, answer_questions, tolerant
from .forward_code import is_torchs_own
from .guards import Watch
from .leaves import LeafModules, not_there, with_leaves
from .passages import Recorder
from .real_effects import ChangedError, Draws, Generators, ModelState, NoDraws, check_calls
from .repetition import first_difference, not_repeated, note_lines
from .stops import NotInGraphError, Stop, stop
from .thread_guard import watched
from .torch_state import TorchState
from .traced import Traced


class _Alone:
    """Keeps other threads from tracing: while FX traces, it patches nn.Module for all of them."""

    _lock = threading.Lock()
    _thread: int | None = None
    is_held = False

    def __enter__(self) -> None:
        while _Alone._thread != threading.get_ident():
            self.is_held = self._lock.acquire(timeout=1)
            if self.is_held:
                _Alone._thread = threading.get_ident()
            else:  # Ctrl-C may have come just before another block was left, which is then garbage
                gc.collect()

    def __exit__(self, *_: object) -> None:
        if self.is_held:
            _Alone._thread = None
            self.is_held = bool(self._lock.release())  # type: ignore[func-returns-value]

    def __del__(self) -> None:
        self.__exit__()


def trace(
    model: nn.Module,
    leaf_modules: LeafModules = (),
    tracer: fx.Tracer | type[fx.Tracer] | None = None,
) -> tuple[fx.Graph, dict[str, Any]]:
    """A graph of the model for the caller to edit, and the constants that tracing found, by name.

    A GraphModule's graph is copied as it is. A module that carries hooks is a leaf, since a hook
    runs only when its module is called.

    Args:
        model: the model, which stays as it is.
        leaf_modules: modules that become one node each, by type (subclasses included) or by
            qualified name.
        tracer: a tracer, or its class, to use instead of `torch.fx.Tracer`.

    Raises:
        TraceError: the model can't be traced; the message names the module and the line.
    """
    found = attempt(model, leaf_modules, tracer)
    found.check(model)
    assert found.graph is not None
    return found.graph, found.constants


def attempt(
    model: nn.Module,
    leaf_modules: LeafModules = (),
    tracer: fx.Tracer | type[fx.Tracer] | None = None,
    left_out: Mapping[str, str] | None = None,
    *,
    record: bool = False,
    guess: Answers | None = None,
) -> Traced:
    """As `trace`, with each submodule that can't be traced as one node, and no TraceError.

    `left_out` are arguments that are traced at their default, with the line that asks for each.
    `record` asks for the passages of values, which takes longer. With a `guess`, what comes after
    the model's own questions is there as well, as a fragment on the way of these answers; with a
    list of answers, as a graph, and the list grows to as many as were asked for.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected an nn.Module, found {type(model).__name__}: {model!r:.80}")
    if isinstance(model, fx.GraphModule):
        return Traced(copy_of(model.graph))
    if (reason := not_there(model)) is not None:
        return Traced(None, stops=(Stop("", type(model).__name__, "", reason, ""),))
    leaves = tuple(leaf_modules)
    for each in leaves:
        if isinstance(each, str):
            model.get_submodule(each)
    with _Alone():
        # Reads of buffers are recorded, so that writes to them are not carried out in tracing.
        # A model that needs a buffer's value then does not trace, and gets a second try without.
        settled = functools.partial(_settled, left_out=left_out or {}, record=record, guess=guess)
        found = settled(model, leaves, tracer or _BufferTracer)
        if found.stops and found.reads_buffers and tracer is None:
            second = settled(model, leaves, fx.Tracer)
            better = second.graph is not None and len(second.stops) < len(found.stops)
            if better or found.graph is None:
                found = second
        if not isinstance(guess, bool):
            return found
        return attrs.evolve(found, graph=None, fragment=found.seen)


def copy_of(graph: fx.Graph) -> fx.Graph:
    """A copy of a graph, whose nodes have the same names."""
    copied = copy.deepcopy(graph)
    for node, old in zip(copied.nodes, graph.nodes, strict=True):
        if node.name != old.name:  # what a graph module has itself is a name that FX avoids
            node.name = old.name
    return copied


class _BufferTracer(fx.Tracer):
    """A tracer that records reads of buffers, and whether there was any."""

    proxy_buffer_attributes = True
    reads_buffers = False

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        value = super().getattr(attr, attr_val, parameter_proxy_cache)
        self.reads_buffers |= value is not attr_val and not isinstance(attr_val, nn.Parameter)
        return value


def _settled(
    model: nn.Module,
    leaves: tuple[type[nn.Module] | str, ...],
    tracer: fx.Tracer | type[fx.Tracer],
    left_out: Mapping[str, str],
    record: bool,
    guess: Answers | None,
) -> Traced:
    """Trace; once more where a forward changed the model, with what does so as leaves."""
    changing: dict[str, Stop] = {}
    while True:
        again = functools.partial(
            _traced, model, (*leaves, *changing), tracer, left_out, record, guess
        )
        found, changed = again()
        for name in changed:
            owner = _owner(model, name, changing)
            kind = type(model.get_submodule(owner)).__name__
            reason = f"its forward changes {name}, which a graph can't do for it"
            changing.setdefault(owner, Stop(owner, kind, "", reason, ""))
        if not changed:
            # With guesses it is asked for the calls that there are, and not for a graph to run.
            is_run = not record and guess is None
            if (unlike := _unlike(model, found, again) if is_run else None) is None:
                return attrs.evolve(found, stops=(*changing.values(), *found.stops))
            path, error = unlike
            owner = _owner(model, f"{path}.forward".lstrip("."), changing)
            changing.setdefault(owner, stop(model, owner, error))
        if "" in changing:
            stops = changing.pop(""), *changing.values()
            return attrs.evolve(found, graph=None, fragment=found.seen, stops=stops)


def _unlike(
    model: nn.Module, found: Traced, again: Callable[..., tuple[Traced, list[str]]]
) -> tuple[str, NotInGraphError] | None:
    """A module whose forward another trace shows to be another each time, and how; or None."""
    if found.graph is None or _is_torchs_own(model, found.graph):
        return None
    difference = _difference(found, again(looks=found.asks)[0])
    if difference is None:
        return None
    node, how = difference
    around = module_path(node)
    lines = again(precisely=True)[0].lines  # which take a pass of their own
    return around[-1] if around else "", not_repeated(how, lines.get(node.name, ""))


def _is_torchs_own(model: nn.Module, graph: fx.Graph) -> bool:
    """Whether all that a graph was traced through are containers of torch, and the like."""
    names = {"", *(name for node in graph.nodes for name in module_path(node))}
    forwards = [type(model.get_submodule(name)).forward for name in names]
    codes = [getattr(each, "__code__", None) for each in forwards]
    return all(code is not None and is_torchs_own(code) for code in codes)


def _difference(one: Traced, other: Traced) -> tuple[fx.Node, str] | None:
    if one.graph is None or other.graph is None:
        return None
    checks = {each.check for traced in (one, other) for each in traced.assumptions}
    return first_difference(one.graph, other.graph, one.constants, other.constants, checks)


def module_path(node: fx.Node) -> list[str]:
    """The modules whose forwards were under way when a node was made, outermost first."""
    paths = [str(each[0]) for each in node.meta.get("nn_module_stack", {}).values()]
    return paths[:-1] if node.op == "call_module" else paths


def _owner(model: nn.Module, name: str, leaves: Container[str]) -> str:
    """The module that has an attribute; or the one above, where that is a leaf and can't do it."""
    owner, _ = parent_name(name)
    modules = dict(model.named_modules(remove_duplicate=False))
    while owner not in modules or owner in leaves or has_no_forward(modules[owner]):
        if not owner:
            break
        owner, _ = parent_name(owner)
    return owner


def has_no_forward(module: nn.Module) -> bool:
    """Whether a module only holds others."""
    return type(module).forward is nn.Module.forward


def _traced(
    model: nn.Module,
    leaves: tuple[type[nn.Module] | str, ...],
    tracer: fx.Tracer | type[fx.Tracer],
    left_out: Mapping[str, str],
    record: bool,
    guess: Answers | None,
    *,
    precisely: bool = False,
    looks: bool = True,
) -> tuple[Traced, list[str]]:
    """What one pass gives, and the names of what it changed, which is put back."""
    names = {each for each in leaves if isinstance(each, str)}
    own = with_leaves(tracer, tuple(each for each in leaves if isinstance(each, type)), names)
    if guess is not None:
        answer_questions(own, guess)
    # Reads of what is skipped are recorded in the graph, so that no forward can write to it.
    skipped = ("_parameters", "_buffers") if own.proxy_buffer_attributes else ("_parameters",)
    before = ModelState(model, skipped)
    generators = Generators(before.generators)
    found_draws = Draws(own, before.generators) if precisely else None
    raised = tolerant(own, names)
    check_calls(own, before, of_all=precisely)
    watched(own, outside := TorchState())
    lines = note_lines(own) if precisely else {}
    watch = Watch(own, model, left_out, as_of_tensors=isinstance(guess, list), looks=looks)
    recorder = Recorder(own) if record else None
    known, graph, fragment = set(model.__dict__), None, None
    around = ExitStack()
    # Ctrl-C may come while the inner one of two is putting things back, or before it does.
    with before, before:
        try:
            with around, around:
                for each in (watch, NoDraws(), found_draws):  # type: ignore[no-untyped-call]
                    if each is not None:
                        around.enter_context(each)
                graph = own.trace(model)
        except Exception as error:
            raised[""] = error
            fragment = getattr(own, "graph", None)
        finally:
            outside.restore()
        if (drawn := generators.difference()) is not None:
            generators.restore()
            if found_draws is not None:
                raised.setdefault("", found_draws.error(drawn, model))
            graph, fragment = None, graph or fragment
        # A tensor made in the forward becomes a constant, which FX leaves on the model.
        found = {name: model.__dict__[name] for name in model.__dict__.keys() - known}
        constants = {name: each for name, each in found.items() if name.startswith(FX_CONSTANTS)}
        for name in constants:
            del model.__dict__[name]
        changed = before.restore()
    is_unclear = drawn is not None or any(isinstance(e, ChangedError) for e in raised.values())
    if is_unclear and not precisely:  # by which forward is worth a pass of its own
        return _traced(model, leaves, tracer, left_out, record, guess, precisely=True)
    stops = tuple(stop(model, name, error) for name, error in raised.items())
    if graph is not None:
        _drop_late(graph)
        for node in (*graph.find_nodes(op="placeholder"), graph.output_node()):
            if isinstance(node.type, str):  # an annotation not evaluated, unknown to torch.jit
                node.type = None
        _tell_arguments_apart(graph)
    reads_buffers = getattr(own, "reads_buffers", False)
    found_graph = graph if graph is not None else fragment
    assumptions = watch.assumptions(found_graph, raised) if found_graph is not None else ()
    checks = {each.check for each in assumptions}
    constants |= {name: each for name, each in watch.expectations.items() if name in checks}
    passages = None if recorder is None else recorder.passages
    return (
        Traced(
            graph,
            constants,
            stops,
            reads_buffers,
            assumptions,
            fragment,
            passages,
            lines,
            bool(left_out) or watch.was_asked,
        ),
        changed,
    )


def _drop_late(graph: fx.Graph) -> None:
    """Take back what FX has recorded when the text of an error named an attribute of a value."""
    for node in reversed(graph.nodes):
        if node.op == "output":
            break
        graph.erase_node(node)


def _tell_arguments_apart(graph: fx.Graph) -> None:
    """Rename the value of an argument where another argument, such as `b` beside `B`, is called so.

    The code of a graph would lose that one.
    """
    arguments = {str(node.target): node for node in graph.find_nodes(op="placeholder")}
    taken = {*arguments, *(node.name for node in graph.nodes)}
    for node in arguments.values():
        if arguments.get(node.name, node) is not node:
            node.name = fresh_name(node.name, taken)
            taken.add(node.name)
