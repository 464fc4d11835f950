"""Spell what rules put into a graph of torch operators as torch operators."""

from __future__ import annotations

import operator
from collections.abc import Container
from typing import Any

import torch
from torch import fx
from torch.export import default_decompositions
from torch.fx.experimental.proxy_tensor import make_fx

from ..errors import FxRewriteError
from ..ir.describe import describe
from ..ir.fake_values import mode_of, recorded, renew
from ..ir.graph_view import GraphView
from ..module_utils.torch_private import FakeTensorMode, HigherOrderOperator, OpOverload

_OPERATORS = (OpOverload, HigherOrderOperator)


def known_values(view: GraphView, nodes: list[fx.Node]) -> tuple[list[Any], FakeTensorMode]:
    """What is recorded of these nodes, tensors of the model among them, and the mode of it all."""
    mode = mode_of(*(node.meta.get("val") for node in nodes))
    if mode is None:
        raise ValueError(f"nothing is known of {', '.join(map(str, nodes))}")
    return [recorded(view, node, mode) for node in nodes], mode


def legalise(
    view: GraphView, own: Container[fx.Node], names: Container[str], *, pre_dispatch: bool
) -> None:
    """Trace each call of a module, method or Python function down to operators, in place.

    Args:
        view: a graph whose values are known as fake tensors.
        own: the nodes that the graph had before; they are legal as they are.
        names: the tensors that it read; a new one may take the name of one that is read no more.
        pre_dispatch: whether the operators are those of a program that is not decomposed yet.

    Raises:
        FxRewriteError: a call can't be traced.
    """
    for node in list(view.graph.nodes):
        is_function = node.op == "call_function" and node.target is not operator.getitem
        is_legal = node in own or isinstance(node.target, _OPERATORS)
        if node.op in ("call_module", "call_method") or (is_function and not is_legal):
            _legalise(view, node, names, pre_dispatch)


def _legalise(view: GraphView, node: fx.Node, names: Container[str], pre_dispatch: bool) -> None:
    module = view.module(node)
    view.count(node, -1)
    inputs = list(node.all_input_nodes)
    mode = known_values(view, inputs)[1]
    # The tensors of a module are inputs of what is traced, so that the graph reads them by name.
    tensors: dict[str, torch.Tensor] = {}
    if module is not None:
        tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    with view.graph.inserting_before(node):
        read = []
        for name, each in tensors.items():
            target = f"{node.target}.{name}"
            if target not in names or view.is_used(target):
                target = view.free_name(target)
            read.append(_attribute(view, target, each))
        renew(view, read, mode)
        inputs += read
        traced = _traced(view, node, inputs, list(tensors), pre_dispatch)
        for each in traced.graph.find_nodes(op="get_attr"):  # tensors that the function made
            target = view.free_name(f"{node.name}_constant")
            constant = _attribute(view, target, getattr(traced, str(each.target)))
            each.target = constant.target
            view.graph.erase_node(constant)
        places = dict(zip(traced.graph.find_nodes(op="placeholder"), inputs, strict=True))
        result = view.graph.graph_copy(traced.graph, places)
    if isinstance(result, fx.Node):
        result.meta.update({k: v for k, v in node.meta.items() if k not in result.meta})
        node.replace_all_uses_with(result)
    for item in list(node.users):  # of a function that gives several values
        several: Any = result
        item.replace_all_uses_with(several[item.args[1]])
        view.graph.erase_node(item)
    view.graph.erase_node(node)


def _attribute(view: GraphView, target: str, tensor: torch.Tensor) -> fx.Node:
    view.place(target, tensor)
    node = view.graph.create_node("get_attr", target)
    view.count(node, +1)
    return node


def _traced(
    view: GraphView, node: fx.Node, inputs: list[fx.Node], names: list[str], pre_dispatch: bool
) -> fx.GraphModule:
    """A graph of operators that does what the node does to its inputs and a module's tensors."""
    module = view.module(node)

    def function(*values: Any) -> Any:
        known = dict(zip(inputs, values, strict=True))
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), known.__getitem__)
        if module is not None:
            tensors = dict(zip(names, values[len(values) - len(names) :], strict=True))
            return torch.func.functional_call(module, tensors, args, kwargs)
        is_method = node.op == "call_method"
        called: Any = getattr(torch.Tensor, str(node.target)) if is_method else node.target
        return called(*args, **kwargs)

    table: Any = None if pre_dispatch else default_decompositions()
    values, mode = known_values(view, inputs)
    try:
        with mode:
            return make_fx(function, table, pre_dispatch=pre_dispatch)(*values)
    except Exception as error:
        raise FxRewriteError(
            f"{describe(node, view)} can't be spelt in operators, as a program has to be: {error}"
        ) from error
