"""What a rule may return: the chain becomes a module's call, other calls, or nothing."""

from __future__ import annotations

from typing import TypeAlias

import attrs
from torch import nn

from .declare import Call, Value


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


Action: TypeAlias = Replace | Call | Bypass
