"""Read the functional calls of a graph as modules, so that rules on module types match them.

Before the engine runs, a call of a function that `dialects` knows, around tensors of the model,
becomes the call of a module of our own around the same tensors. `lowering` takes it from there.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import attrs
import torch
from torch import fx, nn

from ..engine.matcher import calls
from ..ir.describe import describe
from ..ir.graph_view import GraphView
from ..module_utils.names import parent_name
from ..module_utils.torch_private import pytree
from ..rules.rule import Rule
from ..rules.spec import Pattern, Step
from .op_table import Spelling, spelling_of
from .semantics import UNKNOWN_RANK, Transposed, output_rank

TRANSPOSES: dict[Any, tuple[Any, ...]] = {
    torch.ops.aten.permute.default: ([1, 0],),
    torch.ops.aten.transpose.int: (0, 1),
    torch.ops.aten.t.default: (),
}
# What a linear layer of several dimensions decomposes into repeats its weight by these.
REPEATS = (torch.ops.aten.expand.default, torch.ops.aten.view.default)


@attrs.frozen(eq=False)
class Lifted:
    """A call as it was, while a module's call stands in its place.

    `node` is where the value is, and `call` what computes it: another node where the value is an
    item of what the function returns. `given` are its arguments by name, and `targets` the
    qualified names of the tensors among them.
    """

    spelling: Spelling
    module: nn.Module
    node: fx.Node
    call: fx.Node
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    given: dict[str, Any]
    targets: dict[str, str]

    @property
    def constants(self) -> list[fx.Node]:
        """The nodes that give the call its tensors."""
        return [self.given[name] for name in self.targets]


@attrs.frozen(eq=False)
class NotLifted:
    """A call that spells one of these module types, and why it stays a call of its function."""

    node: fx.Node
    kinds: tuple[type[nn.Module], ...]
    reason: str


class Lifting:
    """The functional calls of a graph that stand as module calls while the engine works.

    `lifted` are these by node, `by_module` by the identity of the module, `targets` the qualified
    names of their tensors by identity, and `declined` the calls that could not be lifted.
    """

    def __init__(self, view: GraphView, rules: Sequence[Rule[Any]]) -> None:
        self._view = view
        self.lifted: dict[fx.Node, Lifted] = {}
        self.by_module: dict[int, Lifted] = {}
        self._modules: dict[Any, tuple[nn.Module, str]] = {}
        # The qualified names of tensors by identity, with the tensors so that none is freed.
        self.targets: dict[int, tuple[str, torch.Tensor]] = {}
        self.declined: list[NotLifted] = []
        steps = [step for rule in rules for step in _steps(rule.pattern)]
        wanted = tuple({kind for each in steps if not each.captures_call for kind in each.modules})
        for node in view.graph.nodes if wanted else ():
            spelling = spelling_of(node)
            if spelling is None:
                continue
            kinds = spelling.meaning.kinds
            # A function that a rule names, without the type of module, is left to that rule.
            named = any(calls(e, node, view) and not any_is(kinds, e.modules) for e in steps)
            if any_is(kinds, wanted) and not named:
                reason = self._lift(node, spelling)
                if reason is not None:
                    view.remarks[node] = reason
                    self.declined.append(NotLifted(node, kinds, reason))

    def _lift(self, call: fx.Node, spelling: Spelling) -> str | None:
        """Make a call the call of a module, or give the reason why it stays."""
        view, node = self._view, call
        if spelling.item is not None:
            node = next(iter(call.users), call)
            if len(call.users) != 1 or node.args[1:] != (spelling.item,):
                return "another of its results is read"
        given = {**view.arguments(call), **spelling.implied}
        source = given.get(spelling.data)
        if not isinstance(source, fx.Node):
            return "it reads no value of the graph"
        plain, targets = {k: v for k, v in given.items() if k != spelling.data}, {}
        for name, value in plain.items():
            field = spelling.fields.get(name, name)
            if isinstance(value, fx.Node):
                found = self._constant(value) if value is not source else None
                if found is None:
                    return f"its {field} is {describe(value, view)}, not a tensor of the model"
                targets[name], plain[name] = found
                if isinstance(found[1], Transposed) and name != "mat2":
                    return f"its {field} is a tensor of the model that is read transposed"
                writer = self._updated.get(id(found[1]))
                if writer is not None and not spelling.meaning.updates(given):
                    return f"its {field} is updated by {describe(writer, view)}"
            elif any(isinstance(each, fx.Node) for each in pytree.tree_leaves(value)):
                return f"its {field} is computed when the model runs"
        made = spelling.meaning.lift(plain, self._rank(source))
        if isinstance(made, str):
            return f"{made}; {view.unknown}" if made is UNKNOWN_RANK else made
        if not spelling.says_mode:
            # A graph of operators has no mode, whatever the module says that it is in.
            made.train(spelling.dialect == "functional" and view.is_training)
        # Calls that are the same in all but what they read are calls of one module.
        told = (targets.get(name) or repr(value) for name, value in plain.items())
        key = (spelling.function, type(made), *plain, *told)
        module, owner = self._modules.setdefault(key, (made, self._owner(targets)))
        name = owner or view.free_name(call.name)
        lifted = Lifted(spelling, module, node, call, call.args, call.kwargs, given, targets)
        self.lifted[node] = self.by_module[id(module)] = lifted
        view.place(name, module)
        call.args, call.kwargs = (), {}
        node.op, node.target, node.args, node.kwargs = "call_module", name, (source,), {}
        view.count(node, +1)
        return None

    @property
    def behind(self) -> Iterator[tuple[str, str, tuple[type[nn.Module], ...]]]:
        """Each owner of tensors that a call is given, the call's name, and the types it spells."""
        for lifted in self.lifted.values():
            for target in lifted.targets.values():
                yield parent_name(target)[0], str(lifted.node.target), (type(lifted.module),)
        for each in self.declined:
            for read in each.node.all_input_nodes:
                if read.op == "get_attr":
                    yield parent_name(str(read.target))[0], each.node.name, each.kinds

    def _constant(self, node: fx.Node) -> tuple[str, Any] | None:
        """The name and value of the model's tensor that a node reads, transposed perhaps."""
        if node.op == "call_function" and TRANSPOSES.get(node.target) == node.args[1:]:
            found = self._constant(node.all_input_nodes[0])
            return None if found is None else (found[0], Transposed(found[1]))
        if node.target in REPEATS:
            found = self._constant(node.all_input_nodes[0])
            return found if found is not None and _repeats(node, found[1]) else None
        value = self._view.attribute(node) if node.op == "get_attr" else None
        if not isinstance(value, torch.Tensor):
            return None
        self.targets[id(value)] = str(node.target), value
        return str(node.target), value

    @functools.cached_property
    def _updated(self) -> dict[int, fx.Node]:
        """The tensors that layers in training mode update, by identity, each with such a layer."""
        updated: dict[int, fx.Node] = {}
        for node in self._view.graph.nodes:
            module = self._view.module(node)
            if module is not None and module.training:
                updated.update((id(each), node) for each in module.buffers())
            elif (spelling := spelling_of(node)) is not None:
                given = self._view.arguments(node)
                read = (given.get(name) for name in spelling.meaning.updates(given))
                for each in read:
                    if isinstance(each, fx.Node) and each.op == "get_attr":
                        updated[id(self._view.attribute(each))] = node
        return updated

    def _owner(self, targets: dict[str, str]) -> str:
        """The name of the module whose tensors these seem to be, where nothing has it."""
        owners = {parent_name(target)[0] for target in targets.values()}
        owner = owners.pop() if len(owners) == 1 else ""
        return owner if owner and self._view.free_name(owner) == owner else ""

    def _rank(self, node: fx.Node) -> int | None:
        known = node.meta.get("val")
        return known.dim() if isinstance(known, torch.Tensor) else self._ranks.get(node)

    @functools.cached_property
    def _ranks(self) -> dict[fx.Node, int]:
        """How many dimensions values have as far as the types of layers tell."""
        ranks: dict[fx.Node, int] = {}
        for node in self._view.graph.nodes:
            module, spelling = self._view.module(node), spelling_of(node)
            kinds = () if spelling is None else spelling.meaning.kinds
            if module is not None:
                kinds = (type(module),)
            if not kinds:
                continue
            rank = next((ranks.get(each) for each in node.all_input_nodes), None)
            rank = output_rank(kinds, rank)
            if rank is not None:
                ranks[node] = rank
        return ranks


def _repeats(node: fx.Node, matrix: Any) -> bool:
    """Whether a node gives a matrix that is read transposed, once for each of a batch."""
    known = node.meta.get("val")
    if not isinstance(matrix, Transposed) or not isinstance(known, torch.Tensor):
        return False
    return known.dim() == 3 and known.shape[1:] == matrix.tensor.t().shape


def _steps(pattern: Pattern) -> list[Step]:
    inner = (step for branch in pattern.branches for step in _steps(branch.pattern))
    return [*inner, *pattern.steps]


def any_is(kinds: tuple[type[nn.Module], ...], wanted: tuple[type[nn.Module], ...]) -> bool:
    """Whether one of the types is one of those that are wanted, or a subclass of one."""
    return any(issubclass(kind, wanted) for kind in kinds)
