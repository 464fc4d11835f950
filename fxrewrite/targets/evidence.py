"""One run of a model on example inputs: which module was called on what another one gave."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import sys
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from types import FrameType
from typing import Any, TypeAlias

import attrs
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ..engine.bindings import Shown
from ..errors import InputError
from ..ir.op_traits import ATTRIBUTES, traits_of_method
from ..module_utils.running import run
from ..module_utils.torch_private import pytree
from ..tracing.passages import Passage, Stack, passages, stack
from .module_copy import copied
from .observed_graph import Call, ObservedGraph

# Clearing what is only suspended would end it.
_SUSPENDED = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR


Firsts: TypeAlias = "Mapping[nn.Module, Collection[nn.Module]]"


class Evidence:
    """What a run of a model showed: the calls of its modules, and inputs of its parts.

    A copy of the model runs, under hooks, without gradients and from a fixed seed. What it changes
    in tensors that the two share is put back.

    Args:
        model: the model.
        example_inputs: what to call it with, a tensor or a tuple of arguments.
        is_leaf: whether a module is called as a whole.
        parts: the qualified names of modules whose inputs are asked for.

    Raises:
        InputError: the model can't be called with such inputs.
        NotCopiedError: the model can't be copied.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        is_leaf: Callable[[nn.Module], bool],
        parts: Iterable[str] = (),
    ) -> None:
        self._calls: dict[int, list[Call]] = {}
        self._given: dict[str, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {}
        self._names: dict[int, str] = {id(each): name for name, each in model.named_modules()}
        self._made: dict[int, tuple[weakref.ref[torch.Tensor], Call]] = {}
        self._open: list[Call] = []
        self._raised: set[int] = set()
        self._frames: dict[int, FrameType] = {}
        probe = copied(model, {})
        self._originals: dict[int, nn.Module] = {}
        for module, twin in zip(model.modules(), probe.modules(), strict=True):
            self._originals[id(twin)] = module
            if is_leaf(module):
                twin.register_forward_pre_hook(self._entering(id(module)), with_kwargs=True)
                twin.register_forward_hook(self._leaving, always_call=True)
        for name in parts:
            probe.get_submodule(name).register_forward_pre_hook(
                self._asking(name), with_kwargs=True
            )
        try:
            with _Readers(self._on_read, lambda: not self._open):
                done = run(probe, example_inputs)
        except Exception as error:
            said = f"{type(error).__name__}: {error}".partition("\n")[0]
            raise InputError(
                f"the model can't be called with these example_inputs: {said}"
            ) from error
        self._on_read("the caller", pytree.tree_leaves(done.output))
        self._made.clear()
        self._frames.clear()
        for call in itertools.chain.from_iterable(self._calls.values()):
            call.stack, call.handled = [], None

    def refusal(
        self, chain: Sequence[nn.Module], gone: Collection[int], firsts: Firsts
    ) -> str | None:
        """Why the run shows that these modules are not called one after the other, or None.

        Args:
            chain: the modules of a chain, in the order of its calls.
            gone: the identities of modules that hand on what they are given by now.
            firsts: for modules that may be called on what several gave, those.
        """
        for raised in (each for each in chain if id(each) in self._raised):
            return (
                f"in the run on the example inputs a call of {self._names[id(raised)]} raised, and "
                "the model went on"
            )
        for first, second in itertools.pairwise(chain):
            before, after = self._calls.get(id(first), []), self._calls.get(id(second), [])
            sources = [self._source(each, gone) for each in after]
            known = firsts.get(second, (first,))
            if any(each is None or each.module not in map(id, known) for each in sources):
                return (
                    f"the run on the example inputs called {self._names[id(second)]} on "
                    f"something else than what {self._names[id(first)]} gave"
                )
            taken = [each for each in sources if each is not None and each.module == id(first)]
            if set(taken) != set(before) or len(taken) != len(before):
                return (
                    f"the run on the example inputs called {self._names[id(first)]} "
                    f"{len(before)} times and {self._names[id(second)]} {len(taken)} times"
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
        found = [in_order(args, kwargs, names) for args, kwargs in self._given.get(part, ())]
        if not found or any(_kinds(each) != _kinds(found[0]) for each in found):
            return None
        return found[0]

    def graph(self, modules: Collection[nn.Module]) -> ObservedGraph:
        """The calls of these modules, as they were in the run, and of what they read."""
        return ObservedGraph(self._calls, self._names, set(map(id, modules)))

    def _source(self, call: Call, gone: Collection[int]) -> Call | None:
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
            self._open.append(Call(key, source, given, how, now))
            self._calls.setdefault(key, []).append(self._open[-1])

        return enter

    def _leaving(self, module: nn.Module, args: Any, output: Any) -> None:
        call = self._open.pop()
        if self._open:
            return
        if sys.exc_info()[1] is not call.handled:  # it raised, and the model goes on without it
            self._calls[call.module].remove(call)
            self._raised.add(call.module)
        elif isinstance(output, torch.Tensor):
            call.gave = _shown(output)
            self._made[id(output)] = (weakref.ref(output), call)

    def _maker(self, tensor: torch.Tensor) -> Call | None:
        ref, call = self._made.get(id(tensor), (None, None))
        return call if ref is not None and ref() is tensor else None

    def _on_read(self, name: str, values: Iterable[Any]) -> None:
        """Note a function, or what else reads tensors outside of the modules' own code."""
        for value in () if self._open else values:
            if isinstance(value, torch.Tensor):
                if (call := self._maker(value)) is not None:
                    call.readers.append(name)
            elif isinstance(value, list | tuple | dict):
                self._on_read(name, pytree.tree_leaves(value))

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

    def __init__(
        self, on_read: Callable[[str, Iterable[Any]], None], is_asked: Callable[[], bool]
    ) -> None:
        super().__init__()
        self._on_read, self._is_asked = on_read, is_asked

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self._is_asked():
            return func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", str(func))
        if name == "__get__":
            name = getattr(getattr(func, "__self__", None), "__name__", "")
            is_question = name in ATTRIBUTES and ATTRIBUTES[name].asks == "metadata"
        else:
            is_question = traits_of_method(name).asks in ("metadata", "like", "new")
        if not is_question:
            self._on_read(name, (*args, *(kwargs or {}).values()))
        return func(*args, **(kwargs or {}))


def _shown(tensor: torch.Tensor) -> Shown:
    return Shown(tensor.dim(), tensor.dtype, tuple(tensor.shape))


def _outline(value: Any) -> Any:
    """A tensor of the same shape, dtype and device without its memory."""
    if isinstance(value, torch.Tensor) and value.layout is torch.strided:
        return value.detach().new_empty(()).expand(value.shape)
    return value


def in_order(
    args: tuple[Any, ...], kwargs: dict[str, Any], names: Sequence[str]
) -> tuple[Any, ...]:
    """Arguments by position, as far as those by name follow the others."""
    rest = itertools.takewhile(lambda name: name in kwargs, names[len(args) :])
    return (*args, *(kwargs[name] for name in rest))


def _kinds(given: tuple[Any, ...]) -> list[Any]:
    return [
        (each.shape, each.dtype) if isinstance(each, torch.Tensor) else type(each) for each in given
    ]
