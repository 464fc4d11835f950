"""Shapes and dtypes of a graph's values, without computing anything."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, ShapeEnv
from torch.fx.immutable_collections import immutable_dict, immutable_list
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from ..module_utils.state import Snapshot
from ..module_utils.torch_private import DEPENDS_ON_DATA, FakeTensor, FakeTensorMode, pytree
from .aliases import writes_in_place
from .fake_values import function_on_fakes, layer_on_fake, meta_like
from .op_traits import traits_of


class _Propagation(FakeTensorProp):
    """Runs a graph on fake tensors, but what is known well on meta tensors, which is faster."""

    def run_node(self, n: fx.Node) -> Any:
        value = self._quickly(n)
        if value is None:
            with self._mode:
                return super().run_node(n)
        # What is recorded must not change with what the graph does to the value in place.
        n.meta["val"] = value
        if n.op == "call_module" and writes_in_place(self.fetch_attr(str(n.target))):
            return self.env[n.all_input_nodes[0]]
        return FakeTensor(value.fake_mode, meta_like(value), value.device)

    def _quickly(self, n: fx.Node) -> FakeTensor | None:
        if not n.op.startswith("call_"):
            return None
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        if n.op == "call_module":
            is_plain = len(args) == 1 and not kwargs
            return layer_on_fake(self.fetch_attr(str(n.target)), args[0]) if is_plain else None
        traits = traits_of(n, None)
        if not traits.fresh or traits.gives != "tensor" or traits.writes or kwargs.keys() & {"out"}:
            return None
        called = getattr(torch.Tensor, str(n.target)) if n.op == "call_method" else n.target
        return function_on_fakes(called, args, kwargs)

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        # A graph's own lists can't be written to; code made of it gives a new one in each run.
        args, kwargs = super().fetch_args_kwargs_from_env(n)
        return _mutable(tuple(args)), _mutable(dict(kwargs))

    def placeholder(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return {} if str(target).startswith("**") else super().placeholder(target, args, kwargs)

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # Hooks are the user's, and must not see fake tensors.
        return self.fetch_attr(target).forward(*args, **kwargs)


def record_shapes(module: fx.GraphModule, example_inputs: Sequence[Any]) -> str | None:
    """Record shape and dtype of each value in `node.meta["val"]`, as far as they can be found.

    Args:
        module: a graph module; what running it changes is put back.
        example_inputs: its positional arguments. Tensors are only asked for shape and dtype.

    Returns:
        Why the shapes of some values are not known, as where data decides them, or None.
    """
    taken = module.graph.find_nodes(op="placeholder")
    is_open = any(str(node.target).startswith("*") for node in taken)
    if len(example_inputs) > len(taken) and not is_open:
        return f"it takes {len(taken)} arguments, not {len(example_inputs)}"
    before = Snapshot({"": module}, skipped=("_parameters",))
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
    propagation = _Propagation(module, mode)
    reason = None
    with before, before:  # Ctrl-C may come while the inner one is putting things back
        try:
            with mode:
                fakes = pytree.tree_map_only(
                    torch.Tensor,
                    lambda each: mode.from_tensor(each, static_shapes=True),
                    tuple(example_inputs),
                )
            propagation.run(*fakes)
        except (*DEPENDS_ON_DATA, GuardOnDataDependentSymNode):
            reason = "data decides them"
        except Exception as error:
            reason = str(error).partition("\n")[0]
        before.restore()
    return reason


def _mutable(value: Any) -> Any:
    """The same nested lists and dictionaries as plain ones."""
    if isinstance(value, immutable_list):
        return [_mutable(each) for each in value]
    if type(value) is tuple:
        return tuple(map(_mutable, value))
    if isinstance(value, immutable_dict) or type(value) is dict:
        return {key: _mutable(each) for key, each in value.items()}
    return value
