"""A graph to edit over a model that is only read: what its nodes call, who uses a module, names."""

from __future__ import annotations

import functools
import keyword
from typing import Any

import torch
from torch import fx, nn

from ..module_utils.names import fresh_name, parent_name
from .arguments import arguments
from .constant_eval import evaluate, is_constant


class Overlay:
    """A graph of our own to edit, over a model that is only read.

    New modules and tensors are laid over the model's by qualified name (`placed`); the model
    itself never changes, and what becomes of graph and overlay is decided elsewhere.
    """

    def __init__(
        self,
        root: nn.Module,
        graph: fx.Graph,
        constants: dict[str, Any],
        modules: dict[str, nn.Module] | None = None,
        part: str = "",
    ) -> None:
        self.root = root
        self.part = part
        self.graph = graph
        self.constants = constants
        self.is_training = root.training
        # Whether the graph is only ever called with the sizes that it was made for.
        self.sizes_are_fixed = False
        # What would decide the shapes that are not known, or why nothing does.
        self.unknown = "example_inputs would decide it"
        self.placed: dict[str, Any] = dict(constants)
        self._first_names: dict[str, str] = {}
        self.remarks: dict[fx.Node, str] = {}
        found = modules or dict(root.named_modules(remove_duplicate=False))
        self.modules: dict[Any, nn.Module] = found
        self._users: dict[int, int] = {}
        self._called: dict[str, int] = {}
        self._constants: set[fx.Node] = set()
        self._whole = {
            str(node.target)
            for node in graph.nodes
            if (module := self.module(node)) is not None and module._modules
        }
        for node in graph.nodes:
            self.count(node, +1)

    def shown(self, name: str) -> str:
        """What reports call a node or module: a node of a part has the part's name before it."""
        prefix = f"{self.part}." if self.part else ""
        return name if name.startswith(prefix) else prefix + name

    def module(self, node: fx.Node) -> nn.Module | None:
        """The module that a node calls, or None where it calls none."""
        if node.op != "call_module":
            return None
        target: Any = node.target
        placed: nn.Module | None = self.placed.get(target)
        return placed if placed is not None else self.modules.get(target)

    def attribute(self, node: fx.Node) -> Any:
        """The value that a `get_attr` node reads."""
        return self.value(str(node.target))

    def value(self, target: str) -> Any:
        """The value of that qualified name."""
        if target in self.placed:
            return self.placed[target]
        owner, name = parent_name(target)
        # A path may lead through a tensor or a plain object, as `scale.T` does.
        holder = self.modules.get(owner)
        return getattr(holder, name) if holder is not None else _walk(self.root, target)

    def is_constant(self, node: fx.Node) -> bool:
        """Whether a value depends on nothing but the model's own tensors."""
        return node in self._constants

    def constant(self, node: fx.Node) -> Any:
        """The value of a node that is constant."""
        return evaluate(node, self.attribute)

    def callee(self, node: fx.Node) -> Any:
        """What a node calls: a module's type, a function, or a method's name."""
        module = self.module(node)
        return node.target if module is None else type(module)

    def arguments(self, node: fx.Node) -> dict[str, Any]:
        """A calling node's arguments by name."""
        if node.op == "call_module" and len(node.args) == 1 and not node.kwargs:
            return {_first_parameter(self.callee(node)): node.args[0]}
        return arguments(node, self.callee(node))

    def inputs(self, node: fx.Node) -> dict[str, fx.Node]:
        """Those of a node's arguments that are values of the graph, by name."""
        if node.op in ("placeholder", "get_attr", "output"):
            return {}
        return {k: v for k, v in self.arguments(node).items() if isinstance(v, fx.Node)}

    @functools.cached_property
    def ids(self) -> frozenset[int]:
        """The identities of all modules of the model."""
        return frozenset(map(id, self.modules.values()))

    def users(self, module: nn.Module) -> int:
        """How many calls use a module, under whatever name.

        A call of something inside it, a read of one of its attributes, and a call of a module that
        contains it count as well.
        """
        return self._users.get(id(module), 0)

    def free_name(self, target: str) -> str:
        """A qualified name near `target` that nothing of model or graph has or contains."""
        if self._is_below_used(target):
            # Below a called module is that module's own, and it belongs to the model.
            target = target.replace(".", "_")
        return fresh_name(target, _Taken(self))

    def name_beside(self, target: str) -> str:
        """A free name for a module that is to be called `target` once nothing else is."""
        name = self.free_name(target)
        self._first_names[name] = self.first_name(target)
        return name

    def first_name(self, target: str) -> str:
        """What a new module of that name is to be called in the end."""
        return self._first_names.get(target, target)

    def is_used(self, target: str) -> bool:
        """Whether a node of the graph calls or reads what has that name, or what it is part of."""
        return self._called.get(target, 0) > 0 or self._is_below_used(target)

    def _is_below_used(self, target: str) -> bool:
        while "." in target:
            target, _ = parent_name(target)
            if self._called.get(target):
                return True
        return False

    def place(self, target: str, value: nn.Module | torch.Tensor) -> None:
        """Lay a new module or tensor over the model's under that qualified name."""
        self.placed[target] = value

    def count(self, node: fx.Node, by: int) -> None:
        """Note that a node that uses a module came (+1) or went (-1)."""
        if node.op == "call_module":
            module = self.module(node)
            if module is not None:
                self._call(str(node.target), by)
                used = module.modules() if module._modules else (module,)
                for each in used:
                    self._use(each, by)
                if self._whole:
                    self._use_containers(str(node.target), by)
            return
        if node.op == "get_attr":
            self._call(str(node.target), by)
            self._use_containers(str(node.target), by)
        if by > 0 and is_constant(node, self._constants):
            self._constants.add(node)

    def _call(self, target: str, by: int) -> None:
        self._called[target] = self._called.get(target, 0) + by

    def _use_containers(self, target: str, by: int) -> None:
        while "." in target:
            target, _ = parent_name(target)
            container = self.modules.get(target)
            if container is not None:
                self._use(container, by)

    def _use(self, module: nn.Module, by: int) -> None:
        users = self._users.get(id(module), 0) + by
        if users:
            self._users[id(module)] = users
        else:  # a module that nobody uses may be freed, and its id taken by another
            del self._users[id(module)]


# What a graph module has already, and a module of that name would hide.
_RESERVED = frozenset(dir(fx.GraphModule(nn.Module(), fx.Graph())))


class _Taken:
    """The qualified names that model, overlay or graph have, or that something is below."""

    def __init__(self, view: Overlay) -> None:
        self._view = view

    def __contains__(self, target: object) -> bool:
        view, target = self._view, str(target)
        owner, name = parent_name(target)
        if target in view.placed or target in view.modules or keyword.iskeyword(name):
            return True
        if not owner and name in _RESERVED:
            return True
        return getattr(view.modules.get(owner), name, None) is not None


@functools.lru_cache(maxsize=4096)
def _first_parameter(module_type: type[nn.Module]) -> str:
    code = getattr(module_type.forward, "__code__", None)
    return code.co_varnames[1] if code is not None and code.co_argcount > 1 else "0"


def _walk(root: Any, target: str) -> Any:
    for name in target.split("."):
        root = getattr(root, name)
    return root
