"""One run of a model on example inputs: which module was called on what another one gave."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import weakref
from collections.abc import Callable, Collection, Iterable, Sequence
from types import FrameType
from typing import Any

import attrs
import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode

from ..engine.bindings import Shown
from ..errors import FxRewriteError
from ..ir.op_traits import ATTRIBUTES, traits_of_method
from ..module_utils.running import run
from ..module_utils.torch_private import pytree
from ..tracing.passages import Passage, Stack, passages, stack
from .module_copy import copied

# Clearing what is only suspended would end it.
_SUSPENDED = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR


@attrs.define(eq=False)
class _Call:
    """A call of a module, and the call that gave the very tensor which it was given.

    `given` is that tensor's shape and type, None if it was not called on one tensor alone. `how` is
    the code by which the tensor got there, `readers` are the functions that read what it gave.
    """

    module: int
    source: _Call | None
    given: Shown | None
    how: tuple[Passage, ...] | None
    stack: Stack
    readers: list[str] = attrs.field(factory=list)


class Evidence:
    """What a run of a model showed: a graph of its calls, and inputs of its parts.

    A copy of the model runs, under hooks, without gradients and from a fixed seed. What it changes
    in tensors that the two share is put back.

    Args:
        model: the model.
        example_inputs: what to call it with, a tensor or a tuple of arguments.
        is_leaf: whether a module is called as a whole.
        parts: the qualified names of modules whose inputs are asked for.

    Raises:
        FxRewriteError: the model can't be called with such inputs.
        NotCopiedError: the model can't be copied.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        is_leaf: Callable[[nn.Module], bool],
        parts: Iterable[str] = (),
    ) -> None:
        self._calls: dict[int, list[_Call]] = {}
        self._given: dict[str, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {}
        self._names: dict[int, str] = {id(each): name for name, each in model.named_modules()}
        self._by_node: dict[str, int] = {}
        self._made: dict[int, tuple[weakref.ref[torch.Tensor], _Call]] = {}
        self._open: list[_Call] = []
        self._frames: dict[int, FrameType] = {}
        probe = copied(model, {})
        self._originals: dict[int, nn.Module] = {}
        for module, twin in zip(model.modules(), probe.modules(), strict=True):
            self._originals[id(twin)] = module
            if is_leaf(module):
                twin.register_forward_pre_hook(self._entering(id(module)), with_kwargs=True)
                twin.register_forward_hook(self._leaving)
        for name in parts:
            probe.get_submodule(name).register_forward_pre_hook(
                self._asking(name), with_kwargs=True
            )
        try:
            with _Readers(self._on_read):
                done = run(probe, example_inputs)
        except Exception as error:
            said = str(error).partition("\n")[0]
            raise FxRewriteError(
                f"the model can't be called with these example_inputs: {said}"
            ) from error
        self._on_read("the caller", pytree.tree_leaves(done.output))
        self._made.clear()
        self._frames.clear()
        for call in itertools.chain.from_iterable(self._calls.values()):
            call.stack = []

    def refusal(self, chain: Sequence[nn.Module], gone: Collection[int]) -> str | None:
        """Why the run shows that these modules are not called one after the other, or None.

        Args:
            chain: the modules of a chain, in the order of its calls.
            gone: the identities of modules that hand on what they are given by now.
        """
        for first, second in itertools.pairwise(chain):
            before, after = self._calls.get(id(first), []), self._calls.get(id(second), [])
            sources = [self._source(each, gone) for each in after]
            for source in sources:
                if source is None or source.module != id(first):
                    return (
                        f"the run on the example inputs called {self._names[id(second)]} on "
                        f"something else than what {self._names[id(first)]} gave"
                    )
            if set(sources) != set(before) or len(sources) != len(before):
                return (
                    f"the run on the example inputs called {self._names[id(first)]} "
                    f"{len(before)} times and {self._names[id(second)]} {len(after)} times"
                )
        return None

    def shown(self, module: nn.Module, gone: Collection[int]) -> list[Shown | None]:
        """Of each call of a module, the shape and type of the tensor that it was called on.

        Args:
            module: the module.
            gone: the identities of modules that hand on what they are given by now.
        """
        found = []
        for call in self._calls.get(id(module), ()):
            first = call
            while first.source is not None and first.source.module in gone:
                first = first.source
            found.append(first.given)
        return found

    def inputs(self, part: str, names: Sequence[str]) -> tuple[Any, ...] | None:
        """What a part was called with, if it was the same shapes and dtypes in each call.

        Args:
            part: the qualified name.
            names: its parameters.
        """
        found = [_in_order(args, kwargs, names) for args, kwargs in self._given.get(part, ())]
        if not found or any(_kinds(each) != _kinds(found[0]) for each in found):
            return None
        return found[0]

    def graph(self, modules: Collection[nn.Module]) -> tuple[fx.Graph, dict[fx.Node, str]]:
        """A graph of the calls of these modules, as they were in the run, and of what they read.

        A module is one node, which reads another one if all its calls read what that one gave.

        Returns:
            The graph, and what its inputs, readers and output are, in words.
        """
        wanted = set(map(id, modules))
        calls_of = (call for key in wanted for call in self._calls.get(key, ()))
        wanted |= {call.source.module for call in calls_of if call.source is not None}
        graph, nodes, remarks = fx.Graph(), dict[int, fx.Node](), dict[fx.Node, str]()
        for key, calls in self._calls.items():
            if key not in wanted:
                continue
            sources = {0 if call.source is None else call.source.module for call in calls}
            source = nodes.get(sources.pop()) if len(sources) == 1 else None
            if source is None:
                source = graph.placeholder("untraced")
                remarks[source] = "a value of code that can't be traced"
            inputs = (source,) if all(call.given is not None for call in calls) else (source,) * 2
            nodes[key] = graph.call_module(self._names[key], inputs)
            self._by_node[nodes[key].name] = key
        for key, node in nodes.items():
            calls = self._calls[key]
            readers = dict.fromkeys(name for call in calls for name in call.readers)
            for name in readers:
                remarks[graph.call_function(_reader(name), (node,))] = name
            after = (c for each in self._calls.values() for c in each if c.source in calls)
            if any(each.module not in nodes for each in after):
                remarks[graph.call_function(_reader("another module"), (node,))] = "another module"
        remarks[graph.output(tuple(node for node in nodes.values() if not node.users))] = (
            "code that can't be traced"
        )
        return graph, remarks

    def is_decided(self, first: str, second: str) -> bool:
        """A run shows one way of several."""
        return False

    def passages(self, first: str, second: str) -> list[tuple[Passage, ...] | None]:
        """How the value of a node of the graph got to another one, in each call of that."""
        return list(dict.fromkeys(call.how for call in self._calls[self._by_node[second]]))

    def _source(self, call: _Call, gone: Collection[int]) -> _Call | None:
        source = call.source
        while source is not None and source.module in gone:
            source = source.source
        return source

    def _entering(self, key: int) -> Callable[..., None]:
        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            if self._open:  # the code of a module that is called as a whole
                self._open.append(self._open[-1])
                return
            now = stack()
            self._hold(now)
            tensors = [e for e in (*args, *kwargs.values()) if isinstance(e, torch.Tensor)]
            given = _shown(tensors[0]) if len(tensors) == 1 else None
            source = self._maker(tensors[0]) if given is not None else None
            how = None
            if source is not None:
                how = passages(source.stack, now, lambda value: value is tensors[0])
                how = how and tuple(self._of_the_model(each) for each in how)
            elif tensors:
                self._on_read("another module", tensors)
            self._open.append(_Call(key, source, given, how, now))
            self._calls.setdefault(key, []).append(self._open[-1])

        return enter

    def _leaving(self, module: nn.Module, args: Any, output: Any) -> None:
        call = self._open.pop()
        if isinstance(output, torch.Tensor) and not self._open:
            self._made[id(output)] = (weakref.ref(output), call)

    def _maker(self, tensor: torch.Tensor) -> _Call | None:
        ref, call = self._made.get(id(tensor), (None, None))
        return call if ref is not None and ref() is tensor else None

    def _on_read(self, name: str, values: Iterable[Any]) -> None:
        """Note a function, or what else reads tensors outside of the modules' own code."""
        for value in () if self._open else values:
            if isinstance(value, torch.Tensor) and (call := self._maker(value)) is not None:
                call.readers.append(name)

    def _hold(self, now: Stack) -> None:
        """Hold the frames that are under way, and let go what finished ones hold."""
        live = {id(each.frame): each.frame for each in now}
        for key, frame in self._frames.items():
            if key not in live and not frame.f_code.co_flags & _SUSPENDED:
                with contextlib.suppress(RuntimeError):  # it runs in another thread
                    frame.clear()
        self._frames = live

    def _of_the_model(self, passage: Passage) -> Passage:
        owner = self._originals.get(id(passage.owner))
        return attrs.evolve(passage, owner=owner)

    def _asking(self, name: str) -> Callable[..., None]:
        def ask(module: nn.Module, args: Any, kwargs: Any) -> None:
            given = tuple(map(_outline, args)), {k: _outline(v) for k, v in kwargs.items()}
            self._given.setdefault(name, []).append(given)

        return ask


class _Readers(TorchFunctionMode):
    """Tells of each function of torch that reads more of a tensor than its metadata."""

    def __init__(self, on_read: Callable[[str, Iterable[Any]], None]) -> None:
        super().__init__()
        self._on_read = on_read

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", str(func))
        if name == "__get__":
            name = getattr(getattr(func, "__self__", None), "__name__", "")
            is_question = name in ATTRIBUTES and ATTRIBUTES[name].asks == "metadata"
        else:
            is_question = traits_of_method(name).asks in ("metadata", "like", "new")
        if not is_question:
            self._on_read(name, pytree.tree_leaves((args, kwargs or {})))
        return func(*args, **(kwargs or {}))


def _shown(tensor: torch.Tensor) -> Shown:
    return Shown(tensor.dim(), tensor.dtype, tuple(tensor.shape))


def _reader(name: str) -> Callable[..., None]:
    def reader(*args: Any) -> None:
        raise AssertionError("what was observed does not run")

    reader.__name__ = name
    return reader


def _outline(value: Any) -> Any:
    """A tensor of the same shape, dtype and device without its memory."""
    if isinstance(value, torch.Tensor) and value.layout is torch.strided:
        return value.detach().new_empty(()).expand(value.shape)
    return value


def _in_order(
    args: tuple[Any, ...], kwargs: dict[str, Any], names: Sequence[str]
) -> tuple[Any, ...]:
    rest = itertools.takewhile(lambda name: name in kwargs, names[len(args) :])
    return (*args, *(kwargs[name] for name in rest))


def _kinds(given: tuple[Any, ...]) -> list[Any]:
    return [
        (each.shape, each.dtype) if isinstance(each, torch.Tensor) else type(each) for each in given
    ]
