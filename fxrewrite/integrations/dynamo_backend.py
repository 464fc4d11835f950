"""Rules for `torch.compile`, around a backend."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import fx, nn

from ..ir.graph_view import GraphView
from ..module_utils.hooks import PLAIN_TENSORS
from ..module_utils.state import bits
from ..module_utils.torch_private import disable_current_modes, is_static_input, version_of
from ..pipeline.applying import apply
from ..pipeline.rule_lists import apart
from ..rules.registry import Rules, RuleSet, resolve
from ..targets.graph_inputs import Input, as_inputs
from ..targets.graph_module import graph_module
from ..targets.graph_target import GraphTarget
from ..tracing.tracer import copy_of

# So many numbers of each tensor are looked at in each call.
_SAMPLE = 8

_log = logging.getLogger("fxrewrite")

Compiled = Callable[..., Any]


def backend(rules: Rules, inner: str | Callable[..., Any] = "inductor") -> Callable[..., Compiled]:
    """A backend for `torch.compile` that applies rules to each graph and hands it on.

    Parameters and buffers are inputs of the graphs that are compiled. Where no gradient can flow
    to one, under `torch.no_grad()` say, rules are given it as a constant. Each call of the compiled
    model then checks that these tensors are the very same, written to by nobody since, and has the
    rules make their new tensors again where they are not. A write that torch does not count, by way
    of `.data` or NumPy, is noticed by some numbers of each tensor that are looked at.

    >>> import fxrewrite as fxr
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)).eval()
    >>> compiled = torch.compile(model, backend=fxr.integrations.backend("conv_bn", inner="eager"))
    >>> with torch.no_grad():
    ...     compiled(torch.ones(1, 3, 4, 4)).shape
    torch.Size([1, 8, 4, 4])

    Args:
        rules: as in `rewrite`.
        inner: the backend that compiles what the rules leave, by name or as a function.

    Raises:
        UnknownRuleSetError: no rule set has the given name.
        torch._dynamo.exc.InvalidBackend: no backend has the name `inner`.
    """
    from ..module_utils.torch_private import lookup_backend  # which takes seconds to import

    rule_sets = apart(resolve(rules))
    compile_inner = lookup_backend(inner)

    def compile_graph(graph_module: fx.GraphModule, example_inputs: Sequence[Any]) -> Compiled:
        rewriting = _Rewriting(graph_module, rule_sets)
        made = rewriting.of(example_inputs)
        if made is None:
            return compile_inner(graph_module, list(example_inputs))
        return _Compiled(rewriting, made, example_inputs, compile_inner)

    return compile_graph


@attrs.frozen(eq=False)
class _Made:
    """What rules made of a graph: a graph module that takes some of its inputs, and new tensors.

    The new `tensors` are attributes of it. `watched` are the inputs that rules may have gone by.
    """

    module: fx.GraphModule
    kept: tuple[int, ...]
    tensors: tuple[torch.Tensor, ...]
    watched: tuple[int, ...]

    @property
    def form(self) -> str:
        """All but what the new tensors hold."""
        told = [(each.shape, each.stride(), each.dtype, each.device) for each in self.tensors]
        return f"{self.module.graph} {self.kept} {self.watched} {told}"


class _Rewriting:
    """Applies rules to a graph whose parameters and buffers are among its inputs."""

    def __init__(self, graph_module: fx.GraphModule, rule_sets: Sequence[RuleSet]) -> None:
        self.graph_module = graph_module
        self._rule_sets = rule_sets

    def of(self, inputs: Sequence[Any]) -> _Made | None:
        """What becomes of the graph with these inputs; None where no rule is applied."""
        placeholders = self.graph_module.graph.find_nodes(op="placeholder")
        constants = {
            node.name: value
            for node, value in zip(placeholders, inputs, strict=True)
            if _is_constant(node, value)
        }
        graph = copy_of(self.graph_module.graph)
        for node in graph.nodes:
            if "example_value" in node.meta:
                node.meta.setdefault("val", node.meta["example_value"])
            if node.op == "placeholder" and node.name in constants:
                node.op, node.target = "get_attr", node.name
        with disable_current_modes(), torch.inference_mode(False), torch.no_grad():
            view = GraphView(self.graph_module, graph, constants)
            view.sizes_are_fixed = True  # dynamo looks after that
            view.is_training = False  # each call says its mode by an argument
            read_by = _constants_read(view)
            applied = apply({view: GraphTarget(view)}, self._rule_sets, view.modules)
            if not applied.sites:
                return None
            kept, tensors = self._flatten(view, constants)
            module = graph_module(view)
        module.meta.pop("dynamo_compile_id", None)  # it vouches for inputs as dynamo made them
        for node in module.graph.nodes:
            if "val" in node.meta:
                node.meta["example_value"] = node.meta.pop("val")
        sites = [finding.nodes for _, finding in applied.sites]
        seen = {name for nodes in sites for node in nodes for name in read_by.get(node, ())}
        watched = tuple(i for i, node in enumerate(placeholders) if node.name in seen)
        _log.info("applied %d rules to a graph of %d nodes", len(sites), len(graph.nodes))
        return _Made(module, kept, tensors, watched)

    def _flatten(
        self, view: GraphView, constants: Mapping[str, torch.Tensor]
    ) -> tuple[tuple[int, ...], tuple[torch.Tensor, ...]]:
        """Make inputs again of those that are read; gives which these are, and the new tensors."""
        standing: dict[str, list[fx.Node]] = {}
        for node in view.graph.nodes:
            is_tensor = node.op == "get_attr" and isinstance(view.attribute(node), torch.Tensor)
            if node.op == "placeholder" or (is_tensor and node.users):
                standing.setdefault(str(node.target), []).append(node)
        inputs, kept = [], []
        for i, node in enumerate(self.graph_module.graph.find_nodes(op="placeholder")):
            name = node.name if node.name in constants else str(node.target)
            # A new tensor may have the name of the one that it replaces.
            is_new = name in constants and view.value(name) is not constants[name]
            if name in standing and not is_new:
                inputs.append(Input(node.name, dict(node.meta), standing.pop(name)))
                kept.append(i)
        view.graph, _ = as_inputs(view.graph, inputs)
        return tuple(kept), tuple(view.value(name) for name in standing)


class _Samples:
    """Some numbers of each tensor, by which writes are seen that torch does not count."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._views: dict[tuple[torch.dtype, torch.device], list[torch.Tensor]] = {}
        for each in tensors:
            flat = each.detach().flatten()
            if flat.numel() and flat.data_ptr() == each.data_ptr():  # otherwise it is a copy
                sample = flat[:: max(1, flat.numel() // _SAMPLE)]
                self._views.setdefault((each.dtype, each.device), []).append(sample)
        self._before = self._now()

    def differ(self) -> bool:
        """Whether one of them is another number than before."""
        return any(not torch.equal(a, b) for a, b in zip(self._before, self._now(), strict=True))

    def _now(self) -> list[torch.Tensor]:
        return [bits(torch.cat(views)) for views in self._views.values()]


class _Compiled:
    """What a graph was compiled into, and the tensors that the rules went by."""

    def __init__(
        self,
        rewriting: _Rewriting,
        made: _Made,
        inputs: Sequence[Any],
        compile_inner: Callable[..., Compiled],
    ) -> None:
        self._rewriting, self._made, self._form = rewriting, made, made.form
        self._stamps = self._stamped(inputs)
        self._samples = _Samples([each for each, *_ in self._stamps])
        self._is_valid = True
        self._run = compile_inner(made.module, [inputs[i] for i in made.kept])

    def __call__(self, *inputs: Any) -> Any:
        """Run it; where the model's tensors have changed, renew those that were made of them."""
        now = self._stamped(inputs)
        stamps = zip(now, self._stamps, strict=True)
        if any(a is not b or x != y for (a, *x), (b, *y) in stamps) or self._samples.differ():
            self._renew(inputs)
        if not self._is_valid:
            return self._rewriting.graph_module(*inputs)
        return self._run(*(inputs[i] for i in self._made.kept))

    def _stamped(self, inputs: Sequence[Any]) -> list[tuple[Any, ...]]:
        """The watched tensors, each with what tells that it was written to."""
        watched = (inputs[i] for i in self._made.watched)
        return [(each, version_of(each), each.data_ptr(), each.requires_grad) for each in watched]

    def _renew(self, inputs: Sequence[Any]) -> None:
        made = self._rewriting.of(inputs)
        self._stamps = self._stamped(inputs)
        self._samples = _Samples([each for each, *_ in self._stamps])
        self._is_valid = made is not None and made.form == self._form
        if made is not None and self._is_valid:
            with torch.inference_mode(False), torch.no_grad():
                for old, new in zip(self._made.tensors, made.tensors, strict=True):
                    old.copy_(new)
        else:
            # A second compilation would not know which sizes may vary.
            _log.warning("parameters have changed such that rules act otherwise; running eagerly")


def _is_constant(node: fx.Node, value: Any) -> bool:
    """Whether an input is a parameter or buffer, and no gradient can flow to it."""
    if type(value) not in PLAIN_TENSORS or value.is_inference():
        return False
    is_held = isinstance(value, nn.Parameter) or is_static_input(node)
    return is_held and not (value.requires_grad and torch.is_grad_enabled())


def _constants_read(view: GraphView) -> dict[str, set[str]]:
    """For each node the constants that it reads, or that constants which it reads are made of."""
    read: dict[str, set[str]] = {}
    for node in view.graph.nodes:
        if node.op == "get_attr":
            read[node.name] = {str(node.target)}
        else:
            inputs = (each for each in node.all_input_nodes if view.is_constant(each))
            read[node.name] = {name for each in inputs for name in read[each.name]}
    return read
