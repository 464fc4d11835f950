"""What a rule may return: the chain becomes a module's call, other calls, or loses steps.

Siblings become one call, whose result is split.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import fx, nn

from ..module_utils.evolve import same_module
from ..module_utils.tensors import named_tensors
from ..module_utils.torch_private import pytree
from .spec import Pattern
from .values import Value


class Action:
    """What a rule may return."""

    @property
    def modules(self) -> Mapping[str, nn.Module | None]:
        """The modules that it brings, by what tells them apart; None where a step goes."""
        return {}

    def misuse(self, pattern: Pattern, found: Sequence[str]) -> str | None:
        """What is wrong with it at a match of a pattern, given the steps that were found."""
        for module in self.modules.values():
            if module is not None and not isinstance(module, nn.Module):
                return f"it returned {self!r}, and {module!r} is not a module"
        return None

    def is_like(self, other: Action) -> bool:
        """Whether both ask for the same, their modules alike to the bit, and read nothing else."""
        mine, theirs = self.modules, other.modules
        return (
            type(self) is type(other)
            and self._settings() == other._settings()
            and mine.keys() == theirs.keys()
            and all(_alike(module, theirs[name]) for name, module in mine.items())
        )

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors that it brings, by name."""
        for module in self.modules.values():
            if module is not None:
                yield from named_tensors(module)

    def _settings(self) -> Any:
        """All of it but the modules."""
        return ()


@attrs.frozen(eq=False)
class Replace(Action):
    """The chain becomes one call of this module.

    >>> Replace(nn.GELU(), slot="act").slot
    'act'

    Args:
        module: the new module; its tensors may be shared with the matched modules.
        slot: the step whose qualified name the new module takes, where nothing else uses that
            name; by default the chain's first module step.
        inputs: values that the module is called with after the chain's input.
    """

    module: nn.Module
    slot: str | None = None
    inputs: tuple[Value, ...] = ()

    @property
    def modules(self) -> Mapping[str, nn.Module | None]:
        """The one."""
        return {"": self.module}

    def misuse(self, pattern: Pattern, found: Sequence[str]) -> str | None:
        """The slot has to be one of the steps that were found."""
        if self.slot is not None and self.slot not in found:
            return f"it named the slot {self.slot!r}; this match has {', '.join(found)}"
        return super().misuse(pattern, found)

    def _settings(self) -> Any:
        return self.slot, self.inputs


@attrs.frozen
class Bypass(Action):
    """The chain disappears: whoever read its output reads its input."""


@attrs.frozen(eq=False, init=False, repr=False)
class Revise(Action):
    """The chain stays a chain: steps get a new module or are left out, the others stay as they are.

    A new module takes its step's qualified name, where nothing else uses that name.

    >>> Revise(conv=nn.Conv2d(3, 8, 1), bn=nn.ReLU(), drop=None).steps["bn"]
    ReLU()

    Args:
        steps: by name, the module that the step calls from now on, or None for a step that is left
            out: what read its output reads its input. A step that may be absent may be named.
    """

    steps: Mapping[str, nn.Module | None]

    def __init__(self, **steps: nn.Module | None) -> None:
        """Of the steps that change."""
        self.__attrs_init__(steps)

    @property
    def modules(self) -> Mapping[str, nn.Module | None]:
        """Those of the steps that change."""
        return self.steps

    def misuse(self, pattern: Pattern, found: Sequence[str]) -> str | None:
        """What it names are steps of the pattern, and a module stands in one place."""
        known = {step.name: step for step in pattern.steps}
        for name, module in self.steps.items():
            if name not in known:
                return f"it revised {name!r}; the pattern's steps are {', '.join(known)}"
            if module is not None and known[name].repeats:
                return f"it gave a module to {name!r}, which may be many steps"
        return super().misuse(pattern, found)

    def __repr__(self) -> str:
        """As it is written."""
        return f"Revise({', '.join(f'{name}={each!r}' for name, each in self.steps.items())})"


@attrs.frozen(eq=False)
class Split(Action):
    """Siblings become one call of this module, and each is a part of what that gives.

    The module takes the qualified name of the first sibling, where nothing else uses that name.

    >>> Split(nn.Linear(4, 5), sizes=(2, 3)).sizes
    (2, 3)

    Args:
        module: the new module.
        sizes: the size of each sibling's part along the dimension that the pattern names, in the
            order of the siblings.
    """

    module: nn.Module
    sizes: tuple[int, ...]

    @property
    def modules(self) -> Mapping[str, nn.Module | None]:
        """The one."""
        return {"": self.module}

    def misuse(self, pattern: Pattern, found: Sequence[str]) -> str | None:
        """There has to be a size for each sibling."""
        if len(self.sizes) != len(found):
            return f"it returned {len(self.sizes)} sizes for {len(found)} siblings"
        return super().misuse(pattern, found)

    def _settings(self) -> Any:
        return self.sizes


class Call(Action):
    """A function and its arguments: seen, as a captured step, or to be made, as an action.

    Captured by a `call(...)` step, `function` is what the graph calls (a module, a function, or
    a method's name) and `kwargs` holds its arguments by name, without the chain's own value,
    which came in by the argument `takes`. A parameter of the model stands there as its tensor,
    another value of the graph as a `Value`. Where the step joins branches, `takes` names the
    arguments by which they came in, in the order of the branches.

    Returned by a rule, the chain becomes what `function(x, *args, **kwargs)` does to the chain's
    input `x`. The function is traced, so each torch function that it calls becomes a node, and
    each tensor among the arguments becomes an attribute of the rewritten model. A captured call
    that is returned is made again, reading the chain's input.

    >>> from torch.nn import functional as F
    >>> Call(F.leaky_relu, negative_slope=0.1).kwargs
    {'negative_slope': 0.1}
    """

    __slots__ = ("args", "function", "kwargs", "node", "takes")

    def __init__(self, function: Any, /, *args: Any, **kwargs: Any) -> None:
        """Of a function with the arguments that follow the chain's value."""
        self.function = function
        self.args = args
        self.kwargs: Mapping[str, Any] = kwargs
        self.takes: str | tuple[str, ...] | None = None
        self.node: fx.Node | None = None

    @classmethod
    def captured(
        cls,
        function: Any,
        kwargs: dict[str, Any],
        takes: str | tuple[str, ...],
        node: fx.Node | None = None,
    ) -> Call:
        """What the engine puts into a match, and a test may too: `takes` is the chain's way in."""
        call = cls(function)
        # It stands for a call that is there, so it can't be given other arguments.
        call.kwargs = types.MappingProxyType(kwargs)
        call.takes, call.node = takes, node
        return call

    def leaves(self) -> list[Any]:
        """All that stands among its arguments, however nested."""
        return pytree.tree_leaves((self.args, dict(self.kwargs)))

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The constants among its arguments."""
        yield from (("constant", x) for x in self.leaves() if isinstance(x, torch.Tensor))

    def _settings(self) -> Any:
        return self  # what functions do can't be compared

    def __repr__(self) -> str:
        """The call as it would be written."""
        given = [*map(repr, self.args), *(f"{k}={v!r}" for k, v in self.kwargs.items())]
        return (
            f"Call({', '.join([getattr(self.function, '__name__', repr(self.function)), *given])})"
        )


def _alike(one: nn.Module | None, other: nn.Module | None) -> bool:
    return one is other or (one is not None and other is not None and same_module(one, other))
