"""Cut a model into the largest parts that can be traced."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator
from typing import Any

import attrs
from torch import fx, nn

from ..module_utils.hooks import has_hooks
from .leaves import LeafModules, is_compiled, keeps_whole
from .passages import Passage, Passages
from .stops import Stop
from .traced import Traced
from .tracer import attempt, has_no_forward, module_path


@attrs.define(eq=False, slots=False)
class Part:
    """A submodule that was traced; its graph names everything as the whole model does.

    `name` is its qualified name, empty for the model itself. `undecided` are the modules in it,
    named from there, whose forward may go other ways than it did.
    """

    name: str
    graph: fx.Graph
    constants: dict[str, Any]
    undecided: frozenset[str]
    trace_again: Callable[[], Traced] = attrs.field(repr=False)
    _nodes: list[fx.Node] = attrs.field(init=False, repr=False)

    @_nodes.default
    def _(self) -> list[fx.Node]:
        return list(self.graph.nodes)  # of which a rewrite erases some

    def is_decided(self, first: str, second: str) -> bool:
        """Whether the forwards in which these two calls stand go one way alone."""
        paths = (self._paths[name] for name in (first, second))
        common = [a for a, b in zip(*paths, strict=False) if a == b]
        within = common[-1] if common else ""
        return not any(
            not within or each == within or each.startswith(f"{within}.") for each in self.undecided
        )

    def passages(self, first: str, second: str) -> list[tuple[Passage, ...] | None]:
        """How the value of a node got to another one that reads it; None where that is unknown."""
        return [(self._recorded or {}).get((first, second))]

    @functools.cached_property
    def _paths(self) -> dict[str, list[str]]:
        return {node.name: module_path(node) for node in self._nodes}

    @functools.cached_property
    def _recorded(self) -> Passages | None:
        return self.trace_again().passages


class Parts:
    """The largest submodules of a model that can be traced, and what stopped tracing.

    The model is one part if it could be traced. A submodule of a part that could not is one node
    there, and its own submodules are parts by themselves, and so on down. Each module is the root
    of one trace at most, and no module is traced as often as it is deep.

    Args:
        model: the model, which stays as it is.
        whole: what tracing it gave.
        wanted: the types that rules have to do with; what holds no such module is passed by.
        leaf_modules: as for tracing.
        tracer: as for tracing.
        in_leaves: whether to go on in modules that are one node of a part since they carry hooks.
        guesses: whether to guess answers to what a forward asks of values, to see what follows.
    """

    def __init__(
        self,
        model: nn.Module,
        whole: Traced,
        wanted: tuple[type[nn.Module], ...],
        leaf_modules: LeafModules = (),
        tracer: fx.Tracer | type[fx.Tracer] | None = None,
        *,
        in_leaves: bool = True,
        guesses: bool = False,
    ) -> None:
        self.parts: list[Part] = []
        self.stops: dict[str, Stop] = {}
        self._below_stops: dict[str, nn.Module] = {}
        self._model = model
        self._wanted = wanted
        self._in_leaves = in_leaves
        self._leaves = tuple(leaf_modules)
        self._tracer = tracer
        types = tuple(each for each in self._leaves if isinstance(each, type))
        names = {each for each in self._leaves if isinstance(each, str)}
        self._keeps_whole = keeps_whole(tracer or fx.Tracer, types, names)
        self._roots = {id(model)}
        self._guesses = guesses
        self._add("", whole, functools.partial(attempt, model, self._leaves, tracer))

    @property
    def inner(self) -> list[str]:
        """The qualified names of parts that are not the model itself."""
        return [part.name for part in self.parts if part.name]

    def unseen(self) -> list[nn.Module]:
        """The modules that code which can't be traced calls itself, if any of them is wanted."""
        called = {
            id(self._model.get_submodule(str(node.target)))
            for part in self.parts
            for node in part.graph.find_nodes(op="call_module")
            if node.target not in part.constants
        }
        found = [each for each in self._below_stops.values() if id(each) not in called]
        return found if any(isinstance(each, self._wanted) for each in found) else []

    def keeps_whole(self, module: nn.Module) -> bool:
        """Whether tracing keeps a module of the model as one node, whatever hooks it carries."""
        return self._keeps_whole(module, self._names[id(module)])

    @functools.cached_property
    def _names(self) -> dict[int, str]:
        return {id(each): name for name, each in self._model.named_modules()}

    def _add(self, name: str, traced: Traced, again: Callable[..., Traced]) -> None:
        """Add what tracing a submodule gave, and go on where it stopped."""
        ways = [(traced, again)]
        branches = any(each.is_branch and not each.name for each in traced.stops)
        if traced.graph is None and branches and self._guesses:
            ways = _both_ways(traced, again)
        parts = []
        for way, how in ways:
            for each in way.stops:
                below = _join(name, each.name)
                self.stops.setdefault(below, attrs.evolve(each, name=below, error=None))
            part = _part(name, way, functools.partial(how, record=True))
            parts += [part] if part is not None else []
        self.parts += parts
        nodes = [node for part in parts for node in part.graph.nodes]
        if not parts or traced.graph is None:
            self._open(name, {path for node in nodes for path in module_path(node)})
        if not parts or (not self.stops and not self._in_leaves):
            return
        for target in dict.fromkeys(str(n.target) for n in nodes if n.op == "call_module"):
            if any(target in part.constants for part in parts):
                continue  # a check, which the model does not have
            module = self._model.get_submodule(target)
            if target in self.stops:
                self._go_into(target)
            elif self._in_leaves and has_hooks(module) and not self._keeps_whole(module, target):
                self._trace(target, module)

    def _open(self, name: str, inlined: Collection[str] = ()) -> None:
        """Go on with the submodules of what can't be traced, but for those that were seen."""
        opened = self._model.get_submodule(name)
        if not is_compiled(opened):
            for inner, module in _callable_children(opened, name):
                if inner in self.stops:
                    self._go_into(inner)
                elif self._keeps_whole(module, inner):
                    self._below_stops[inner] = module
                elif inner.removeprefix(f"{name}.") not in inlined:
                    self._trace(inner, module)

    def _go_into(self, name: str) -> None:
        """Go on in what stopped tracing: by both answers to its question, if it asks one."""
        if self._guesses and self.stops[name].is_branch:
            self._trace(name, self._model.get_submodule(name))
        else:
            self._open(name)

    def _trace(self, name: str, module: nn.Module) -> None:
        if id(module) in self._roots or not self._is_wanted(module):
            return
        self._roots.add(id(module))
        below = [
            each if isinstance(each, type) else each.removeprefix(f"{name}.")
            for each in self._leaves
            if isinstance(each, type) or each.startswith(f"{name}.")
        ]
        again = functools.partial(attempt, module, below, self._tracer)
        self._add(name, again().unchecked(), again)

    def _is_wanted(self, module: nn.Module) -> bool:
        return any(isinstance(each, self._wanted) for each in module.modules())


