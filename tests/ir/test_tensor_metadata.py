"""What keeps a value's shape, dtype and device, what asks for these alone, what may change them."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

from fxrewrite.ir.graph_view import GraphView
from fxrewrite.ir.op_traits import CALLS, MODULES
from fxrewrite.ir.tensor_metadata import may_change, reads_metadata_only


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int64, torch.complex64])
@pytest.mark.parametrize("size", [(2, 4), (2, 4, 3), (4, 3, 5), (2, 4, 3, 5), (2, 4, 3, 5, 2)])
@pytest.mark.parametrize("kind", [kind for kind, row in MODULES.items() if row.keeps == "metadata"])
@pytest.mark.filterwarnings("ignore:dropout")
def test_what_keeps_the_shape(kind: Any, size: tuple[int, ...], dtype: torch.dtype) -> None:
    """A module that is said to keep shape, dtype and device does, or raises."""
    takes = (4,) if issubclass(kind, nn.modules.batchnorm._NormBase) else ()
    module, x = kind(*takes), torch.ones(size).to(dtype)
    for each in (module.eval(), module.to(dtype) if dtype.is_floating_point else module):
        for autocast in (False, True):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                try:
                    y = each(x)
                except (RuntimeError, ValueError, TypeError):
                    continue
                assert (y.shape, y.dtype, y.device) == (x.shape, x.dtype, x.device)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int64, torch.complex64])
@pytest.mark.parametrize(
    "name", sorted(name for name, row in CALLS.items() if row.keeps == "metadata")
)
def test_what_function_keeps_the_shape(name: str, dtype: torch.dtype) -> None:
    """So does each function of that name, and each method."""
    x = torch.ones(2, 4, 3, 5).to(dtype)
    more = (torch.ones(4), torch.ones(4)) if name == "batch_norm" else ()
    callees = [getattr(holder, name, None) for holder in (F, torch, torch.Tensor)]
    assert any(callees)
    for callee in filter(None, callees):
        try:
            y = callee(x, *more)
        except (RuntimeError, TypeError):
            continue
        assert (y.shape, y.dtype, y.device) == (x.shape, x.dtype, x.device)


class Odd(nn.Module):
    """Says that it writes in place, and may do more."""

    def __init__(self) -> None:
        super().__init__()
        self.inplace = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class Leaves(fx.Tracer):
    """Traces into no module."""

    def is_leaf_module(self, m: nn.Module, name: str) -> bool:
        return True


class Two(nn.Module):
    """A forward of two values."""

    def __init__(self, forward: Any) -> None:
        super().__init__()
        self.of = forward
        self.layer, self.act, self.odd = nn.Linear(3, 3), nn.ReLU(inplace=True), Odd()
        self.block = nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True))

    def forward(self, x: Any, y: Any) -> Any:
        return self.of(self, x, self.layer(y))


def last_of(forward: Any) -> tuple[fx.Node, fx.Node, GraphView]:
    """The last call of a forward of x and what a layer gives, that value, and the graph."""
    model = Two(forward)
    graph = Leaves().trace(model)
    value = next(node for node in graph.nodes if node.target == "layer")
    return list(graph.nodes)[-2], value, GraphView(model, graph, {})


@pytest.mark.parametrize(
    ("forward", "expected"),
    [
        (lambda m, x, y: y.shape, True),
        (lambda m, x, y: y.mT, False),
        (lambda m, x, y: torch.numel(y), True),
        (lambda m, x, y: torch.ops.aten.sym_size.int(y, 0), True),
        (lambda m, x, y: x.view_as(y), True),
        (lambda m, x, y: y.view_as(x), False),
        (lambda m, x, y: y.to(torch.float32), False),
        (lambda m, x, y: x.to(torch.float32, y), False),
        (lambda m, x, y: torch.full_like(y, 0), True),
        (lambda m, x, y: torch.full_like(x, y), False),
        (lambda m, x, y: torch.ops.aten.full_like.default(y, 0), True),
        (lambda m, x, y: x.new_full((2,), y), False),
        (lambda m, x, y: y.new_full((2,), y), False),
        (lambda m, x, y: y.stride(), False),
        (lambda m, x, y: m.act(y), False),
    ],
)
def test_what_asks_for_metadata_alone(forward: Any, expected: bool) -> None:
    """It depends on the argument by which the value comes in."""
    assert reads_metadata_only(*last_of(forward)) == expected


@pytest.mark.parametrize(
    ("forward", "expected"),
    [
        (lambda m, x, y: m.act(y), False),
        (lambda m, x, y: m.block(y), False),
        (lambda m, x, y: m.odd(y), True),
        (lambda m, x, y: y.mul_(2), False),
        (lambda m, x, y: F.relu(y, inplace=True), False),
        (lambda m, x, y: torch.ops.aten.add_.Tensor(y, x), False),
        (lambda m, x, y: operator.iadd(y, x), False),
        (lambda m, x, y: torch.mul(x, 2, out=y), True),
        (lambda m, x, y: y.t_(), True),
        (lambda m, x, y: torch.ops.aten.squeeze_.default(y), True),
        (lambda m, x, y: y.resize_(2), True),
        (lambda m, x, y: y.set_(x), True),
    ],
)
def test_what_may_change_a_shape_in_place(forward: Any, expected: bool) -> None:
    """Of what is not known to write numbers alone, that is assumed."""
    node, _, view = last_of(forward)
    assert may_change(node, view) == expected
