"""Models that are written as lines of code: members by qualified name, and a forward in source."""

from __future__ import annotations

import itertools
import linecache
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import nn
from torch.nn import functional as F

from fxrewrite.module_utils.hooks import has_hooks
from fxrewrite.module_utils.torch_private import OpOverload, OpOverloadPacket

_count = itertools.count()
_NAMESPACE = {"torch": torch, "nn": nn, "F": F, "operator": operator}


class Written(nn.Module):
    """The base of what `written` makes; its code is part of how it prints."""

    code = ""

    def extra_repr(self) -> str:
        """The forward, as source."""
        return self.code


@attrs.frozen
class Case:
    """A model, and the arguments to call it with; it prints as what one needs to make it again."""

    model: nn.Module
    args: tuple[Any, ...]

    def __repr__(self) -> str:
        """The model with its code, and the shapes of the arguments."""
        called = f"called with {', '.join(map(_shown, self.args))}"
        return "\n".join([code_of(self.model), *_unusual(self.model), called])


def written(
    members: Mapping[str, Any],
    lines: Sequence[str],
    inputs: str = "x",
    functions: Mapping[str, Any] | None = None,
) -> nn.Module:
    """A model of these members whose forward is these lines of Python.

    >>> model = written({"conv": nn.Conv2d(3, 4, 1)}, ["y = self.conv(x)", "return F.relu(y)"])
    >>> model(torch.zeros(1, 3, 2, 2)).shape
    torch.Size([1, 4, 2, 2])

    Args:
        members: modules, parameters and other attributes by qualified name; containers on the way
            are made where there are none.
        lines: the body of the forward; it sees `self`, the inputs, `torch`, `nn`, `F`, `operator`.
        inputs: the forward's parameters, as they are written.
        functions: further functions, or modules of Python, by the name that the lines have for
            them; tracing keeps such a function as one node.
    """
    wrapped = [f"torch.fx.wrap({k!r})" for k, each in (functions or {}).items() if callable(each)]
    body = "".join(f"    {line}\n" for line in lines)
    code = f"def forward(self, {inputs}):\n{body}"
    namespace = {**_NAMESPACE, **(functions or {})}
    compiled(code, namespace, wrapped)
    made: nn.Module = type(
        "Model", (Written,), {"forward": namespace["forward"], "code": code.rstrip()}
    )()
    for name, member in members.items():
        put(made, name, member)
    return made.eval()


def compiled(code: str, namespace: dict[str, Any], before: Sequence[str] = ()) -> None:
    """Run lines of code in a namespace, such that the source of its functions can be read."""
    filename = f"<written {next(_count)}>"
    text = "\n".join([*before, code])
    linecache.cache[filename] = (len(text), None, text.splitlines(keepends=True), filename)
    exec(compile(text, filename, "exec"), namespace)


def put(root: nn.Module, name: str, member: Any) -> None:
    """Give a model a member of this qualified name; containers on the way are made."""
    *path, last = name.split(".")
    for part in path:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    setattr(root, last, member)


def evaluated(expression: str, root: nn.Module, known: Mapping[str, Any]) -> Any:
    """What an expression of a forward gives, by the names known so far."""
    with torch.no_grad():
        return eval(expression, {**_NAMESPACE, **known, "self": root})


def spelling(function: Any) -> tuple[str, dict[str, Any]]:
    """How lines call a function, and what has to be given to `written` for that."""
    name = getattr(function, "__name__", "")
    for prefix, module in (("torch", torch), ("F", F), ("operator", operator)):
        if getattr(module, name, None) is function:
            return f"{prefix}.{name}", {}
    if isinstance(function, OpOverload | OpOverloadPacket):
        return f"torch.ops.{str(function).replace('::', '.')}", {}
    return name, {name: function}


def code_of(model: nn.Module) -> str:
    """A model as a message shows it: its members, and its code where it has some."""
    code = getattr(model, "code", "")
    shown = repr(model)
    return shown if not code or isinstance(model, Written) else f"{shown}\n{code.strip()}"


def _unusual(model: nn.Module) -> list[str]:
    """What a module's own text does not show: its mode, its hooks, a forward of its own."""
    said = []
    for name, module in model.named_modules():
        found = ["in training mode"] if module.training else []
        hook = has_hooks(module)
        found += [f"with {hook}"] if hook else []
        found += ["with a forward of its own"] if "forward" in vars(module) else []
        if found:
            said.append(f"{name or 'the model itself'} is {' and '.join(found)}")
    return said


def _shown(argument: Any) -> str:
    if isinstance(argument, torch.Tensor):
        return f"a tensor {tuple(argument.shape)} of {str(argument.dtype).removeprefix('torch.')}"
    return repr(argument)
