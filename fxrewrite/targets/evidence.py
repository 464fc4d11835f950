"""One run of a model on example inputs: which module was called on what another one gave."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import attrs
import torch
from torch import nn

from ..engine.bindings import Shown
from ..errors import FxRewriteError
from ..module_utils.running import run
from .module_copy import copied


@attrs.frozen(eq=False)
class _Call:
    """A call of a module, and the call that gave the very tensor which it was given.

    `given` is that tensor's shape and type, None if it was not called on one tensor alone.
    """

    module: int
    source: _Call | None
    given: Shown | None


class Witness:
    """What a run of a model showed: a check on what was read in its code, and inputs of its parts.

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
        self._made: dict[int, tuple[weakref.ref[torch.Tensor], _Call]] = {}
        self._open: list[_Call] = []
        probe = copied(model, {})
        for module, twin in zip(model.modules(), probe.modules(), strict=True):
            if is_leaf(module):
                twin.register_forward_pre_hook(self._entering(id(module)), with_kwargs=True)
                twin.register_forward_hook(self._leaving)
        for name in parts:
            probe.get_submodule(name).register_forward_pre_hook(
                self._asking(name), with_kwargs=True
            )
        try:
            run(probe, example_inputs)
        except Exception as error:
            said = str(error).partition("\n")[0]
            raise FxRewriteError(
                f"the model can't be called with these example_inputs: {said}"
            ) from error
        self._made.clear()

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

    def _source(self, call: _Call, gone: Collection[int]) -> _Call | None:
        source = call.source
        while source is not None and source.module in gone:
            source = source.source
        return source

    def _entering(self, key: int) -> Callable[..., None]:
        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            tensors = [e for e in (*args, *kwargs.values()) if isinstance(e, torch.Tensor)]
            ref, source = self._made.get(id(tensors[0]), (None, None)) if tensors else (None, None)
            is_it = ref is not None and ref() is tensors[0]
            given = (tensors[0].shape, tensors[0].dtype) if len(tensors) == 1 else None
            self._open.append(_Call(key, source if is_it and given is not None else None, given))
            self._calls.setdefault(key, []).append(self._open[-1])

        return enter

    def _leaving(self, module: nn.Module, args: Any, output: Any) -> None:
        call = self._open.pop()
        if isinstance(output, torch.Tensor):
            self._made[id(output)] = (weakref.ref(output), call)

    def _asking(self, name: str) -> Callable[..., None]:
        def ask(module: nn.Module, args: Any, kwargs: Any) -> None:
            given = tuple(map(_outline, args)), {k: _outline(v) for k, v in kwargs.items()}
            self._given.setdefault(name, []).append(given)

        return ask


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
