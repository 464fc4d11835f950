"""What a forward asks while it is traced that a graph can answer only once, and checks for that."""

from __future__ import annotations

import contextlib
import functools
import gc
import inspect
import sys
from collections.abc import Callable, Container, Iterable, Mapping
from types import FrameType
from typing import Any

import attrs
import torch
from torch import fx, nn

from ..module_utils.names import fresh_name
from .assumptions import Assumption, message
from .forward_code import is_of_a_forward, line_of
from .frames import Frames
from .guard_modules import (
    Equal,
    Expectation,
    GradMode,
    LeftOut,
    Mode,
    NotNone,
    NotSame,
    OfType,
)
from .operands import Unclear, evaluate, holds_proxy, lookup, spelt
from .proxies import Proxy
from .questions import Question
from .value_kinds import Kinds

_ABSENT = object()
_TRACE = fx.Tracer.trace.__code__


class Watch:
    """Watches a model's forward while it is traced, as a context, and writes checks into the graph.

    Args:
        tracer: a tracer of our own, about to trace in this thread.
        model: what it traces.
        left_out: arguments that are traced at their default, with the line that asks of each.
        as_of_tensors: whether what is made of the arguments is sure to be made of tensors.
        looks: whether to look at what is asked, which takes as long as the trace.
    """

    def __init__(
        self,
        tracer: fx.Tracer,
        model: nn.Module,
        left_out: Mapping[str, str],
        *,
        as_of_tensors: bool,
        looks: bool,
    ) -> None:
        self.expectations: dict[str, Expectation] = {}
        # Whether a forward asked anything that is decided here, but for its mode.
        self.was_asked = False
        self._tracer, self._model, self._left_out = tracer, model, left_out
        self._kinds = Kinds(model, as_of_tensors=as_of_tensors)
        self._found: dict[tuple[Any, ...], tuple[Assumption, fx.Node | None]] = {}
        self._asking: tuple[FrameType, int] | None = None
        self._globals: dict[tuple[int, str], tuple[dict[str, Any], Any]] = {}
        self._arguments = tracer.create_args_for_root
        tracer.create_args_for_root = self._at_default  # type: ignore[method-assign, assignment]
        self._frames = Frames(tracer, self._on_question) if looks else contextlib.nullcontext()

    @functools.cached_property
    def _ids(self) -> frozenset[int]:
        """The identities of the model's modules."""
        return frozenset(map(id, self._model.modules()))

    def __enter__(self) -> Watch:
        self._tracer.watch = self  # type: ignore[attr-defined]
        self._frames.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._frames.__exit__(None, None, None)
        for (_where, name), (where, value) in self._globals.items():
            if value is _ABSENT:
                where.pop(name, None)
            else:
                where[name] = value
        self._asking = None
        del self._tracer.watch  # type: ignore[attr-defined]

    def assumptions(self, graph: fx.Graph, raised: Iterable[str]) -> tuple[Assumption, ...]:
        """What the graph takes for granted, but not what was asked in modules that raised."""
        if not self._found:
            return ()
        live, gone = set(graph.nodes), tuple(f"{name}." for name in raised)
        whole = {str(node.target) for node in live if node.op == "call_module"}
        found = []
        for each, node in self._found.values():
            if node is None and not f"{each.name}.".startswith(gone):
                found.append(each)
            elif node in live and node is not None and each.check is not None:
                if _is_below(each.check, whole):  # which is the model's own
                    check = self._free_name("")
                    node.target = check
                    self.expectations[check] = self.expectations.pop(each.check)
                    each = attrs.evolve(each, check=check)
                found.append(each)
        return tuple(found)

    def class_for(self, frame: FrameType, node: fx.Node) -> type[Any] | None:
        """The class of a value, for a frame of a forward that is just asking; else None."""
        if self._asking != (frame, frame.f_lasti):
            return None
        return self._kinds.of(node)[0] or torch.Tensor

    def uses_as_key(self, value: fx.Proxy, frame: FrameType) -> None:
        """Note that a value is looked up in a set or a dictionary, where it can't be found."""
        if is_of_a_forward(frame.f_code):
            reason = "it looks a value up in a set or a dictionary"
            self._add(line_of(frame), reason, argument=_argument(value))

    def _at_default(self, fn: Any, is_module: bool, concrete_args: Any = None) -> Any:
        fn, arguments = self._arguments(fn, is_module, concrete_args)
        return fn, [self._default(each) for each in arguments]

    def _default(self, argument: Any) -> Any:
        name = str(argument.node.target) if isinstance(argument, fx.Proxy) else ""
        if name not in self._left_out:
            return argument
        default = argument.node.args[0]
        is_none = default is None
        reason = f"{name} is {default!r}, its default"
        line = self._left_out[name]
        if isinstance(argument.node.type, str):  # for torch.jit, to which None is no tensor
            argument.node.type = _evaluated(type(self._model).forward, name)
        if is_none:
            self._add(line, reason, LeftOut, (argument,), name)
        else:
            self._add(line, reason, lambda text: Equal(text, default), (argument,), name)
        return default

    def _on_question(self, frame: FrameType, question: Question) -> None:
        self._asking = (frame, frame.f_lasti)
        is_outside = question.kind in ("torch", "global", "try")
        named = [lookup(frame, name) for name in question.names]
        if not (is_outside or question.kind == "training" or any(map(holds_proxy, named))):
            return
        self.was_asked |= question.kind != "training"
        if is_outside:
            self._decide_outside(frame, question)
            return
        try:
            self._decide(frame, question)
        except Exception:  # any that user code raises, which is asked for an attribute, say
            arguments = (_argument(each) for each in named if isinstance(each, fx.Proxy))
            argument = next(filter(None, arguments), None)
            self._add(line_of(frame), "it asks what a value is", argument=argument)

    def _decide(self, frame: FrameType, question: Question) -> None:
        if question.operands is None:
            raise Unclear
        values = [evaluate(each, frame, self._tracer.graph) for each in question.operands]
        texts, line = [spelt(each) for each in question.operands], line_of(frame)
        if question.kind == "training":
            self._decide_mode(values[0], line)
        elif question.kind == "is":
            self._decide_identity(values, texts, line)
        elif isinstance(values[0], fx.Proxy):
            if question.kind != "isinstance":
                raise Unclear
            self._decide_type(values[0], values[1], texts, line)

    def _decide_outside(self, frame: FrameType, question: Question) -> None:
        """Note what a forward asks of torch, or sets, that no value of the graph shows."""
        line = line_of(frame)
        if _is_between(frame):
            return
        if question.operands is None:
            if any(map(holds_proxy, frame.f_locals.values())):
                self._add(line, "it catches what is raised there, which a graph does not")
            return
        name = str(question.operands[0][0].value)
        if question.kind == "global":
            where = frame.f_globals
            self._globals.setdefault((id(where), name), (where, where.get(name, _ABSENT)))
            self._add(line, f"it sets the global variable {name}")
        elif name == "is_grad_enabled":
            enabled = torch.is_grad_enabled()
            reason = f"gradients are {'enabled' if enabled else 'disabled'}"
            self._add(line, reason, lambda text: GradMode(text, enabled), self._first_input())
        else:
            self._add(line, f"it asks for {name}() of torch")

    def _first_input(self) -> tuple[Any, ...]:
        first = next(iter(self._tracer.graph.nodes), None)
        is_given = first is not None and first.op == "placeholder"
        return (self._tracer.proxy(first) if first is not None and is_given else None,)

    def _decide_mode(self, module: Any, line: str) -> None:
        if id(module) in self._ids:
            mode = module.training
            reason = f"it is in {'training' if mode else 'eval'} mode"
            self._add(line, reason, lambda text: Mode(text, mode), self._first_input())
        elif isinstance(module, fx.Proxy):
            raise Unclear

    def _decide_identity(self, values: list[Any], texts: list[str], line: str) -> None:
        proxies = [each for each in values if isinstance(each, fx.Proxy)]
        if not proxies or values[0] is values[1]:
            return
        if len(proxies) == 1:
            other = values[0] if proxies[0] is values[1] else values[1]
            if self._kinds.is_never_none(proxies[0].node) and other is None:
                return
            if self._kinds.of(proxies[0].node)[1]:  # nothing that is compared so
                return
            if not isinstance(other, bool | int | float | str | type | torch.dtype | None):
                raise Unclear
        argument = next((name for each in proxies if (name := _argument(each))), None)
        reason = f"{texts[0]} is not {texts[1]}"
        if values[1] is None:
            self._add(line, reason, NotNone, (proxies[0],), argument)
        else:
            self._add(line, reason, NotSame, tuple(values), argument)

    def _decide_type(self, value: fx.Proxy, types: Any, texts: list[str], line: str) -> None:
        many = types if isinstance(types, tuple) else (types,)
        if not isinstance(value, Proxy) or not all(map(_is_importable, many)):
            raise Unclear
        kind, is_sure = self._kinds.of(value.node)
        if kind is None:
            raise Unclear
        answer = issubclass(kind, types)
        if issubclass(Proxy, types) and not answer:  # it is told that this is one
            raise Unclear
        if value.node.op == "get_attr" and issubclass(nn.Parameter, types) is not answer:
            raise Unclear
        if is_sure:
            return
        argument = _argument(value)
        reason = f"{texts[0]} is {'' if answer else 'not '}of type {texts[1]}"
        self._add(line, reason, lambda text: OfType(text, types, answer), (value,), argument)

    def _free_name(self, name: str) -> str:
        """A qualified name for a check of the module of that name."""
        return fresh_name(f"{name}.expect".lstrip("."), _Taken(self._model, self.expectations))

    def _add(
        self,
        line: str,
        reason: str,
        how: Callable[[str], Expectation] | None = None,
        given: tuple[Any, ...] = (),
        argument: str | None = None,
    ) -> None:
        """Note an assumption once, with a step that checks it if there can be one."""
        name = next(reversed([path for path, _ in self._tracer.module_stack.values()]), "")
        kind = type(self._model.get_submodule(name)).__name__
        nodes = tuple(each.node if isinstance(each, fx.Proxy) else id(each) for each in given)
        key = (name, line, reason, *nodes)
        if key in self._found:
            return
        check, node, is_mode = None, None, False
        if how is not None:
            expectation = how(message(kind, reason, line))
            is_mode = isinstance(expectation, Mode)
            check = fresh_name(f"{name}.expect".lstrip("."), _Taken(self._model, self.expectations))
            self.expectations[check] = expectation
            node = self._tracer.create_proxy("call_module", check, given, {}).node
        assumption = Assumption(name, kind, line, reason, argument, check, is_mode)
        self._found[key] = assumption, node


