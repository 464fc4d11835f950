"""Leave out what does nothing: idle modules, casts and reshapes to what is there, a second ReLU."""

from __future__ import annotations

import torch
from torch import nn

import fxrewrite as fxr

from .spellings import DROPOUT, FLATTEN, PERMUTE, RESHAPE, Idle, aten

_CASTS = {
    "float": torch.float32,
    "double": torch.float64,
    "half": torch.float16,
    "bfloat16": torch.bfloat16,
}


@fxr.pattern
class IdleModule:
    """A module that in eval mode passes on what it reads."""

    idle: Idle


@fxr.rule(quiet=True)
def drop_idle(m: IdleModule) -> fxr.Bypass:
    """Leave out identities, dropouts and stochastic depth."""
    return fxr.Bypass()


@fxr.pattern
class DropoutCall:
    """A dropout that is called as a function."""

    drop: fxr.Call = fxr.call(*DROPOUT, chain="input", side_inputs=False)


def drops_nothing(m: DropoutCall) -> str | None:
    """Outside of training a dropout passes on what it reads."""
    given = m.drop.kwargs
    is_alpha = "alpha" in getattr(m.drop.function, "__name__", "")
    training = given.get("training", given.get("train", not is_alpha))
    return None if training is False else "it drops also in eval mode: training is not False"


@fxr.rule(where=[drops_nothing], quiet=True)
def drop_dropout_call(m: DropoutCall) -> fxr.Bypass:
    """Leave out a functional dropout with training=False."""
    return fxr.Bypass()


@fxr.pattern(anchor="second")
class ReluTwice:
    """A ReLU whose only reader is another; what does nothing may stand between."""

    first: nn.ReLU
    idle: tuple[Idle, ...]
    second: nn.ReLU


@fxr.rule(quiet=True)
def drop_second_relu(m: ReluTwice) -> fxr.Revise:
    """What a ReLU made passes another as it is."""
    return fxr.Revise(second=None)


@fxr.pattern
class Cast:
    """A value that is cast to a type."""

    x: fxr.Value
    cast: fxr.Call = fxr.call(
        "to", "type", *_CASTS, aten.to.dtype, aten._to_copy.default,
        side_inputs=False,
    )  # fmt: skip


def has_type(m: Cast) -> str | fxr.Declined | None:
    """The value must be of that type already, and nothing else be asked for."""
    given = list(m.cast.kwargs.values())
    wanted = _CASTS.get(m.cast.function) if not given else given[0]
    if len(given) > 1 or not isinstance(wanted, torch.dtype):
        return fxr.Declined("it asks for more than a type", "missed")
    if m.x.dtype is None:
        return f"whether the value is in {_name(wanted)} already is not known; {m.x.unknown}"
    if m.x.dtype != wanted:
        return fxr.Declined(f"it casts {_name(m.x.dtype)} to {_name(wanted)}", "missed")
    return None


@fxr.rule(where=[has_type], quiet=True)
def drop_cast(m: Cast) -> fxr.Bypass:
    """Leave out a cast to the type that the value has."""
    return fxr.Bypass()


@fxr.pattern
class Reshaped:
    """A value whose shape is spelt anew."""

    x: fxr.Value
    reshape: fxr.Call = fxr.call(
        nn.Flatten, *FLATTEN, *RESHAPE, *PERMUTE, chain="input", side_inputs=False
    )


def keeps_shape(m: Reshaped) -> str | fxr.Declined | None:
    """The shape must stay whatever the sizes are, not for those of an example alone."""
    given, rank = m.reshape.kwargs, m.x.rank
    if (dims := given.get("dims")) is not None:
        same = isinstance(dims, tuple | list) and list(dims) == list(range(len(dims)))
        return None if same else fxr.Declined("it permutes dimensions", "missed")
    if (size := given.get("size", given.get("shape"))) is not None:
        if not isinstance(size, tuple | list) or list(size) != [-1] or rank not in (None, 1):
            return fxr.Declined("other sizes of its input would be changed", "missed")
    elif further := given.keys() - {"start_dim", "end_dim"}:
        return fxr.Declined(f"it is called with {', '.join(sorted(further))}", "missed")
    if rank is None:
        return f"whether it changes the shape is not known; {m.x.unknown}"
    of = m.reshape.function if isinstance(m.reshape.function, nn.Flatten) else None
    start = of.start_dim if of is not None else given.get("start_dim", 0)
    end = of.end_dim if of is not None else given.get("end_dim", -1)
    if rank > 0 and isinstance(start, int) and isinstance(end, int) and start % rank == end % rank:
        return None
    return fxr.Declined(f"it joins dimensions of a {rank}-d tensor", "missed")


@fxr.rule(where=[keeps_shape], quiet=True)
def drop_reshape(m: Reshaped) -> fxr.Bypass:
    """Leave out a flatten, reshape or permutation that changes nothing, whatever the sizes."""
    return fxr.Bypass()


@fxr.pattern(anchor="again")
class ContiguousTwice:
    """A value that is contiguous by its making, and is made so again."""

    made: fxr.Call = fxr.call(nn.Linear, "contiguous", aten.contiguous.default, side_inputs=False)
    idle: tuple[Idle, ...]
    again: fxr.Call = fxr.call(
        "contiguous", aten.contiguous.default, chain="input", side_inputs=False
    )


def same_format(m: ContiguousTwice) -> str | None:
    """Both must ask for the same order of dimensions; a linear layer makes the plain one."""
    first, second = (
        each.kwargs.get("memory_format", torch.contiguous_format) for each in (m.made, m.again)
    )
    return None if first == second else f"the first is {first}, and the second {second}"


@fxr.rule(where=[same_format], quiet=True)
def drop_contiguous(m: ContiguousTwice) -> fxr.Revise:
    """Leave out `contiguous()` where the value is contiguous whatever the input's strides are."""
    return fxr.Revise(again=None)


cleanup = fxr.RuleSet(
    "cleanup",
    [drop_idle, drop_dropout_call, drop_second_relu, drop_cast, drop_reshape, drop_contiguous],
    doc="Leave out what does nothing in eval mode.",
)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