def _both_ways(
    traced: Traced, again: Callable[..., Traced]
) -> list[tuple[Traced, Callable[..., Traced]]]:
    """What there is if questions are answered so, and if otherwise, each with how to trace it."""
    ways = [functools.partial(again, guess=guess) for guess in (True, False)]
    found = [(how().unchecked(), how) for how in ways]
    is_more = any(_count_calls(each) > _count_calls(traced) for each, _ in found)
    # The reason why it stopped is that of the first trace.
    first = [(attrs.evolve(traced, graph=None, fragment=None), again)]
    return [*first, *found] if is_more else [(traced, again)]


def _count_calls(traced: Traced) -> int:
    return 0 if traced.seen is None else len(traced.seen.find_nodes(op="call_module"))


def _part(name: str, traced: Traced, again: Callable[[], Traced]) -> Part | None:
    graph = traced.seen
    if graph is None or (traced.graph is None and not graph.find_nodes(op="call_module")):
        return None
    if traced.graph is None:  # what nobody has read is read by code that was not traced
        graph.output(tuple(node for node in graph.nodes if not node.users))
    if name:
        for node in graph.nodes:
            if node.op in ("call_module", "get_attr"):
                node.target = _join(name, str(node.target))
    undecided = {each.name for each in traced.assumptions}
    undecided |= {""} if traced.graph is None else set()
    constants = {_join(name, key): value for key, value in traced.constants.items()}
    return Part(name, graph, constants, frozenset(undecided), again)


def _callable_children(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """The modules right below, through those that only hold others."""
    for key, child in module.named_children():
        below = _join(name, key)
        if has_no_forward(child):
            yield from _callable_children(child, below)
        else:
            yield below, child


def _join(name: str, below: str) -> str:
    return ".".join(filter(None, (name, below)))
