"""A model under construction: each line is run as it is written, so shapes are always known."""

from __future__ import annotations

import inspect
from collections import deque
from typing import Any

import attrs
import torch
from hypothesis import reject
from hypothesis import strategies as st
from torch import nn

from fxrewrite.ir.arguments import _signatures
from fxrewrite.rules.spec import Step

from .layers import Shape, kinds_of, maker_of, modules, ranks_of
from .tensors import random_tensor
from .written import evaluated, put, spelling, written

# What torch refused lately, for the message where it refuses nearly all.
REFUSALS: deque[str] = deque(maxlen=3)


@attrs.frozen
class Placed:
    """A step of a chain in a draft: the values it reads and makes, and the name of the
    module that it calls, empty where it calls none.
    """

    step: Step
    reads: str
    makes: str
    module: str


class Draft:
    """Members, lines and values of a model that is being drawn.

    A line that torch refuses ends the drawing: hypothesis then tries another example.
    """

    def __init__(self, draw: st.DrawFn) -> None:
        self.draw = draw
        self.members: dict[str, Any] = {}
        self.lines: list[str] = []
        self.inputs: dict[str, torch.Tensor] = {}
        self.values: dict[str, Any] = {}
        self.outputs: list[str] = []
        self.functions: dict[str, Any] = {}
        self._root = nn.Module()

    def input(self, shape: Shape, *, indices: bool = False) -> str:
        """A further input of the model, by name."""
        name = f"x{len(self.inputs)}"
        seed = self.draw(st.integers(0, 3))
        value = random_tensor(shape, seed)
        if indices:
            value = (value.abs() * 2).long().clamp(0, 3)
        self.inputs[name] = self.values[name] = value
        return name

    def member(self, base: str, value: Any) -> str:
        """Add a member under this name, or one like it; gives the name."""
        name, count = base, 1
        while name in self.members or name in self._root._modules:
            count += 1
            name = f"{base}{count}"
        self.members[name] = value.double().eval() if isinstance(value, nn.Module) else value
        put(self._root, name, self.members[name])
        return name

    def write(self, expression: str) -> str:
        """A line that gives the value of an expression a name; gives the name."""
        name = f"v{len(self.values)}"
        try:
            known = {**self.functions, **self.values}
            self.values[name] = evaluated(expression, self._root, known)
        except Exception as error:
            REFUSALS.append(f"{expression}: {error}")
            reject()
        if not isinstance(self.values[name], torch.Tensor):  # x.type() is the type's name
            REFUSALS.append(f"{expression} is no tensor")
            reject()
        self.lines.append(f"{name} = {expression}")
        return name

    def state(self, line: str, after: str) -> None:
        """A line that makes no value, right after the one that makes `after`."""
        at = [i for i, each in enumerate(self.lines) if each.startswith(f"{after} = ")]
        self.lines.insert(at[0] + 1 if at else 0, line)

    def shape(self, value: str) -> Shape:
        """The shape of a value."""
        return tuple(self.values[value].shape)

    def model(self) -> tuple[nn.Module, tuple[Any, ...]]:
        """The model and the arguments to call it with."""
        returned = ", ".join(dict.fromkeys(self.outputs))
        lines = [*self.lines, f"return {returned}"]
        inputs = ", ".join(self.inputs)
        return written(self.members, lines, inputs, self.functions), tuple(self.inputs.values())

    def spelt(self, function: Any) -> str:
        """How the lines call a function."""
        name, needed = spelling(function)
        self.functions.update(needed)
        return name


