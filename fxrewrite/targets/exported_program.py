"""Programs of `torch.export`: taken apart into a graph over constants, and put together again.

Nothing else in this package touches an `ExportedProgram`.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputSpec,
    TensorArgument,
)

from ..engine.editing import Edit, Kept
from ..engine.match import Site
from ..ir.fake_values import mode_of, run_on_fakes, value_on_fakes
from ..ir.graph_view import GraphView
from ..module_utils.names import fresh_name, parent_name
from ..tracing.tracer import copy_of
from .graph_inputs import Input, as_inputs
from .graph_target import GraphTarget
from .operators import legalise

_TENSORS = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
# The inputs of a program stand in the order of their kinds.
_FIRST = (InputKind.TOKEN, *_TENSORS)


class ExportedProgramTarget(GraphTarget):
    """A program on the workbench: its `graph` reads the program's tensors as attributes.

    In a program they are inputs of the graph. Buffers that the program gives new values to stay
    inputs, since they are no constants. A program is where its own rewrite goes, too: the engine
    asks it before it commits, and `finished` makes a new program of what became of the graph.
    """

    def __init__(self, program: ExportedProgram) -> None:
        self._program = program
        self.graph = copy_of(program.graph)
        tensors = {**program.state_dict, **program.constants}
        self._before = {k: v for k, v in tensors.items() if isinstance(v, torch.Tensor)}
        self._remarks: dict[fx.Node, str] = {}
        self._read: dict[str, None] = {}
        placeholders = list(self.graph.find_nodes(op="placeholder"))
        for node, spec in zip(placeholders, program.graph_signature.input_specs, strict=True):
            if self._is_constant(spec):
                node.op, node.target = "get_attr", str(spec.target)
                if node.users:
                    self._read[str(spec.target)] = None
            elif spec.target is not None:
                self._remarks[node] = f"{spec.target}, which the program writes to"
        self._own = frozenset(self.graph.nodes)

    def _is_constant(self, spec: InputSpec) -> bool:
        signature = self._program.graph_signature
        written = {*signature.buffers_to_mutate.values()}
        written.update(getattr(signature, "parameters_to_mutate", {}).values())
        is_tensor = spec.kind in _TENSORS and spec.target in self._before
        return is_tensor and spec.target not in written

    def view(self) -> GraphView:
        """The graph as the engine edits it."""
        view = GraphView(self._program.graph_module, self.graph, self._before)
        view.remarks.update(self._remarks)
        view.sizes_are_fixed = True  # but for those that its shapes have as symbols
        self._view = view
        return view

    def refusal(self, site: Site, edit: Edit) -> str | None:
        """What replaces a chain must run without data, and give a tensor like the chain's."""
        if not edit.steps and not edit.nodes:
            return None
        try:
            made = self._results(edit)
        except Exception as error:
            said = str(error).strip().partition("\n")[0]
            return f"what replaces the chain can't be part of an exported program: {said}"
        given = [link.node for link in site.links] if edit.parts else [site.last]
        for node, value in zip(given, made, strict=True):
            before, after = _kind(node.meta["val"]), _kind(value)
            if before != after:
                return f"what replaces the chain gives {after}, and the chain gave {before}"
        return None

    def _results(self, edit: Edit) -> list[Any]:
        """What an edit gives for the fake tensors that the program has recorded."""
        known: dict[fx.Node, Any] = {}
        for step in edit.steps:
            if isinstance(step, Kept):
                reads = known.get(step.reads, step.reads.meta["val"])
                taken = {**known, step.link.source: reads}
                known[step.node] = _evaluate_on_fakes(
                    self._view, step.node, taken, like=edit.reads[0]
                )
            else:
                args = [known.get(each, each.meta["val"]) for each in step.reads]
                known[step.node] = run_on_fakes(step.module, args, {})
        for node in edit.nodes:
            if node not in known:
                known[node] = _evaluate_on_fakes(self._view, node, known, like=edit.reads[0])
        given = edit.parts or (edit.result,)
        return [known[each] if each in known else each.meta["val"] for each in given]

    def finished(self, view: GraphView) -> ExportedProgram:
        """A program of what became of the graph."""
        program = self._program
        legalise(view, self._own, self._read, pre_dispatch=program.dialect == "TRAINING")
        read = {
            str(node.target): node
            for node in view.graph.find_nodes(op="get_attr")
            if node.users and isinstance(view.attribute(node), torch.Tensor)
        }
        specs = self._input_specs(view, read)
        inputs = self._inputs(view, specs, read)
        graph, made = as_inputs(view.graph, inputs)
        state_dict, constants = self._tensors(view, specs, read)
        return ExportedProgram(
            root=program.graph_module,
            graph=graph,
            graph_signature=ExportGraphSignature(specs, self._output_specs(view, made)),
            state_dict=state_dict,
            range_constraints=copy.deepcopy(program.range_constraints),
            module_call_graph=self._module_calls(graph),
            example_inputs=program.example_inputs,
            constants=constants,
            verifiers=program.verifiers,
        )

    def _input_specs(self, view: GraphView, read: Mapping[str, fx.Node]) -> list[InputSpec]:
        """The inputs in order: new tensors after those of their kind, none that is read no more."""
        owned, owners = ({parent_name(each)[0] for each in names} for names in (self._read, read))
        specs = []
        for spec in self._program.graph_signature.input_specs:
            # What nothing ever read, a count of batches say, goes with the layer that it was of.
            owner = parent_name(spec.target or "")[0]
            goes = spec.target in self._read or (owner and owner in owned - owners)
            if spec.target in read or not goes or not self._is_constant(spec):
                specs.append(spec)
        taken = {node.name for node in view.graph.nodes} | {spec.arg.name for spec in specs}
        known = {spec.target for spec in specs}
        for target in read:
            if target not in known:
                is_parameter = isinstance(view.value(target), nn.Parameter)
                base = f"{'p' if is_parameter else 'b'}_{target.replace('.', '_')}"
                name = fresh_name(base, taken)
                taken.add(name)
                kind = InputKind.PARAMETER if is_parameter else InputKind.BUFFER
                persistent = None if is_parameter else True
                before = _FIRST[: _FIRST.index(kind) + 1]
                at = max((i + 1 for i, spec in enumerate(specs) if spec.kind in before), default=0)
                specs.insert(at, InputSpec(kind, TensorArgument(name), target, persistent))
        return specs

    def _inputs(
        self, view: GraphView, specs: list[InputSpec], read: Mapping[str, fx.Node]
    ) -> list[Input]:
        """The inputs with what the graph has in their place until now."""
        placeholders = self._program.graph.find_nodes(op="placeholder")
        metas = {node.name: node.meta for node in placeholders}
        standing: dict[tuple[str, str], list[fx.Node]] = {}
        for node in view.graph.nodes:
            standing.setdefault((node.op, str(node.target)), []).append(node)
        inputs = []
        for spec in specs:
            name, target = spec.arg.name, str(spec.target)
            meta = dict(metas.get(name, {}))
            if target in read:
                meta["val"] = read[target].meta["val"]
            key = ("get_attr", target) if spec.kind in _TENSORS else ("placeholder", name)
            nodes = standing.get(key, standing.get(("placeholder", name), []))
            inputs.append(Input(name, meta, nodes))
        return inputs

    def _output_specs(self, view: GraphView, made: Mapping[fx.Node, fx.Node]) -> list[OutputSpec]:
        """What the program returns is what it was, by the names of the nodes that make it now."""
        specs = []
        returned = view.graph.output_node().args[0]
        signature = self._program.graph_signature
        for value, spec in zip(returned, signature.output_specs, strict=True):  # type: ignore[arg-type]
            if isinstance(value, fx.Node):
                arg = dataclasses.replace(spec.arg, name=made[value].name)
                spec = dataclasses.replace(spec, arg=arg)
            specs.append(spec)
        return specs

    def _tensors(
        self, view: GraphView, specs: list[InputSpec], read: Mapping[str, fx.Node]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The state dict and the further constants of the new program."""
        program = self._program
        kept = [str(spec.target) for spec in specs if spec.kind in _TENSORS]
        had = {spec.target for spec in program.graph_signature.input_specs}
        gone = [self._before[t] for t in self._read if read.get(t) is None or self._is_new(t, view)]

        def remain(tensors: Mapping[str, Any]) -> dict[str, Any]:
            now = {}
            for target, value in tensors.items():
                if target in kept:
                    now[target] = view.value(target) if target in read else value
                elif target not in had and all(value is not each for each in gone):
                    now[target] = value  # nothing reads it, or it is read by another name
            return now

        state_dict, constants = remain(program.state_dict), remain(program.constants)
        for target in kept:
            if target not in self._before:
                _insert(state_dict, target, view.value(target))
        return state_dict, constants

    def _is_new(self, target: str, view: GraphView) -> bool:
        """Whether the tensor of that name is another one than it was."""
        return view.value(target) is not self._before.get(target)

    def _module_calls(self, graph: fx.Graph) -> Any:
        """The calls of modules that the program remembers, but for those that are cut through."""
        calls = copy.deepcopy(self._program.module_call_graph)
        names = {node.name for node in graph.nodes}
        for call in calls:
            signature = call.signature
            args = () if signature is None else (*signature.inputs, *signature.outputs)
            if any(isinstance(each, TensorArgument) and each.name not in names for each in args):
                call.signature = None
        return calls


def _insert(tensors: dict[str, Any], target: str, value: Any) -> None:
    """Put a tensor behind those of the same module."""
    owner = parent_name(target)[0]
    keys = list(tensors)
    beside = [i for i, key in enumerate(keys) if parent_name(key)[0] == owner]
    keys.insert(beside[-1] + 1 if beside else len(keys), target)
    old = dict(tensors)
    tensors.clear()
    tensors.update({key: old.get(key, value) for key in keys})


def _kind(value: Any) -> str:
    """A tensor's type and shape in words."""
    if not isinstance(value, torch.Tensor):
        return f"a {type(value).__name__}"
    sizes = ", ".join(map(str, value.shape))
    return f"a tensor of {str(value.dtype).removeprefix('torch.')} and shape [{sizes}]"


def _evaluate_on_fakes(
    view: GraphView, node: fx.Node, known: Mapping[fx.Node, Any], like: fx.Node
) -> Any:
    """What a node gives for the fake tensors that are recorded, or for others that are `known`.

    `like` is a node that a fake tensor is recorded of.

    Raises:
        Exception: whatever running it raises, an operator that has no form without data included.
    """
    mode = mode_of(like.meta["val"])
    if mode is None:
        raise ValueError(f"nothing is known of {like.name}")
    return value_on_fakes(view, node, mode, known)