def _is_between(frame: FrameType | None) -> bool:
    """Whether Python imports a module meanwhile, or tells of garbage that it collects."""
    codes = {getattr(each, "__code__", None) for each in gc.callbacks}
    while frame is not None and frame.f_code is not _TRACE:
        code = frame.f_code
        if code in codes or code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _is_below(name: str, others: Container[str]) -> bool:
    """Whether a qualified name is inside one of some others."""
    while (name := name.rpartition(".")[0]) != "":
        if name in others:
            return True
    return False


class _Taken:
    """The qualified names that a model has, or that checks have."""

    def __init__(self, model: nn.Module, checks: Container[str]) -> None:
        self._model, self._checks = model, checks

    def __contains__(self, name: object) -> bool:
        owner, _, attribute = str(name).rpartition(".")
        return name in self._checks or hasattr(self._model.get_submodule(owner), attribute)


def _evaluated(function: Any, argument: str) -> Any:
    """The annotation of an argument, which is written as a string; None where it can't be told."""
    try:
        return inspect.get_annotations(function, eval_str=True).get(argument)
    except Exception:  # whatever evaluating it raises
        return None


def _argument(value: fx.Proxy) -> str | None:
    """The argument of the model that a value is, if it is one by itself."""
    node = value.node
    is_one = node.op == "placeholder" and not str(node.target).startswith("*")
    return str(node.target) if is_one else None


def _is_importable(kind: Any) -> bool:
    """Whether a graph that names a type can be pickled."""
    found = sys.modules.get(getattr(kind, "__module__", ""))
    return isinstance(kind, type) and getattr(found, kind.__qualname__, None) is kind
