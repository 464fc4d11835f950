"""How a pattern is declared: a class whose fields, in order, are the steps of a chain."""

from __future__ import annotations

import inspect
import keyword
import sys
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, overload

import attrs
import torch
from torch import fx, nn
from typing_extensions import dataclass_transform

from .errors import PatternError

T = TypeVar("T")


@attrs.frozen(eq=False)
class Value:
    """A value of the graph: what a chain reads or makes, or another argument of a step.

    Shape, rank and dtype are known where the rewrite was given example inputs, or the graph has
    recorded them; otherwise they are None. Where data decides a size, the shape is None and the
    rank is known all the same.
    """

    name: str
    shape: tuple[int, ...] | None = None
    dtype: torch.dtype | None = None
    rank: int | None = None
    node: fx.Node | None = attrs.field(default=None, repr=False)


class Call:
    """A function and its arguments: seen, as a captured step, or to be made, as an action.

    Captured by a `call(...)` step, `function` is what the graph calls (a module, a function, or
    a method's name) and `kwargs` holds its arguments by name, without the chain's own value,
    which came in by the argument `takes`. A parameter of the model stands there as its tensor,
    another value of the graph as a `Value`.

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
        self.takes: str | None = None
        self.node: fx.Node | None = None

    @classmethod
    def captured(
        cls, function: Any, kwargs: dict[str, Any], takes: str, node: fx.Node | None = None
    ) -> Call:
        """What the engine puts into a match, and a test may too: `takes` is the chain's way in."""
        call = cls(function)
        # It stands for a call that is there, so it can't be given other arguments.
        call.kwargs = types.MappingProxyType(kwargs)
        call.takes, call.node = takes, node
        return call

    def __repr__(self) -> str:
        """The call as it would be written."""
        given = [*map(repr, self.args), *(f"{k}={v!r}" for k, v in self.kwargs.items())]
        return (
            f"Call({', '.join([getattr(self.function, '__name__', repr(self.function)), *given])})"
        )


@attrs.frozen
class Step:
    """One step of a chain: the module types, functions and methods that a node may call."""

    name: str
    modules: tuple[type[nn.Module], ...] = ()
    functions: tuple[Callable[..., Any], ...] = ()
    methods: tuple[str, ...] = ()
    optional: bool = False
    repeats: bool = False
    captures_call: bool = False
    chain: str | None = None
    side_inputs: bool = True

    def __str__(self) -> str:
        """The alternatives as a reader would list them: `Conv1d, Conv2d or Conv3d`."""
        names = [t.__name__ for t in self.modules]
        names += [f"{getattr(f, '__name__', f)}()" for f in self.functions]
        names += [f".{m}()" for m in self.methods]
        return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"


@attrs.frozen
class Pattern:
    """A declared chain: its steps in data order, and the one that is looked for first.

    `values` names fields that capture a value, each with the index of the step that follows it.
    """

    cls: type[Any]
    steps: tuple[Step, ...]
    anchor: int
    values: tuple[tuple[str, int], ...] = ()

    @property
    def name(self) -> str:
        """The name of the class that declares it."""
        return self.cls.__name__

    def __str__(self) -> str:
        """The chain in one line; `?` may be absent, `*` any number of times."""
        marks = ("*" if s.repeats else "?" if s.optional else "" for s in self.steps)
        return " -> ".join(f"{s.name}{mark}" for s, mark in zip(self.steps, marks, strict=True))


@attrs.frozen
class _CallTargets:
    targets: tuple[Any, ...]
    chain: str | None
    side_inputs: bool


