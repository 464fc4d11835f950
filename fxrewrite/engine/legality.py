"""What must hold of a site before any rule may rewrite it; each check gives the reason it does not.

This is the one place that knows of sharing, readers, hooks, modes and in-place writes. A rule's own
guards say only what is special to the rule.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx, nn

from ..ir.aliases import is_fresh, written_by
from ..ir.describe import describe
from ..ir.graph_view import GraphView
from ..ir.op_traits import traits_of_module
from ..ir.tensor_metadata import reads_metadata_only
from ..module_utils.hooks import PLAIN_TENSORS, has_hooks, runs_its_forward_alone
from ..module_utils.subclassing import differs
from ..module_utils.torch_private import global_hook_refusal, has_tensor_hook
from .match import Site


def refusal(site: Site, view: GraphView, *, any_mode: bool) -> str | None:
    """Why this site must stay as it is, or None."""
    return (
        global_hook_refusal()
        or _other_reader(site, view)
        or _extra_arguments(site, view)
        or _module_refusal(site, view, any_mode)
        or _written_constant(site, view)
        or _hazard(site, view)
    )


def written_meanwhile(
    site: Site, place: fx.Node, view: GraphView, reads: Iterable[fx.Node]
) -> str | None:
    """Why these values, which the chain reads, may not be read as late as at this node, or None."""
    write = view.write_between(site.first, place, reads, site.nodes)
    if write is None:
        return None
    return f"{describe(write, view)} writes in place to what the chain reads"


def _other_reader(site: Site, view: GraphView) -> str | None:
    """A value inside the chain has one reader, the next step; what it starts from may have more."""
    nodes = site.nodes
    for link in site.links[1:]:
        for source in link.sources:
            if len(source.users) > 1 and source is not site.input:
                for user in source.users:
                    may_move = not site.pattern.branches and reads_metadata_only(user, source, view)
                    if user is not link.node and not may_move:
                        return (
                            f"the output of {describe(source, view)} is also read by "
                            f"{describe(user, view)}, which needs it as it is"
                        )
    for link in site.links:
        if any(value in nodes for value in link.side_inputs) or nodes.count(link.node) > 1:
            reader = link.node if link.side_inputs else next(iter(link.node.users))
            return f"{describe(reader, view)} reads the chain by more than one argument"
    return None


def _extra_arguments(site: Site, view: GraphView) -> str | None:
    """A module step is called with the chain's value alone; its capture could not show more."""
    for link in site.links:
        if not link.step.captures_call and len(link.node.args) + len(link.node.kwargs) > 1:
            extra = ", ".join(name for name in view.arguments(link.node) if name != link.takes)
            return f"{describe(link.node, view)} is called with a further argument: {extra}"
    return None


def _module_refusal(site: Site, view: GraphView, any_mode: bool) -> str | None:
    called = [(link, link.module) for link in site.links if link.module is not None]
    fixed = any(not module.training and not _has_no_mode(module) for _, module in called)
    for link, module in called:
        inner = module.modules() if module._modules else (module,)
        reasons = (_state_refusal(each, view, any_mode, fixed) for each in inner)
        reason = next(filter(None, reasons), None) or differs(module, link.step.modules)
        if reason is not None:
            return f"{link.node.target} {reason}"
    return None


def _state_refusal(module: nn.Module, view: GraphView, any_mode: bool, fixed: bool) -> str | None:
    if (hook := has_hooks(module, ignoring_norms=True)) is not None:
        if any(isinstance(each, nn.UninitializedParameter) for each in module.parameters()):
            return "is not initialised yet; run the model once, then rewrite it"
        return f"carries {hook}, which a rewrite would bypass; remove it first"
    if "forward" in module.__dict__:
        return "has a forward of its own, set on the instance"
    if module.training and not (any_mode or (fixed and _has_no_mode(module))):
        return "is in training mode, where its output is not a fixed function; call model.eval()"
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is None:
            continue
        if type(tensor) not in PLAIN_TENSORS:
            return f"holds {name}, a tensor of the subclass {type(tensor).__name__}"
        if id(tensor) in view.written_tensors:
            return f"holds {name}, which the model writes to in its forward"
        if id(tensor) in view.held_inside:
            return (
                f"holds {name}, to which a module that is kept whole may write, for it holds it too"
            )
        if has_tensor_hook(tensor):
            return f"holds {name}, a tensor with a hook, which a rewrite would bypass; remove it"
    return None


def _has_no_mode(module: nn.Module) -> bool:
    traits = traits_of_module(module)
    known = traits.layer or (traits.activation and traits.keeps)  # which no row with a mode says
    return bool(known) and runs_its_forward_alone(module)


def _written_constant(site: Site, view: GraphView) -> str | None:
    """What a call step reads of the model's own tensors is a constant to the rule."""
    if not view.written_values:
        return None
    for link in site.links:
        pending = [each for each in link.node.all_input_nodes if view.is_constant(each)]
        while pending:
            each = pending.pop()
            is_tensor = each.op == "get_attr"
            if each in view.written_values or (
                is_tensor and id(view.attribute(each)) in view.written_tensors
            ):
                what = each.target if is_tensor else describe(each, view)
                return f"{describe(link.node, view)} reads {what}, which the model writes to"
            pending += each.all_input_nodes
    return None


def _hazard(site: Site, view: GraphView) -> str | None:
    """No write in place may tell the chain from what replaces it."""
    nodes = set(site.nodes)
    for link in site.links:
        for value in written_by(link.node, view):
            if (seen := view.seen_elsewhere(value, nodes)) is not None:
                return f"{describe(link.node, view)} writes in place to {describe(seen, view)}"
        # Of what branches share, a write by one would be read by the next.
        if link.branch and view.touches(link.node, site.input):
            return f"{describe(link.node, view)} writes in place to what its branches share"
    reads = [side for link in site.links for side in link.side_inputs]
    if site.pattern.branches or not is_fresh(site.first, view):
        reads.append(site.input)
    return written_meanwhile(site, site.last, view, reads)
