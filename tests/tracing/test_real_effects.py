"""What a forward really does while it is traced is in the graph, or there is no graph."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from nets import Forward, X, bn, conv, randomise
from torch import fx, nn
from torch.nn.modules.module import register_module_forward_hook

import fxrewrite as fxr
from fxrewrite.tracing.torch_state import TorchState

COUNT = 0


def batch_statistics(m: Any, x: torch.Tensor) -> Any:
    m.bn.train()
    y = m.bn(m.conv(x))
    m.bn.eval()
    return y


def hook(m: Any, x: torch.Tensor) -> Any:
    handle = m.conv.register_forward_hook(lambda module, args, output: output * 2)
    y = m.bn(m.conv(x))
    handle.remove()
    return y


def attribute(m: Any, x: torch.Tensor) -> Any:
    before, m.bn.eps = m.bn.eps, 1.0
    y = m.bn(m.conv(x))
    m.bn.eps = before
    return y


def own_forward(m: Any, x: torch.Tensor) -> Any:
    m.conv.forward = lambda x: x * 2
    y = m.bn(m.conv(x))
    del m.conv.forward
    return y


def inside_a_container(m: Any, x: torch.Tensor) -> Any:
    m.seq[1].momentum, m.seq[1].eps = 0.5, 1.0
    y = m.seq(x)
    m.seq[1].momentum, m.seq[1].eps = 0.1, 1e-5
    return y


STATES = [batch_statistics, hook, attribute, own_forward, inside_a_container]


def a_parameters_data(m: Any, x: torch.Tensor) -> Any:
    before, m.bn.weight.data = m.bn.weight.data, m.bn.weight.data * 2
    y = m.bn(m.conv(x))
    m.bn.weight.data = before
    return y


def a_note_on_a_value(m: Any, x: torch.Tensor) -> Any:
    y = m.bn(m.conv(x))
    y.scale = 2.0
    return y * y.scale


def gradients(m: Any, x: torch.Tensor) -> Any:
    torch.set_grad_enabled(not torch.is_grad_enabled())
    y = m.bn(m.conv(x))
    torch.set_grad_enabled(not torch.is_grad_enabled())
    return y


def default_dtype(m: Any, x: torch.Tensor) -> Any:
    torch.set_default_dtype(torch.float64)
    y = m.bn(m.conv(x)) * torch.ones(()).element_size()
    torch.set_default_dtype(torch.float32)
    return y


def autocast(m: Any, x: torch.Tensor) -> Any:
    torch.set_autocast_enabled("cpu", True)
    y = m.bn(m.conv(x))
    torch.set_autocast_enabled("cpu", False)
    return y


def determinism(m: Any, x: torch.Tensor) -> Any:
    torch.use_deterministic_algorithms(True, warn_only=True)
    y = m.bn(m.conv(x))
    torch.use_deterministic_algorithms(False)
    return y


def global_hook(m: Any, x: torch.Tensor) -> Any:
    handle = register_module_forward_hook(lambda module, args, y: y * 2 if module is m.bn else None)
    y = m.bn(m.conv(x))
    handle.remove()
    return y


OF_VALUES = [a_parameters_data, a_note_on_a_value]
OF_TORCH = [gradients, default_dtype, autocast, determinism, global_hook]
DRAWS: dict[str, Callable[[Any, Any], Any]] = {
    "torch.randn": lambda m, x: m.bn(m.conv(x)) + torch.randn(4, 1, 1),
    "a number": lambda m, x: m.bn(m.conv(x)) * torch.rand(1).item(),
    "in place": lambda m, x: m.bn(m.conv(x)) + torch.empty(4, 1, 1).uniform_(),
    "a generator": lambda m, x: m.bn(m.conv(x)) + torch.rand(4, 1, 1, generator=m.generator),
    "a permutation": lambda m, x: m.bn(m.conv(x))[:, torch.randperm(4)],
    "random": lambda m, x: m.bn(m.conv(x)) * (2.0 if random.random() < 0.5 else 1.0),
    "numpy": lambda m, x: m.bn(m.conv(x)) * float(np.random.rand()),
    "Python's own": lambda m, x: m.bn(m.conv(x)) * m.python.random(),
    "numpy's own": lambda m, x: m.bn(m.conv(x)) * float(m.numpy.random()),
    "numpy's older": lambda m, x: m.bn(m.conv(x)) * float(m.older.rand()),
}


def counted(m: Any, x: torch.Tensor) -> Any:
    global COUNT
    COUNT += 1
    return m.bn(m.conv(x)) * COUNT


ASKED: dict[str, Callable[[Any, Any], Any]] = {
    "inference mode": lambda m, x: (
        m.bn(m.conv(x)) * (2 if torch.is_inference_mode_enabled() else 1)
    ),
    "autocast": lambda m, x: m.bn(m.conv(x)) * (2 if torch.is_autocast_enabled("cpu") else 1),
    "default dtype": lambda m, x: (
        m.bn(m.conv(x)) * (2 if torch.get_default_dtype() is torch.float64 else 1)
    ),
    "a global": counted,
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.drop = conv(), bn(), nn.Dropout()
        self.seq = nn.Sequential(conv(), bn())
        self.generator = torch.Generator()
        self.python, self.numpy = random.Random(0), np.random.default_rng(0)
        self.older = np.random.RandomState(0)


def net(forward: Callable[..., Any]) -> Any:
    torch.manual_seed(0)
    kind = type("Net", (Net,), {"forward": forward})
    return randomise(kind()).double().eval()


def outputs(model: Any) -> list[torch.Tensor]:
    """What a model gives, twice, from fixed seeds."""
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    model.generator = torch.Generator().manual_seed(1)
    globals()["COUNT"] = 0
    return [model(X).detach(), model(X).detach()]


@pytest.mark.parametrize(
    "forward", [*STATES, *OF_VALUES, *OF_TORCH, *DRAWS.values(), *ASKED.values()]
)
def test_a_model_that_does_more_than_a_graph_can_goes_into_the_module_tree(forward: Any) -> None:
    """And computes there what it did."""
    model = net(forward)
    original = copy.deepcopy(model)
    made, report = fxr.rewrite(model, "conv_bn")
    assert report.into == "modules"
    for one, other in zip(outputs(made), outputs(original), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    with pytest.raises(fxr.errors.TraceError, match=r"test_real_effects\.py:\d+: "):
        fxr.rewrite(model, "conv_bn", into="graph")


@pytest.mark.parametrize("forward", STATES)
def test_the_error_names_what_was_changed(forward: Any) -> None:
    name = "seq" if forward is inside_a_container else "conv|bn"
    with pytest.raises(fxr.errors.TraceError, match=rf"it calls ({name}) after it has changed"):
        fxr.rewrite(net(forward), "conv_bn", into="graph")


@pytest.mark.parametrize("forward", DRAWS.values(), ids=DRAWS)
def test_of_a_model_with_a_part_that_draws_the_rest_is_rewritten(forward: Any) -> None:
    """Only that part is kept as it is, and it is the same numbers that it draws."""
    noisy = net(forward)
    model = nn.Sequential(conv(), bn(), noisy, conv(), bn()).double().eval()
    model.generator = None  # type: ignore[assignment]
    states = random.getstate(), np.random.get_state()[2], torch.get_rng_state()
    _, report = fxr.rewrite(randomise(model), "conv_bn")
    assert {"1", "4"} <= {each.anchor for each in report.applied}
    assert [each.name for each in report.stops] == ["2"]
    assert "it draws random numbers by" in report.stops[0].reason
    assert random.getstate() == states[0]
    assert np.random.get_state()[2] == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])


@pytest.mark.parametrize("forward", OF_TORCH)
def test_torchs_state_is_put_back_where_tracing_stops_in_a_forward(forward: Any) -> None:
    """Which then does not get to do so itself."""
    before = TorchState()
    fxr.rewrite(net(forward), "conv_bn")
    assert before.difference() is None


def test_a_value_is_no_proxy_to_a_graph_that_is_run() -> None:
    """It is one while FX traces, and a graph would go by that."""
    model = net(lambda m, x: m.bn(m.conv(x)) * (2.0 if isinstance(x, fx.Proxy) else 1.0))
    with pytest.raises(fxr.errors.TraceError, match="it asks what a value is"):
        fxr.rewrite(model, "conv_bn", into="graph")


def test_a_graph_checks_whether_gradients_are_enabled() -> None:
    model = net(lambda m, x: m.bn(m.conv(x)) * (2.0 if torch.is_grad_enabled() else 1.0))
    made, _ = fxr.rewrite(model, "conv_bn", into="graph", expect={"conv_bn": 1})
    torch.testing.assert_close(made(X), model(X), rtol=1e-9, atol=1e-9)
    with torch.no_grad(), pytest.raises(fxr.errors.SpecialisedError, match="gradients are enabled"):
        made(X)
    assert fxr.rewrite(model, "conv_bn")[1].into == "modules"


def test_tracing_leaves_a_global_variable_as_it_was() -> None:
    before = COUNT
    fxr.rewrite(net(counted), "conv_bn")
    assert before == COUNT


@pytest.mark.parametrize("names", ["B, b", "b, B", "B, b, b_1"])
def test_arguments_whose_names_differ_in_case_are_told_apart(names: str) -> None:
    namespace: dict[str, Any] = {}
    weighted = " + ".join(f"{i} * {name}" for i, name in enumerate(names.split(", "), 1))
    exec(f"def forward(self, {names}):\n    return self.bn(self.conv({weighted}))", namespace)
    model = net(namespace["forward"])
    made, _ = fxr.rewrite(model, "conv_bn", into="graph", expect={"conv_bn": 1})
    given = [X * i for i in range(1, len(names.split(", ")) + 1)]
    torch.testing.assert_close(made(*given), model(*given), rtol=1e-9, atol=1e-9)
    by_name = dict(zip(names.split(", "), given, strict=True))
    torch.testing.assert_close(made(**by_name), model(**by_name), rtol=1e-9, atol=1e-9)


def catching(m: Any, x: torch.Tensor) -> Any:
    try:
        return m.bn(m.conv(x))
    except ValueError:
        return m.conv(x) * 2


def without_lengths(m: Any, x: torch.Tensor) -> Any:
    for layer in (m.conv, m.bn):
        try:
            x = layer(x, lengths=None)
        except TypeError:
            x = layer(x)
    return x


def at_last(m: Any, x: torch.Tensor) -> Any:
    try:
        return m.bn(m.conv(x))
    finally:
        m.conv.eval()


@pytest.mark.parametrize("example", [None, X], ids=["", "example inputs"])
@pytest.mark.parametrize("forward", [catching, without_lengths])
def test_a_forward_that_catches_what_is_raised_is_no_graph(forward: Any, example: Any) -> None:
    """On inputs of which a norm raises, the result does what the model does."""
    model = net(forward)
    made, report = fxr.rewrite(model, "conv_bn", example)
    assert report.into == "modules"
    for x in (X, X[0]):
        try:
            expected = model(x)
        except ValueError:
            continue
        torch.testing.assert_close(made(x), expected, rtol=1e-9, atol=1e-9)
    with pytest.raises(fxr.errors.TraceError, match="it catches what is raised there"):
        fxr.rewrite(model, "conv_bn", into="graph")


def is_compiling() -> bool:
    try:
        return torch.compiler.is_compiling()
    except AttributeError:
        return False


def test_what_is_caught_where_there_is_no_value_of_the_model_does_not_matter() -> None:
    model = net(lambda m, x: x if is_compiling() else m.bn(m.conv(x)))
    made, _ = fxr.rewrite(model, "conv_bn", into="graph", expect={"conv_bn": 1})
    torch.testing.assert_close(made(X), model(X), rtol=1e-9, atol=1e-9)


def test_what_a_forward_does_at_last_is_no_reason_to_refuse() -> None:
    made, _ = fxr.rewrite(net(at_last), "conv_bn", into="graph", expect={"conv_bn": 1})
    torch.testing.assert_close(made(X), net(at_last)(X), rtol=1e-9, atol=1e-9)


def test_what_is_imported_meanwhile_is_no_part_of_a_forward(
    tmp_path: Any, monkeypatch: Any
) -> None:
    """The code of a module that is imported sets its own globals, and catches what it likes."""
    (tmp_path / "imported_late.py").write_text(
        "def fill():\n    global cache\n    cache = []\nfill()\n"
        "try:\n    import nothing_of_the_sort\nexcept ImportError:\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        import imported_late  # type: ignore[import-not-found]

        return m.bn(m.conv(x)) if imported_late.cache == [] else x

    model = Forward(forward, conv=conv(), bn=bn())
    report = fxr.plan(model, "conv_bn")
    assert (report.into, report.assumptions, len(report.applied)) == ("graph", (), 1)
