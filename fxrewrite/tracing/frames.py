"""Look into the frames of forwards while FX traces, and tell of each question just before it."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from types import CodeType, FrameType, FunctionType, MethodType
from typing import Any

import attrs
from torch import fx

from .forward_code import is_of_a_forward
from .questions import Question, questions


@attrs.frozen(eq=False)
class _Known:
    """A function that was called, which is held so that its id stays its own, and what it asks."""

    code: CodeType
    questions: Mapping[int, Question]

    @functools.cached_property
    def lines(self) -> frozenset[int]:
        """The numbers of the lines with questions."""
        return frozenset(each.line for each in self.questions.values() if each.line)


class Frames:
    """Watches this thread while a tracer runs a forward, as a context.

    Python is several times slower while it is watched, also where nothing is looked at. So what FX
    does by itself, for a node, a module or an attribute, is left out.

    Args:
        tracer: a tracer of our own, about to trace in this thread.
        on_question: called with the frame of a forward and what it is just about to ask.
    """

    def __init__(
        self, tracer: fx.Tracer, on_question: Callable[[FrameType, Question], None]
    ) -> None:
        self._on_question = on_question
        self._known: dict[int, _Known] = {}
        self._before: Any = None
        tracer.create_proxy = self._unwatched(tracer.create_proxy)  # type: ignore[method-assign]
        tracer.getattr = self._unwatched(tracer.getattr)  # type: ignore[method-assign]
        # A user's own method may run a forward in its own way.
        if type(tracer).call_module is fx.Tracer.call_module:
            self._call_module = tracer.call_module
            tracer.call_module = self._call  # type: ignore[method-assign, assignment]
        self._is_early = type(tracer).trace is not fx.Tracer.trace
        self._arguments = tracer.create_args_for_root
        tracer.create_args_for_root = self._begin  # type: ignore[method-assign, assignment]

    def __enter__(self) -> Frames:
        self._before = sys.gettrace()
        if self._is_early:
            self._start()
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)

    def _begin(self, *args: Any) -> Any:
        """Make the arguments of the forward, which FX calls next."""
        made = self._arguments(*args)
        self._start()
        return made

    def _start(self) -> None:
        sys._getframe().f_trace_opcodes = True  # which Python 3.12 wants to be told beforehand
        # One that is written in C would put itself in our place.
        is_plain = isinstance(self._before, FunctionType | MethodType)
        sys.settrace(self._on_call_with(self._before) if is_plain else self._on_call())

    def _unwatched(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function of FX, which asks nothing of a forward's values."""

        def run(*args: Any, **kwargs: Any) -> Any:
            if self._before is not None:  # a debugger, say, which wants to see it
                return function(*args, **kwargs)
            watching = sys.gettrace()
            sys.settrace(None)
            try:
                return function(*args, **kwargs)
            finally:
                sys.settrace(watching)

        return run

    def _call(self, module: Any, forward: Any, args: Any, kwargs: Any) -> Any:
        """Call a module; of what is done for that, the forward alone is watched."""
        watching = sys.gettrace()

        def watched(*args: Any, **kwargs: Any) -> Any:
            outside = sys.gettrace()
            sys.settrace(watching)
            try:
                return forward(*args, **kwargs)
            finally:
                sys.settrace(outside)

        if self._before is None:
            sys.settrace(None)
        try:
            return self._call_module(module, watched, args, kwargs)
        finally:
            sys.settrace(watching)

    def _on_call(self) -> Callable[[FrameType, str, Any], Any]:
        known, learn, follow = self._known, self._learn, self._in_forward
        dull: set[int] = set()

        def on_call(frame: FrameType, event: str, value: Any) -> Any:
            key = id(frame.f_code)
            if key in dull:  # nearly all of what is called is FX's own
                return None
            if key not in known and not learn(frame.f_code).questions:
                dull.add(key)
                return None
            return follow

        return on_call

    def _on_call_with(self, others: Any) -> Callable[[FrameType, str, Any], Any]:
        """As `_on_call`, with a trace function that was there before, such as a debugger's."""
        own = self._on_call()

        def on_call(frame: FrameType, event: str, value: Any) -> Any:
            theirs, ours = others(frame, event, value), own(frame, event, value)
            if theirs is None or ours is None:
                return theirs or ours

            def in_forward(frame: FrameType, event: str, value: Any) -> Any:
                nonlocal theirs
                ours(frame, event, value)
                if event != "opcode" and theirs is not None:
                    theirs = theirs(frame, event, value)
                return in_forward

            return in_forward

        return on_call

    def _in_forward(self, frame: FrameType, event: str, value: Any) -> Any:
        known = self._known[id(frame.f_code)]
        if event == "line":
            frame.f_trace_opcodes = frame.f_lineno in known.lines
        elif event == "opcode" and (question := known.questions.get(frame.f_lasti)) is not None:
            self._on_question(frame, question)
        return self._in_forward

    def _learn(self, code: CodeType) -> _Known:
        known = _Known(code, questions(code) if is_of_a_forward(code) else {})
        self._known[id(code)] = known
        return known
