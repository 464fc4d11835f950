"""Shapes and dtypes of a graph's values, without computing anything."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, ShapeEnv
from torch.fx.immutable_collections import immutable_dict, immutable_list
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from ..errors import FxRewriteError
from ..module_utils.state import Snapshot
from ..module_utils.torch_private import DEPENDS_ON_DATA, FakeTensorMode


class _Propagation(FakeTensorProp):
    def fetch_args_kwargs_from_env(self, n: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        # A graph's own lists can't be written to; code made of it gives a new one in each run.
        args, kwargs = super().fetch_args_kwargs_from_env(n)
        return _mutable(tuple(args)), _mutable(dict(kwargs))

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # Hooks are the user's, and must not see fake tensors.
        return self.fetch_attr(target).forward(*args, **kwargs)


def record_shapes(module: fx.GraphModule, example_inputs: Sequence[Any]) -> None:
    """Record shape and dtype of each value in `node.meta["val"]`, as far as no data decides them.

    Args:
        module: a graph module; what running it changes is put back.
        example_inputs: its positional arguments. Tensors are only asked for shape and dtype.

    Raises:
        FxRewriteError: the model can't be called with such inputs.
    """
    taken = sum(node.op == "placeholder" for node in module.graph.nodes)
    if len(example_inputs) > taken:
        raise FxRewriteError(
            f"the model can't be called with these example_inputs: it takes {taken} arguments, "
            f"not {len(example_inputs)}"
        )
    before = Snapshot({"": module}, skipped=("_parameters",))
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
    propagation = _Propagation(module, mode)
    with before, before:  # Ctrl-C may come while the inner one is putting things back
        try:
            with mode:
                fakes = [
                    mode.from_tensor(each, static_shapes=True)
                    if isinstance(each, torch.Tensor)
                    else each
                    for each in example_inputs
                ]
            propagation.propagate_dont_convert_inputs(*fakes)
        except (*DEPENDS_ON_DATA, GuardOnDataDependentSymNode):
            pass  # the values before this one are known, and rules learn that the others are not
        except Exception as error:
            said = str(error).partition("\n")[0]
            raise FxRewriteError(
                f"the model can't be called with these example_inputs: {said}"
            ) from error
        before.restore()


def _mutable(value: Any) -> Any:
    """The same nested lists and dictionaries as plain ones."""
    if isinstance(value, immutable_list):
        return [_mutable(each) for each in value]
    if type(value) is tuple:
        return tuple(map(_mutable, value))
    if isinstance(value, immutable_dict) or type(value) is dict:
        return {key: _mutable(each) for key, each in value.items()}
    return value
