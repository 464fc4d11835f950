"""Which instructions of a function ask what a value is, such as `x is None` or `isinstance(x, T)`.

A value that stands for another while tracing does not notice such a question, unlike one for what
it holds. So the questions are found in the bytecode.
"""

from __future__ import annotations

import dis
import functools
from collections.abc import Iterator, Sequence
from types import CodeType
from typing import Any

import attrs

# Functions that ask what their first argument is, and from how many arguments on.
_ASKING = {"isinstance": 2, "type": 1, "hasattr": 2, "callable": 1, "id": 1, "getattr": 3}
_MATCHING = ("MATCH_CLASS", "MATCH_MAPPING", "MATCH_SEQUENCE", "MATCH_KEYS")
_CALLS = ("CALL", "CALL_FUNCTION", "CALL_FUNCTION_KW", "CALL_KW")
_LOADS = (
    "LOAD_FAST LOAD_FAST_CHECK LOAD_FAST_BORROW LOAD_DEREF LOAD_CLASSDEREF LOAD_NAME LOAD_GLOBAL "
    "LOAD_FROM_DICT_OR_DEREF"
).split()
# Functions of torch that tell under which state it computes, and what loads a function.
_OF_TORCH = frozenset(
    "is_grad_enabled is_inference_mode_enabled is_autocast_enabled is_autocast_cpu_enabled "
    "get_autocast_dtype get_autocast_gpu_dtype get_default_dtype get_default_device "
    "are_deterministic_algorithms_enabled".split()
)
_READS = ("LOAD_ATTR", "LOAD_METHOD", "LOAD_GLOBAL", "LOAD_NAME", "LOAD_DEREF")
# What newer Pythons make of two instructions.
_PAIRS = {
    "LOAD_FAST_LOAD_FAST": ("LOAD_FAST", "LOAD_FAST"),
    "LOAD_FAST_BORROW_LOAD_FAST_BORROW": ("LOAD_FAST", "LOAD_FAST"),
    "STORE_FAST_LOAD_FAST": ("STORE_FAST", "LOAD_FAST"),
    "STORE_FAST_STORE_FAST": ("STORE_FAST", "STORE_FAST"),
}


@attrs.frozen
class Instruction:
    """An instruction, with what it does to the height of the stack.

    `value` is the name or constant that it loads, or how many arguments it calls with.
    """

    offset: int
    name: str
    value: Any
    effect: int
    is_jump: bool = False
    is_target: bool = False

    @property
    def variable(self) -> str | None:
        """The variable that it loads, or None."""
        return self.value if self.name in _LOADS else None


@attrs.frozen
class Question:
    """One place where a function asks what a value is.

    `kind` is "is", "match", "training" (it reads an attribute of that name), "torch" (it asks for a
    state of torch), "global" (it sets a global variable), "try" (a block begins of which it catches
    what that raises) or the name of the function that asks. `operands` are the instructions that
    make each operand, or None where they can't be told apart; `names` are the variables that are
    read for it, and `line` is the number of the line.
    """

    kind: str
    operands: tuple[tuple[Instruction, ...], ...] | None
    names: frozenset[str]
    line: int | None = None


@functools.lru_cache(maxsize=4096)
def questions(code: CodeType) -> dict[int, Question]:
    """The questions that a function asks, by the offset of the instruction that does so.

    >>> def scale(x, by=None):
    ...     return x if by is None else x * by
    >>> [(each.kind, sorted(each.names)) for each in questions(scale.__code__).values()]
    [('is', ['by'])]
    """
    instructions = list(_instructions(code))
    lines = {at: line for start, end, line in code.co_lines() for at in range(start, end, 2)}
    calls = _Calls(instructions)
    found: dict[int, Question] = {}
    for at, each in enumerate(instructions):
        question = calls.question(at) if each.name in _CALLS else _question(instructions, at)
        if question is not None:
            question = attrs.evolve(question, line=lines[each.offset])
            found[each.offset] = question
            while at and instructions[at - 1].name == "EXTENDED_ARG":
                at -= 1  # which is where Python says that it is
                found[instructions[at].offset] = question
    for offset in _tries(code, instructions):
        found.setdefault(offset, Question("try", None, frozenset(), lines[offset]))
    return found