def place(draft: Draft, step: Step, value: str, prefix: str = "") -> Placed:
    """Write a call that is this step, reading a value."""
    targets = [k for declared in step.modules for k in kinds_of(declared)]
    rank = len(draft.shape(value))
    fitting = [kind for kind in targets if rank in ranks_of(kind)] or targets
    target = draft.draw(st.sampled_from([*fitting, *step.functions, *step.methods]))
    if target in targets:
        try:
            made = draft.draw(modules(target, draft.shape(value)))
        except (IndexError, ValueError):  # it would take its channels from what is not there
            REFUSALS.append(f"a {target.__name__} for a value of {rank} dimensions")
            reject()
        name = draft.member(prefix + step.name, made)
        how = draft.draw(st.sampled_from(["", "", "", "input="]))
        if how and next(iter(inspect.signature(target.forward).parameters.items()))[0] != "input":
            how = ""
        return Placed(step, value, draft.write(f"self.{name}({how}{value})"), name)
    maker = maker_of(target)
    if maker is not None:
        given = {k: repr(v) for k, v in draft.draw(maker.draw(draft.shape(value))).items()}
        others: list[str] = []
    else:
        others, given = _arguments(draft, step, target, value)
    at = 0 if step.chain in (None, "input") else min(1, len(others))
    if step.chain is None and others and draft.draw(st.booleans()):
        at = 1
    order = [*others[:at], value, *others[at:]]
    by_name = [f"{name}={shown}" for name, shown in given.items()]
    if isinstance(target, str):
        call = f"{order[0]}.{target}({', '.join([*order[1:], *by_name])})"
        if order[0][0].isdigit() or order[0][0] == "-":
            call = f"{value}.{target}({', '.join([*others, *by_name])})"
    else:
        call = f"{draft.spelt(target)}({', '.join([*order, *by_name])})"
    return Placed(step, value, draft.write(call), "")


def join(draft: Draft, step: Step, values: list[str]) -> Placed:
    """Write the call that joins the ends of branches."""
    target = draft.draw(st.sampled_from([*step.functions, *step.methods, *step.modules]))
    # The second argument may be named first, as the branches of `other - input` would be.
    order = values[::-1] if isinstance(step.chain, tuple) and step.chain[0] != "input" else values
    module = ""
    if isinstance(target, str):
        call = f"{order[0]}.{target}({', '.join(order[1:])})"
    elif target in step.modules:
        module = draft.member(step.name, draft.draw(modules(target, draft.shape(values[0]))))
        call = f"self.{module}({', '.join(order)})"
    else:
        call = f"{draft.spelt(target)}({', '.join(order)})"
    return Placed(step, values[0], draft.write(call), module)


def _arguments(
    draft: Draft, step: Step, target: Any, value: str
) -> tuple[list[str], dict[str, str]]:
    """The other operands of a call, and options by name; as its signature has them."""
    signatures = _signatures(target)
    if not signatures:
        return [], {}
    # Of overloads, the one with the fewest operands that are tensors will do.
    signature = signatures[0]
    operands: list[str] = []
    options: dict[str, str] = {}
    for parameter in list(signature.parameters.values())[1:]:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        default = parameter.default
        has_options = getattr(target, "__module__", None) != "_operator"
        if default is parameter.empty:
            is_tensor = parameter.annotation in (torch.Tensor, parameter.empty)
            operands.append(operand(draft, value) if is_tensor else draft.draw(_NUMBERS))
        elif has_options and type(default) in _OPTIONS and draft.draw(st.integers(0, 5)) == 0:
            options[parameter.name] = repr(draft.draw(_OPTIONS[type(default)]))
    return operands, options


_NUMBERS = st.sampled_from(["2", "1", "0.5", "-1"])
_OPTIONS: dict[type, st.SearchStrategy[Any]] = {
    bool: st.booleans(),
    int: st.sampled_from([1, 2, -1]),
    float: st.sampled_from([0.5, 2.0, -0.5]),
}


def operand(draft: Draft, value: str) -> str:
    """Something to combine a value with: another input, a parameter, a number, or itself."""
    shape = draft.shape(value)
    kind = draft.draw(
        st.sampled_from(["input", "channel", "last", "number", "whole", "other", "itself"])
    )
    if kind == "number":
        return draft.draw(_NUMBERS)
    if kind == "input":
        return draft.input(shape)
    if kind == "itself":
        return value
    if kind == "other":
        same = [name for name in draft.values if _shape(draft.values[name]) == shape]
        return draft.draw(st.sampled_from(same))
    sizes: Shape = shape
    if kind == "channel":
        sizes = (shape[1], *[1] * (len(shape) - 2)) if len(shape) > 1 else shape
    elif kind == "last":
        sizes = shape[-1:]
    name = draft.member("scale", nn.Parameter(random_tensor(sizes, draft.draw(st.integers(0, 3)))))
    return f"self.{name}"


def _shape(value: Any) -> Shape | None:
    return tuple(value.shape) if isinstance(value, torch.Tensor) else None