def call(
    *targets: type[nn.Module] | Callable[..., Any] | str,
    chain: str | None = None,
    side_inputs: bool = True,
) -> Any:
    """Declare a step that is a call of any of these module types, functions or method names.

    The field's type is `Call` (or `Call | None` for a step that may be absent).

    >>> import torch
    >>> @pattern
    ... class LinearRelu:
    ...     linear: nn.Linear
    ...     act: Call = call(nn.ReLU, torch.relu, "relu")

    Args:
        targets: module types, functions, and names of tensor methods.
        chain: the argument by which the chain's value enters, as the function names it (torch's
            `self` is called `input`). Without it each argument that is a value of the graph is
            tried in order, so that `add` matches on either side; the others are side inputs.
        side_inputs: whether the call may read other values than the chain's. Without, its other
            arguments are constants: plain values, the model's own tensors, and what is computed
            from those alone. A call that reads more is then not this step, and no anchor.
    """
    if not targets:
        raise PatternError("call() needs at least one module type, function or method name")
    return _CallTargets(targets, chain, side_inputs)


def chain(anchor: str | None = None, /, **steps: Any) -> type[Any]:
    """Declare a pattern without a class statement: each keyword is a step, in chain order.

    >>> ConvBn = chain(conv=nn.Conv2d, bn=nn.BatchNorm2d)
    >>> print(pattern_of(ConvBn))
    conv -> bn

    Args:
        anchor: the step to look for first, as in `pattern`.
        steps: by name, what would be the field's annotation, or a `call(...)`.
    """
    annotations = {k: Call if isinstance(v, _CallTargets) else v for k, v in steps.items()}
    calls = {k: v for k, v in steps.items() if isinstance(v, _CallTargets)}
    name = "".join(part.title() for step in steps for part in step.split("_")) or "Empty"
    namespace = {"__annotations__": annotations, "__module__": __name__, **calls}
    return _declare(type(name, (), namespace), anchor, {})


@overload
def pattern(cls: type[T], /) -> type[T]: ...
@overload
def pattern(*, anchor: str) -> Callable[[type[T]], type[T]]: ...
@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(call,))
def pattern(cls: type[Any] | None = None, /, *, anchor: str | None = None) -> Any:
    """Make a class a pattern: its fields, in order, are a chain's steps; an instance is a match.

    The annotation says what the step may be: a module type, alternatives (`A | B`), a step that
    may be absent (`A | None`) or come any number of times (`tuple[A | B, ...]`), or a `Call`.
    A field of type `Value` is no step; it captures the value that flows where it stands.

    >>> @pattern
    ... class ConvBn:
    ...     conv: nn.Conv1d | nn.Conv2d
    ...     drop: tuple[nn.Dropout | nn.Identity, ...]
    ...     bn: nn.BatchNorm1d | nn.BatchNorm2d
    >>> ConvBn(conv=nn.Conv2d(3, 8, 1), bn=nn.BatchNorm2d(8)).drop
    ()

    Args:
        cls: the class; attrs makes it frozen and slotted, its fields keyword-only.
        anchor: the step that is looked for first and that reports are about; by default the last
            step that is always present.

    Raises:
        PatternError: a field is not a step, or no step is always present.
    """
    caller = sys._getframe(1).f_locals

    def declare(cls: type[Any]) -> type[Any]:
        return _declare(cls, anchor, caller)

    return declare if cls is None else declare(cls)


def pattern_of(cls: type[Any]) -> Pattern:
    """The steps that a pattern class declares; raises PatternError for any other class."""
    declared = getattr(cls, "__fxrewrite_pattern__", None)
    if not isinstance(declared, Pattern):
        raise PatternError(f"{cls!r} is not a pattern; declare it with @fxrewrite.pattern")
    return declared


def annotations_of(declared: Any, local_names: dict[str, Any]) -> dict[str, Any]:
    """The annotations of a class or function, also where they name what is local to a caller."""
    try:
        return typing.get_type_hints(declared, localns=local_names)
    except NameError as error:
        raise PatternError(
            f"{declared.__qualname__}: the annotation names {error.name!r}, which is not defined "
            "here; import it, or declare the pattern where that name is visible"
        ) from error


def source_of(declared: Any) -> str:
    """Where a function or class is declared, as `file:line`; empty where that is not known."""
    try:
        return f"{inspect.getsourcefile(declared)}:{inspect.getsourcelines(declared)[1]}"
    except (OSError, TypeError):
        return ""