def _tries(code: CodeType, instructions: Sequence[Instruction]) -> Iterator[int]:
    """Where the blocks begin of which the function catches what they raise."""
    catching, handler = set[int](), 0
    for each in instructions:
        if each.name == "PUSH_EXC_INFO":
            handler = each.offset
        elif each.name == "CHECK_EXC_MATCH":
            catching.add(handler)
    # Python 3.10 says where a block begins, and has no table of handlers.
    yield from (each.offset for each in instructions if each.name == "SETUP_FINALLY")
    if catching:
        entries: Any = getattr(dis.Bytecode(code), "exception_entries", ())
        yield from (each.start for each in entries if each.target in catching)


def _question(code: Sequence[Instruction], at: int) -> Question | None:
    each = code[at]
    if each.name == "IS_OP":
        return _about("is", code, at, 2)
    if each.name.endswith(("_IF_NONE", "_IF_NOT_NONE")):
        question = _about("is", code, at, 1)
        none = (Instruction(each.offset, "LOAD_CONST", None, 1),)
        return attrs.evolve(question, operands=question.operands and (*question.operands, none))
    if each.name == "LOAD_ATTR" and each.value == "training":
        return _about("training", code, at, 1)
    if each.value in _OF_TORCH and each.name.startswith(_READS):
        return Question("torch", ((each,),), frozenset())
    if each.name in ("STORE_GLOBAL", "DELETE_GLOBAL"):
        return Question("global", ((each,),), frozenset())
    if each.name in _MATCHING:
        return Question("match", None, _names(code[:at]))
    return None


class _Calls:
    """The calls of a function, and which of them ask."""

    def __init__(self, code: Sequence[Instruction]) -> None:
        self._code = code
        asking = {at for at, each in enumerate(code) if each.variable in _ASKING}
        calls = [at for at, each in enumerate(code) if each.name in _CALLS] if asking else []
        self._called = {at: self._function(at) for at in calls}
        # Functions that ask and are called, if at all, by a call of which it can't be told.
        self._loose = asking.difference(self._called.values())

    def _function(self, at: int) -> int | None:
        """Where the function is loaded that a call calls, None if unclear."""
        start = _start(self._code, at + 1)
        if start is not None and self._code[start].name == "PUSH_NULL":
            start += 1
        return start

    def question(self, at: int) -> Question | None:
        """The question that a call asks."""
        code, start = self._code, self._called.get(at)
        if at in self._called and start is None and any(each < at for each in self._loose):
            return Question("call", None, _names(code[:at]))
        called = None if start is None else code[start].variable
        if called not in _ASKING or code[at].value < _ASKING[called]:
            return None
        return _about(called, code, at - (code[at - 1].name == "PRECALL"), code[at].value)


def _about(kind: str, code: Sequence[Instruction], end: int, count: int) -> Question:
    """A question about so many uppermost values on the stack before an instruction."""
    operands: list[tuple[Instruction, ...]] = []
    at = end
    for _ in range(count):
        # Where code from elsewhere arrives, it may bring another value.
        start = None if code[at].is_target else _start(code, at)
        if start is None:
            return Question(kind, None, _names(code[:end]))
        operands.insert(0, tuple(code[start:at]))
        at = start
    return Question(kind, tuple(operands), _names(code[at:end]))


def _start(code: Sequence[Instruction], end: int) -> int | None:
    """Where the instructions begin that make the uppermost value before one; None if unclear."""
    missing = 1
    for at in range(end - 1, -1, -1):
        each = code[at]
        if each.is_jump or each.name.startswith(("COPY", "SWAP", "ROT_", "DUP_")):
            return None
        missing -= each.effect
        if missing <= 0:
            return at
        if each.is_target:
            return None
    return None


def _names(code: Sequence[Instruction]) -> frozenset[str]:
    return frozenset(each.variable for each in code if each.variable is not None)


def _instructions(code: CodeType) -> Iterator[Instruction]:
    for each in dis.get_instructions(code):
        argument = each.arg if each.opcode >= dis.HAVE_ARGUMENT else None
        effect = dis.stack_effect(each.opcode, argument)
        is_target = bool(each.is_jump_target)
        if each.opname in _PAIRS:
            for name, value in zip(_PAIRS[each.opname], each.argval, strict=True):
                yield Instruction(
                    each.offset, name, value, 1 if name == "LOAD_FAST" else -1, False, is_target
                )
                is_target = False
            continue
        name = "BINARY_SUBSCR" if each.argrepr == "[]" else each.opname
        value = each.arg if name in _CALLS else each.argval
        is_jump = each.opcode in dis.hasjrel or each.opcode in dis.hasjabs
        yield Instruction(each.offset, name, value, effect, is_jump, is_target)
