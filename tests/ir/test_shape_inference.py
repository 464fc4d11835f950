"""The shapes and types that are found for values are those of a run, and finding them is cheap."""

from __future__ import annotations

from typing import Any

import nets
import pytest
import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional as F

from fxrewrite.ir.fake_values import run_on_fakes
from fxrewrite.ir.shape_inference import record_shapes


class Net(nn.Module):
    """Layers and functions of each kind, of which some write in place."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.up = nn.Conv2d(4, 6, 3, 2, 1), nn.ConvTranspose2d(6, 4, 2, 2, bias=False)
        self.bn, self.act = nn.BatchNorm2d(6), nn.ReLU(inplace=True)
        self.pool, self.linear, self.norm = nn.AvgPool2d(2), nn.Linear(4, 3), nn.LayerNorm(3)
        self.drop, self.frozen = nn.Dropout(), nn.BatchNorm1d(3)

    def forward(self, x: Any) -> Any:
        y = self.act(self.bn(self.conv(x)))
        y = torch.cat([self.up(y), F.relu(x), x * 0.5], dim=1) + 1
        y = self.pool(y)[:, :4].flatten(2).transpose(1, 2)
        y = self.frozen(self.linear(self.drop(y)).mean(1))
        return self.norm(y).softmax(-1).to(torch.float64).add(y)


def recorded(model: nn.Module, x: torch.Tensor) -> dict[str, Any]:
    """What is found of the values of a model that is traced."""
    traced = fx.symbolic_trace(model)
    assert record_shapes(traced, [x]) is None
    return {node.name: node.meta.get("val") for node in traced.graph.nodes}


def run(model: nn.Module, x: torch.Tensor) -> dict[str, Any]:
    """The same of a run; what is written to in place is looked at when it is made."""
    found: dict[str, Any] = {}

    class Noting(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            made = super().run_node(n)
            found[n.name] = made.detach() if isinstance(made, torch.Tensor) else None
            return made

    Noting(fx.symbolic_trace(model)).run(x)
    return found


def kind(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return None
    return tuple(value.shape), value.dtype, value.device, value.stride()


INPUTS = {
    "usual": nets.random_input((2, 4, 8, 8)).float(),
    "channels last": nets.random_input((2, 4, 8, 8)).float().to(memory_format=torch.channels_last),
    "one number": nets.random_input((1, 4, 2, 2)).float(),
    "expanded": nets.random_input((1, 4, 8, 8)).float().expand(3, -1, -1, -1),
}


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("cast", [False, True])
def test_what_is_found_is_what_a_run_gives(name: str, cast: bool) -> None:
    """Shape, type, device and strides of each value, under autocast too."""
    model, x = Net().eval(), INPUTS[name]
    if name == "one number":
        model.pool = nn.Identity()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=cast):
        found, expected = recorded(model, x), run(model, x)
    assert found.keys() >= expected.keys()
    for key in expected:
        # Of the order in memory torch's own fake tensors tell less.
        if cast or name in ("channels last", "one number"):
            assert key == "output" or kind(found[key])[:3] == kind(expected[key])[:3], key
        elif key != "output":
            assert kind(found[key]) == kind(expected[key]), key
    assert all(isinstance(each, FakeTensor) for key, each in found.items() if key != "output")


def test_what_changes_a_shape_in_place_changes_no_other_record() -> None:
    """A value that is squeezed in place later is recorded as it was, and so is its alias."""

    class Squeezing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.act = nn.Conv2d(4, 4, 3), nn.ReLU(inplace=True)

        def forward(self, x: Any) -> Any:
            y = self.conv(x)
            z = self.act(y)
            z.squeeze_(-1)
            return y + 1, z

    model, x = Squeezing().eval(), torch.randn(2, 4, 3, 3)
    with torch.no_grad():
        found, expected = recorded(model, x), run(model, x)
    for key in ("conv", "act", "squeeze_", "add"):
        assert found[key].shape == expected[key].shape, key


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.Conv2d(4, 4, 1), torch.randn(2, 3, 5, 5)),
        (nn.Conv2d(4, 4, 1).double(), torch.randn(2, 4, 5, 5)),
        (nn.BatchNorm2d(4), torch.randn(2, 4, 5)),
        (nn.Linear(4, 2), torch.randn(2, 3)),
    ],
)
def test_what_a_layer_does_not_take_is_known_of_no_value(layer: nn.Module, x: Any) -> None:
    """What raises when it runs gives no shape."""
    with pytest.raises((RuntimeError, ValueError)), torch.no_grad():
        layer(x)
    traced = fx.symbolic_trace(nn.Sequential(layer))
    with torch.no_grad():
        assert record_shapes(traced, [x]) is not None
        fake = FakeTensorMode().from_tensor(x)
        with pytest.raises((RuntimeError, ValueError)):
            run_on_fakes(layer, [fake], {})


def test_what_torch_is_slow_to_tell_is_not_asked_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of layers, activations and what joins them, no operation goes through the fake mode."""
    asked: list[str] = []
    dispatch = FakeTensorMode.dispatch

    def noted(self: Any, func: Any, *args: Any, **kwargs: Any) -> Any:
        asked.append(str(func))
        return dispatch(self, func, *args, **kwargs)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn, self.act = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(True)

        def forward(self, x: Any) -> Any:
            y = self.act(self.bn(self.conv(x)))
            return torch.cat([F.avg_pool2d(y + x, 2), F.max_pool2d(x, 2)], 1)

    traced, x = fx.symbolic_trace(Block().eval()), torch.randn(2, 4, 6, 6)
    with torch.no_grad():
        record_shapes(traced, [x])
        monkeypatch.setattr(FakeTensorMode, "dispatch", noted)
        record_shapes(traced, [x])
    assert [each for each in asked if "detach" not in each and "empty" not in each] == []
