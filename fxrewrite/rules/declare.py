"""How a pattern is declared: a class whose fields, in order, are the steps of a chain."""

from __future__ import annotations

import inspect
import keyword
import sys
import types
import typing
from collections.abc import Callable
from typing import Any, TypeVar, overload

import attrs
from torch import nn
from typing_extensions import dataclass_transform

from ..errors import PatternError
from .actions import Call
from .spec import Branch, Pattern, Step
from .values import Alike, Siblings, Value

T = TypeVar("T")


def call(
    *targets: type[nn.Module] | Callable[..., Any] | str,
    chain: str | tuple[str, ...] | None = None,
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
            tried in order, so that `add` matches on either side; the others are side inputs. For a
            step that joins branches, one argument per branch; without it the branches come in as
            the arguments are ordered, or in any order where the operation is commutative.
        side_inputs: whether the call may read other values than the chain's. Without, its other
            arguments are constants: plain values, the model's own tensors, and what is computed
            from those alone. A call that reads more is then not this step, and no anchor.
    """
    if not targets:
        raise PatternError("call() needs at least one module type, function or method name")
    modules: tuple[Any, ...] = tuple(each for each in targets if _is_module_type(each))
    methods = tuple(each for each in targets if isinstance(each, str))
    functions: tuple[Any, ...] = tuple(t for t in targets if t not in (*modules, *methods))
    for each in functions:
        if not callable(each) or isinstance(each, type | nn.Module):
            raise PatternError(
                f"call() takes module types, functions and method names, not {each!r}"
            )
    return Step(
        "", modules, functions, methods, captures_call=True, chain=chain, side_inputs=side_inputs
    )


def siblings(*, dim: int, keeps_sizes: bool = False, alike: Alike | None = None) -> Any:
    """Declare a group of calls that read one value; the field's type is `Siblings[...]`.

    Of such a group one call can be made, which gives the values of all side by side.

    >>> @pattern
    ... class SameWidth:
    ...     linears: Siblings[nn.Linear] = siblings(
    ...         dim=-1, alike=lambda linear: {"width": linear.out_features}
    ...     )

    Args:
        dim: the dimension along which the outputs of siblings can stand side by side.
        keeps_sizes: whether in all other dimensions an output has the size of what was read.
        alike: what siblings must have in common, by names that a reason can give. Of calls that
            read one value, those whose modules give the same are siblings, so one value may have
            several groups. It must change nothing that it is given.
    """
    return Step("", siblings=True, dim=dim, keeps_sizes=keeps_sizes, alike=alike)


def chain(anchor: str | None = None, /, **steps: Any) -> type[Any]:
    """Declare a pattern without a class statement: each keyword is a step, in chain order.

    >>> ConvBn = chain(conv=nn.Conv2d, bn=nn.BatchNorm2d)
    >>> print(pattern_of(ConvBn))
    conv -> bn

    Args:
        anchor: the step to look for first, as in `pattern`.
        steps: by name, what would be the field's annotation, or a `call(...)`.
    """
    annotations = {k: Call if isinstance(v, Step) else v for k, v in steps.items()}
    calls = {k: v for k, v in steps.items() if isinstance(v, Step)}
    name = "".join(part.title() for step in steps for part in step.split("_")) or "Empty"
    namespace = {"__annotations__": annotations, "__module__": __name__, **calls}
    return _declare(type(name, (), namespace), anchor, {})


@overload
def pattern(cls: type[T], /) -> type[T]: ...
@overload
def pattern(*, anchor: str) -> Callable[[type[T]], type[T]]: ...
@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(call, siblings))
def pattern(cls: type[Any] | None = None, /, *, anchor: str | None = None) -> Any:
    """Make a class a pattern: its fields, in order, are a chain's steps; an instance is a match.

    The annotation says what the step may be: a module type, alternatives (`A | B`), a step that
    may be absent (`A | None`) or come any number of times (`tuple[A | B, ...]`), or a `Call`.
    A field of type `Value` is no step; it captures the value that flows where it stands. A match
    that is made by hand may leave it out: nothing is known of it then.
    A field whose type is another pattern is a branch: branches come first, all start from one
    value, and the first step, a `Call`, joins them. A branch that may be absent (`P | None`) is
    then the shared value itself. A field of type `Siblings[A]` is a group of calls that read one
    value, and the only step of its pattern.

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
    patterns = [base.__dict__.get("__fxrewrite_pattern__") for base in cls.__mro__[:0:-1]]
    inherited = {step.name: step for each in patterns if each for step in each.steps}
    own = inspect.get_annotations(cls)
    branches = tuple(b for name, hint in hints.items() if (b := _branch(name, hint)) is not None)
    no_steps = {branch.name for branch in branches}
    no_steps.update(name for name, hint in hints.items() if hint is Value)
    steps = tuple(
        _step(cls, name, hint, cls.__dict__.get(name))
        if name in own or name not in inherited
        else inherited[name]
        for name, hint in hints.items()
        if name not in no_steps
    )
    if branches:
        _check_branches(cls.__name__, branches, steps, list(hints))
    if any(step.siblings for step in steps) and (branches or len(steps) > 1):
        raise PatternError(f"{cls.__name__}: a group of siblings is the only step of its pattern")
    for step in steps[1:] if branches else steps:
        if isinstance(step.chain, tuple):
            raise PatternError(f"{cls.__name__}.{step.name}: it joins nothing, so chain= is a name")
    required = [i for i, step in enumerate(steps) if not step.optional]
    if not required:
        raise PatternError(f"{cls.__name__}: at least one step must not be optional")
    index = {step.name: i for i, step in enumerate(steps)}
    if anchor is not None and index.get(anchor) not in required:
        always = ", ".join(steps[i].name for i in required)
        raise PatternError(f"{cls.__name__}: anchor={anchor!r} is none of its steps {always}")
    # attrs would strip the underscore of a private name from the constructor's argument.
    fields = {name: attrs.field(alias=name) for name in hints}
    absent: dict[str, Any] = {b.name: None for b in branches if b.optional}
    absent.update({name: Value(name) for name, hint in hints.items() if hint is Value})
    absent.update({s.name: () if s.repeats else None for s in steps if s.optional})
    for name, default in absent.items():
        fields[name] = attrs.field(default=default, alias=name)
    made = attrs.define(cls, these=fields, frozen=True, slots=True, kw_only=True, eq=False)
    at = required[-1] if anchor is None else index[anchor]
    names = list(hints)
    values = tuple(
        (name, sum(earlier not in no_steps for earlier in names[: names.index(name)]))
        for name in names
        if hints[name] is Value
    )
    if steps[0].siblings and any(index for _, index in values):
        raise PatternError(f"{cls.__name__}: a value stands before the siblings that read it")
    made.__fxrewrite_pattern__ = Pattern(made, steps, at, values, branches)
    return made


def _branch(name: str, hint: Any) -> Branch | None:
    """The branch that an annotation declares; None where it declares something else."""
    kinds = typing.get_args(hint) if _is_union(hint) else (hint,)
    plain = [kind for kind in kinds if kind is not type(None)]
    if len(plain) != 1 or not isinstance(plain[0], type):
        return None
    declared = getattr(plain[0], "__fxrewrite_pattern__", None)
    return Branch(name, declared, len(kinds) > 1) if isinstance(declared, Pattern) else None


def _check_branches(
    where: str, branches: tuple[Branch, ...], steps: tuple[Step, ...], names: list[str]
) -> None:
    join, wrong = next(iter(steps), None), ""
    if join is None or not join.captures_call or join.optional:
        wrong = (
            "after its branches there must be a step that joins them, declared as "
            "`name: Call = call(...)`"
        )
    elif names.index(join.name) != 1 + max(names.index(branch.name) for branch in branches):
        wrong = (
            f"branches come before all steps, and the step {join.name!r} right after them joins "
            "them"
        )
    elif len(branches) < 2 or all(branch.optional for branch in branches):
        wrong = f"{join.name!r} needs two branches to join, and one that is not empty"
    elif join.chain is not None and (
        not isinstance(join.chain, tuple) or len(join.chain) != len(branches)
    ):
        wrong = f"chain= of {join.name!r} must name one argument for each branch"
    if wrong:
        raise PatternError(f"{where}: {wrong}")


def _step(cls: type[Any], name: str, hint: Any, declared: Any) -> Step:
    """The step that a field's annotation declares, with what `call()` or `siblings()` say of it."""
    where, origin = f"{cls.__name__}.{name}", typing.get_origin(hint)
    repeats = origin is tuple
    if repeats and (len(typing.get_args(hint)) != 2 or typing.get_args(hint)[1] is not Ellipsis):
        raise PatternError(f"{where}: write tuple[A, ...] for any number of steps")
    if repeats or origin is Siblings:
        hint = typing.get_args(hint)[0]
    kinds = typing.get_args(hint) if _is_union(hint) else (hint,)
    optional = repeats or type(None) in kinds
    kinds = tuple(kind for kind in kinds if kind is not type(None))
    step = declared if isinstance(declared, Step) else Step("")
    if step.siblings is not (origin is Siblings):
        raise PatternError(f"{where}: a group is declared `{name}: Siblings[A] = siblings(...)`")
    if step.captures_call is not (kinds == (Call,)) or (
        declared is not None and step is not declared
    ):
        raise PatternError(f"{where}: a Call step is declared as `{name}: Call = call(...)`")
    if step.captures_call:
        return attrs.evolve(step, name=name, optional=optional, repeats=repeats)
    wrong = [kind for kind in kinds if not _is_module_type(kind)]
    if wrong or not kinds:
        found = wrong[0] if wrong else hint
        raise PatternError(f"{where}: expected a subclass of nn.Module, found {found!r}")
    return attrs.evolve(step, name=name, modules=kinds, optional=optional, repeats=repeats)


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _is_module_type(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, nn.Module)
