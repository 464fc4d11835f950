"""What rewriters trip over: each function puts a chain, or its model, into one such situation."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations

from fxrewrite.rules.spec import Step

from .drafts import Draft, Placed, place

Chain = Sequence[Placed]
Situation = Callable[[Draft, list[Placed], Sequence[Step], str], None]


def _any_value(draft: Draft, chain: Chain) -> str:
    return draft.draw(st.sampled_from([chain[0].reads, *(each.makes for each in chain)]))


def _called(chain: Chain) -> list[Placed]:
    return [each for each in chain if each.module]


def second_reader(draft: Draft, chain: list[Placed], steps: Sequence[Step], first: str) -> None:
    """A value of the chain is returned, read once more, or asked for its shape."""
    value = _any_value(draft, chain)
    read = draft.draw(st.sampled_from(_READS)).format(value)
    draft.outputs.append(read if read == value else draft.write(read))


_READS = [
    "{}", "{} * 0.5", "torch.neg({})", "torch.ones({}.shape)", "torch.zeros_like({})",
    "{}.new_ones(2)",
]  # fmt: skip


def more_steps(draft: Draft, chain: list[Placed], steps: Sequence[Step], first: str) -> None:
    """Something follows the chain, or one of its steps comes twice."""
    step = draft.draw(st.sampled_from([None, *steps]))
    last = draft.outputs[0]
    if step is not None:
        chain.append(place(draft, step, last))
        draft.outputs[0] = chain[-1].makes
    else:
        draft.outputs[0] = draft.write(draft.draw(st.sampled_from(_FOLLOWERS)).format(last))


_FOLLOWERS = ["F.relu({})", "{} + 1", "torch.tanh({})", "{}.flatten(1)", "{}.relu_()"]


def same_modules_again(
    draft: Draft, chain: list[Placed], steps: Sequence[Step], first: str
) -> None:
    """Some of the chain is called once more, on another value of the same shape."""
    value = chain[0].reads
    if draft.values[value].is_floating_point():
        value = draft.write(f"{value} + 1")
    for each in chain:
        if not each.module:
            break
        module = each.module
        how = draft.draw(st.sampled_from(["same", "same", "copy", "stop"]))
        if how == "stop":
            break
        if how == "copy":
            module = draft.member(module, copy.deepcopy(draft.members[module]))
        value = draft.write(f"self.{module}({value})")
    draft.outputs.append(value)


def twice(draft: Draft, chain: list[Placed], steps: Sequence[Step], first: str) -> None:
    """The chain is there a second time, with modules of its own, after or beside the first."""
    start = draft.draw(st.sampled_from([first, first, draft.outputs[0]]))
    for step in steps:
        start = place(draft, step, start).makes
    draft.outputs.append(start)


def read_of_a_tensor(draft: Draft, chain: list[Placed], steps: Sequence[Step], first: str) -> None:
    """The forward reads a tensor of a module of the chain."""
    held = [
        f"self.{each.module}.{name}"
        for each in _called(chain)
        for name, _ in draft.members[each.module].named_parameters()
        if "." not in name
    ]
    if held:
        draft.outputs.append(draft.write(f"{draft.draw(st.sampled_from(held))}.sum()"))


def tied(draft: Draft, chain: list[Placed], steps: Sequence[Step], first: str) -> None:
    """Another module, which is called too, has a parameter of a module of the chain."""
    called = _called(chain)
    if called:
        each = draft.draw(st.sampled_from(called))
        other = copy.deepcopy(draft.members[each.module])
        for name, parameter in draft.members[each.module].named_parameters():
            if "." not in name and draft.draw(st.booleans()):
                setattr(other, name, parameter)
        name = draft.member("tied", other)
        draft.outputs.append(draft.write(f"self.{name}({each.reads})"))


def write_in_place(draft: Draft, chain: list[Placed], steps: Sequence[Step], first: str) -> None:
    """A value of the chain, or a part of it, is written to at some later moment."""
    value, after = _any_value(draft, chain), _any_value(draft, chain)
    defined = list(draft.values)
    after = max(value, after, key=defined.index)
    floating = draft.values[value].is_floating_point()
    ways = ["{}.mul_(0.5)", "{}[:1].add_(1)", "F.relu({}, inplace=True)"]
    line = draft.draw(st.sampled_from(ways if floating else ["{}.clamp_(max=2)"])).format(value)
    draft.state(line, after)
    if draft.draw(st.booleans()):
        draft.outputs.append(value)


def view_of_it(draft: Draft, chain: list[Placed], steps: Sequence[Step], first: str) -> None:
    """A view of a value of the chain is written to, or returned."""
    value = _any_value(draft, chain)
    view = draft.write(
        draft.draw(st.sampled_from(["{}.detach()", "{}[:1]", "{}.view_as({})"])).format(
            value, value
        )
    )
    if draft.draw(st.booleans()) and draft.values[view].is_floating_point():
        draft.lines.append(f"{view}.add_(1)")
    draft.outputs.append(view)


def write_to_a_tensor(draft: Draft, chain: list[Placed], steps: Sequence[Step], first: str) -> None:
    """The forward writes to a buffer of a module of the chain."""
    held = [
        f"self.{each.module}.{name}"
        for each in _called(chain)
        for name, buffer in draft.members[each.module].named_buffers()
        if "." not in name and buffer.is_floating_point()
    ]
    if held:
        line = f"{draft.draw(st.sampled_from(held))}.mul_(0.5)"
        at = draft.draw(st.sampled_from([0, len(draft.lines)]))
        draft.lines.insert(at, line)


def alias(draft: Draft, chain: list[Placed], steps: Sequence[Step], first: str) -> None:
    """A module of the chain has a second name, by which it may be called, too."""
    called = _called(chain)
    if called:
        each = draft.draw(st.sampled_from(called))
        name = draft.member("alias.of", draft.members[each.module])
        if draft.draw(st.booleans()):
            draft.outputs.append(draft.write(f"self.{name}({each.reads})"))


def within_a_container(
    draft: Draft, chain: list[Placed], steps: Sequence[Step], first: str
) -> None:
    """A module of the chain is in a Sequential as well, which may be called, too."""
    called = _called(chain)
    if called:
        start = draft.draw(st.integers(0, len(called) - 1))
        held = [draft.members[each.module] for each in called[start:]]
        name = draft.member("held", nn.Sequential(*held))
        if draft.draw(st.booleans()):
            draft.outputs.append(draft.write(f"self.{name}({called[start].reads})"))


WHILE_WRITING: list[Situation] = [
    second_reader,
    more_steps,
    same_modules_again,
    twice,
    read_of_a_tensor,
    tied,
    write_in_place,
    view_of_it,
    write_to_a_tensor,
    alias,
    within_a_container,
]


# The rest is done to a finished model.


def _one_of(draw: st.DrawFn, model: nn.Module, chain: Chain) -> nn.Module:
    names = ["", *(each.module for each in _called(chain))]
    parents = [name.rpartition(".")[0] for name in names]
    return model.get_submodule(draw(st.sampled_from([*names, *names, *parents])))


def training_mode(draw: st.DrawFn, model: nn.Module, chain: Chain) -> None:
    """The model, or one module of it, is in training mode."""
    _one_of(draw, model, chain).train()


def mixed_training_mode(draw: st.DrawFn, model: nn.Module, chain: Chain) -> None:
    """The model says that it trains, and a module of it does not."""
    model.train()
    _one_of(draw, model, chain).eval()


def hooks(draw: st.DrawFn, model: nn.Module, chain: Chain) -> None:
    """A module carries a hook, which may change what goes in or comes out."""
    module = _one_of(draw, model, chain)
    kind = draw(st.sampled_from(["forward", "pre", "backward"]))
    if kind == "forward":
        module.register_forward_hook(halve_output)
    elif kind == "pre":
        module.register_forward_pre_hook(halve_input)
    else:
        module.register_full_backward_hook(leave_gradient)


def own_forward(draw: st.DrawFn, model: nn.Module, chain: Chain) -> None:
    """A module has a forward set on the instance, or is of a subclass that behaves differently."""
    called = _called(chain)
    if called:
        module = model.get_submodule(draw(st.sampled_from(called)).module)
        kind = type(module)
        plain = module.forward
        if draw(st.booleans()):
            module.forward = lambda x: plain(x) * 0.5
        else:
            methods = draw(st.sampled_from([{"forward": _halved(kind)}, {"extra": 1}]))
            module.__class__ = type(f"My{kind.__name__}", (kind,), methods)


def _halved(kind: type[nn.Module]) -> Any:
    def forward(self: nn.Module, input: torch.Tensor) -> Any:
        return kind.forward(self, input) * 0.5

    return forward


def parametrized(draw: st.DrawFn, model: nn.Module, chain: Chain) -> None:
    """A module's weight is computed from others."""
    called = [model.get_submodule(each.module) for each in _called(chain)]
    weighted = [m for m in called if isinstance(getattr(m, "weight", None), nn.Parameter)]
    deep = [m for m in weighted if m.weight.dim() > 1]  # type: ignore[operator]
    if deep:
        parametrizations.weight_norm(draw(st.sampled_from(deep)))


