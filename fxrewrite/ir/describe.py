"""A node in the words of a report, and what it says of where it comes from."""

from __future__ import annotations

import itertools
from typing import Any

import attrs
from torch import fx

from .overlay import Overlay


@attrs.frozen
class Seen:
    """What a node was when it was looked at; it is put into words only when asked for."""

    op: str
    name: str
    target: Any
    kind: type[Any] | None
    remark: str = ""

    @classmethod
    def of(cls, node: fx.Node, view: Overlay) -> Seen:
        """What a node is now."""
        module = view.module(node)
        kind = None if module is None else type(module)
        return cls(node.op, node.name, node.target, kind, view.remarks.get(node, ""))

    def __str__(self) -> str:
        """By its module's qualified name, its function or its method."""
        if self.kind is not None:
            return f"{self.target} ({self.kind.__name__})"
        if self.op == "call_function":
            remark = f": {self.remark}" if self.remark else ""
            return f"{self.name} ({getattr(self.target, '__name__', self.target)}(){remark})"
        if self.op == "call_method":
            return f"{self.name} (.{self.target}())"
        if self.op == "placeholder":
            return self.remark or f"the model's input {self.target!r}"
        if self.op == "get_attr":
            return f"the model's attribute {self.target}"
        return self.remark or "the model's output"


def name_of(node: fx.Node) -> str:
    """What reports call a node: the qualified name of the module it calls, or else its own."""
    return str(node.target) if node.op == "call_module" else node.name


def in_one_line(steps: tuple[tuple[str, str], ...]) -> str:
    """A chain as reports write it; branches or siblings stand in parentheses, parted by bars."""
    if steps[0][0].rpartition(".")[2].isdigit():
        return f"({' | '.join(name for _, name in steps)})"
    grouped = itertools.groupby(steps, key=lambda step: step[0].rpartition(".")[0])
    parts = [(branch, " -> ".join(name for _, name in inner)) for branch, inner in grouped]
    branches = [text for branch, text in parts if branch]
    if not branches:
        return parts[0][1]
    trunk = " -> ".join(text for branch, text in parts if not branch)
    joined = f"({' | '.join(branches)})" if len(branches) > 1 else branches[0]
    return f"{joined} -> {trunk}"


def describe(node: fx.Node, view: Overlay) -> str:
    """A node as a message names it: by its module's qualified name, its function or its method."""
    return str(Seen.of(node, view))


# What a node's metadata says of where it comes from.
PROVENANCE = frozenset({"nn_module_stack", "source_fn_stack", "stack_trace", "torch_fn"})
