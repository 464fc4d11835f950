"""Rules as a pass over a graph that is edited in place, as inductor's hooks want it."""

from __future__ import annotations

import hashlib
import inspect
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from ..ir.graph_view import GraphView
from ..module_utils.names import fresh_name
from ..module_utils.torch_private import CustomGraphPass, disable_current_modes
from ..pipeline.applying import apply
from ..rules.registry import RuleSet
from ..targets.graph_target import GraphTarget
from ..tracing.tracer import copy_of


class InductorPass(CustomGraphPass):
    """Rules as one of inductor's custom passes; made by `integrations.inductor_pass`."""

    def __init__(self, rule_sets: list[RuleSet]) -> None:
        self._rule_sets = rule_sets

    def __call__(self, graph: fx.Graph) -> None:
        """Apply the rules to a graph, in place; where one raises, nothing is changed."""
        with disable_current_modes(), torch.inference_mode(False), torch.no_grad():
            self._apply(graph)

    def uuid(self) -> bytes | None:
        """What stands for these rules in the key of a compiled graph.

        None, so that nothing is cached, where the rules' source is not all there is to them.
        """
        return _source_hash(self._rule_sets)

    def _apply(self, graph: fx.Graph) -> None:
        root = graph.owning_module or nn.Module()
        # First on a copy, so that where a rule raises the graph is as it was.
        if self._applied(GraphView(root, copy_of(graph), {})):
            view = GraphView(root, graph, {})
            self._applied(view)
            _install(view, root)
            graph.lint()

    def _applied(self, view: GraphView) -> bool:
        targets = {view: GraphTarget(view)}
        return bool(apply(targets, self._rule_sets, view.modules).sites)


def _install(view: GraphView, root: nn.Module) -> None:
    """Give the owner of a graph what rules made, each under a name of its own."""
    names: dict[str, str] = {}
    for node in view.graph.nodes:
        target = str(node.target)
        if node.op not in ("get_attr", "call_module") or target not in view.placed:
            continue
        if target not in names:
            # A container may be somebody else's, so nothing is put into one.
            names[target] = name = fresh_name(target.replace(".", "_"), _Has(root))
            value = view.placed[target]
            if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter):
                root.register_buffer(name, value)
            else:
                setattr(root, name, value)
        node.target = names[target]


class _Has:
    def __init__(self, root: nn.Module) -> None:
        self._root = root

    def __contains__(self, name: object) -> bool:
        return hasattr(self._root, str(name))


def _source_hash(rule_sets: list[RuleSet]) -> bytes | None:
    found = hashlib.sha256()
    files: set[str] = set(map(str, Path(__file__).parents[1].rglob("*.py")))
    for rule in (rule for rule_set in rule_sets for rule in rule_set.rules):
        found.update(f"{rule.name} {rule.pattern} {rule.any_mode} {rule.last}".encode())
        alike = (step.alike for step in rule.pattern.steps if step.alike is not None)
        sources: tuple[Any, ...] = (rule.build, rule.pattern.cls, *rule.guards, *alike)
        for function in sources:
            try:
                file = inspect.getsourcefile(function)
            except TypeError:
                file = None
            if file is None or not Path(file).exists() or getattr(function, "__closure__", None):
                return None
            files.add(file)
    for file in sorted(files):
        found.update(Path(file).read_bytes())
    return found.digest()