def odd_numbers(draw: st.DrawFn, model: nn.Module, chain: Chain) -> None:
    """A tensor of the chain holds NaN, an infinity, zeros or huge numbers."""
    called = [model.get_submodule(each.module) for each in _called(chain)]
    tensors = [
        t for m in called for t in m.state_dict().values() if t.is_floating_point() and t.numel()
    ]
    if tensors:
        value = draw(st.sampled_from([0.0, -1.0, 1e300, float("nan"), float("inf")]))
        draw(st.sampled_from(tensors)).flatten()[:1].fill_(value)


AFTERWARDS: list[Callable[[st.DrawFn, nn.Module, Chain], None]] = [
    training_mode,
    mixed_training_mode,
    hooks,
    own_forward,
    parametrized,
    odd_numbers,
]


def halve_output(module: nn.Module, args: Any, output: Any) -> Any:
    """A forward hook that changes the output."""
    if isinstance(output, tuple):
        return tuple(each * 0.5 for each in output)
    return output * 0.5


def halve_input(module: nn.Module, args: Any) -> Any:
    """A forward pre-hook that changes the input, where that is a number of any size."""
    return tuple(
        arg * 0.5 if isinstance(arg, torch.Tensor) and arg.is_floating_point() else arg
        for arg in args
    )


def leave_gradient(module: nn.Module, *gradients: Any) -> None:
    """A backward hook that changes nothing."""