def _declare(cls: type[Any], anchor: str | None, local_names: dict[str, Any]) -> type[Any]:
    hints = annotations_of(cls, local_names)
    for name in hints:
        if not name.isidentifier() or keyword.iskeyword(name) or name == "self":
            raise PatternError(f"{cls.__name__}: no step can be named {name!r}")
    inherited = {step.name: step for base in cls.__mro__[:0:-1] for step in _steps_of(base)}
    own = inspect.get_annotations(cls)
    steps = tuple(
        _step(cls, name, hint, cls.__dict__.get(name))
        if name in own or name not in inherited
        else inherited[name]
        for name, hint in hints.items()
        if hint is not Value
    )
    required = [i for i, step in enumerate(steps) if not step.optional]
    if not required:
        raise PatternError(f"{cls.__name__}: at least one step must not be optional")
    index = {step.name: i for i, step in enumerate(steps)}
    if anchor is not None and index.get(anchor) not in required:
        always = ", ".join(steps[i].name for i in required)
        raise PatternError(f"{cls.__name__}: anchor={anchor!r} is none of its steps {always}")
    # attrs would strip the underscore of a private name from the constructor's argument.
    fields = {name: attrs.field(alias=name) for name in hints}
    for step in steps:
        if step.optional:
            default = () if step.repeats else None
            fields[step.name] = attrs.field(default=default, alias=step.name)
    made = attrs.define(cls, these=fields, frozen=True, slots=True, kw_only=True, eq=False)
    at = required[-1] if anchor is None else index[anchor]
    names = list(hints)
    values = tuple(
        (name, sum(hints[earlier] is not Value for earlier in names[: names.index(name)]))
        for name in names
        if hints[name] is Value
    )
    made.__fxrewrite_pattern__ = Pattern(made, steps, at, values)
    return made


def _steps_of(cls: type[Any]) -> tuple[Step, ...]:
    declared = cls.__dict__.get("__fxrewrite_pattern__")
    return declared.steps if isinstance(declared, Pattern) else ()


def _step(cls: type[Any], name: str, hint: Any, default: Any) -> Step:
    where = f"{cls.__name__}.{name}"
    repeats = typing.get_origin(hint) is tuple
    if repeats:
        if len(typing.get_args(hint)) != 2 or typing.get_args(hint)[1] is not Ellipsis:
            raise PatternError(f"{where}: write tuple[A, ...] for any number of steps")
        hint = typing.get_args(hint)[0]
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    kinds = typing.get_args(hint) if union else (hint,)
    optional = repeats or type(None) in kinds
    kinds = tuple(kind for kind in kinds if kind is not type(None))
    if isinstance(default, _CallTargets):
        if kinds != (Call,):
            raise PatternError(f"{where}: a step given by call(...) is annotated as Call")
        modules, functions, methods = _sorted_targets(where, default.targets)
        return Step(
            name,
            modules,
            functions,
            methods,
            optional,
            repeats,
            captures_call=True,
            chain=default.chain,
            side_inputs=default.side_inputs,
        )
    if default is not None or Call in kinds:
        raise PatternError(f"{where}: a Call step is declared as `{name}: Call = call(...)`")
    wrong = [kind for kind in kinds if not _is_module_type(kind)]
    if wrong or not kinds:
        found = wrong[0] if wrong else hint
        raise PatternError(f"{where}: expected a subclass of nn.Module, found {found!r}")
    return Step(name, kinds, optional=optional, repeats=repeats)


def _sorted_targets(where: str, targets: tuple[Any, ...]) -> tuple[Any, Any, Any]:
    modules = tuple(t for t in targets if _is_module_type(t))
    methods = tuple(t for t in targets if isinstance(t, str))
    functions = tuple(t for t in targets if t not in modules and t not in methods)
    for function in functions:
        if not callable(function) or isinstance(function, type | nn.Module):
            raise PatternError(
                f"{where}: call() takes module types, functions and method names, not {function!r}"
            )
    return modules, functions, methods


def _is_module_type(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, nn.Module)
