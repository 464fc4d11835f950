"""What a rule may return: the chain becomes a module's call, other calls, or loses steps.

Siblings become one call, whose result is split.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import attrs
from torch import nn

from .values import Call, Value


@attrs.frozen(eq=False)
class Replace:
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


@attrs.frozen
class Bypass:
    """The chain disappears: whoever read its output reads its input."""


@attrs.frozen(eq=False, init=False)
class Revise:
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


@attrs.frozen(eq=False)
class Split:
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


Action: TypeAlias = Replace | Revise | Split | Call | Bypass
