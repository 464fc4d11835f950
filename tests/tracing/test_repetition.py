"""A forward of which two traces are not the same is no graph."""

from __future__ import annotations

import itertools
import random
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from nets import bn, conv, randomise
from torch import fx, nn

import fxrewrite as fxr
from fxrewrite.tracing.repetition import first_difference

X = torch.randn(2, 4, 3, 3, dtype=torch.float64)
COUNT = itertools.count(1)
CALLS: list[int] = []


class Counting:
    """A plain object that counts."""

    count = 0

    def __call__(self) -> int:
        self.count += 1
        return self.count


def closure() -> Callable[[], int]:
    count = 0

    def call() -> int:
        nonlocal count
        count += 1
        return count

    return call


def on_its_class(m: Any, x: torch.Tensor) -> Any:
    type(m).number += 1
    return m.bn(m.conv(x)) * type(m).number


def in_a_global_list(m: Any, x: torch.Tensor) -> Any:
    CALLS.append(0)
    return m.bn(m.conv(x)) * len(CALLS)


def another_way(m: Any, x: torch.Tensor) -> Any:
    return m.bn(m.conv(x)) if next(COUNT) % 2 else m.conv(x)


def one_more_call(m: Any, x: torch.Tensor) -> Any:
    CALLS.append(0)
    for _ in CALLS:
        x = m.conv(x)
    return m.bn(x)


def a_constant(m: Any, x: torch.Tensor) -> Any:
    return m.bn(m.conv(x)) * torch.tensor(time.perf_counter())


OTHER_EACH_TIME: dict[str, Callable[[Any, Any], Any]] = {
    "a clock": lambda m, x: m.bn(m.conv(x)) * time.perf_counter(),
    "a new generator": lambda m, x: m.bn(m.conv(x)) * float(np.random.default_rng().random()),
    "the system's generator": lambda m, x: m.bn(m.conv(x)) * random.SystemRandom().random(),
    "an identifier": lambda m, x: m.bn(m.conv(x)) * (uuid.uuid4().int % 10**6),
    "a global iterator": lambda m, x: m.bn(m.conv(x)) * next(COUNT),
    "an iterator of its own": lambda m, x: m.bn(m.conv(x)) * next(m.iterator),
    "a plain object": lambda m, x: m.bn(m.conv(x)) * m.counting(),
    "a closure": lambda m, x: m.bn(m.conv(x)) * m.closure(),
    "its class": on_its_class,
    "a global list": in_a_global_list,
    "the way": another_way,
    "the number of calls": one_more_call,
    "a constant": a_constant,
}


class Net(nn.Module):
    number = 0

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = conv(), bn()
        self.iterator: Iterator[int] = iter(range(1, 1000))
        self.counting, self.closure = Counting(), closure()


def net(forward: Callable[..., Any]) -> Any:
    return randomise(type("Net", (Net,), {"forward": forward})()).double().eval()


@pytest.mark.parametrize("forward", OTHER_EACH_TIME.values(), ids=OTHER_EACH_TIME)
def test_a_forward_that_is_another_each_time_is_no_graph(forward: Any) -> None:
    """The error names the line, and a module tree is rewritten all the same."""
    with pytest.raises(fxr.errors.TraceError, match=r"not the same each time that it is traced"):
        fxr.rewrite(net(forward), "conv_bn", into="graph")
    with pytest.raises(fxr.errors.TraceError, match=r"test_repetition\.py:\d+: "):
        fxr.rewrite(net(forward), "conv_bn", into="graph")
    _, report = fxr.rewrite(net(forward), "conv_bn")
    assert report.into == "modules"


def test_of_a_model_with_such_a_part_the_rest_is_rewritten() -> None:
    part = net(lambda m, x: m.bn(m.conv(x)) * m.counting())
    model = randomise(nn.Sequential(conv(), bn(), part, conv(), bn())).double().eval()
    made, report = fxr.rewrite(model, "conv_bn")
    assert {"1", "4"} <= {each.anchor for each in report.applied}
    assert [each.name for each in report.stops] == ["2"]
    made.get_submodule("2").counting.count = part.counting.count = 0
    results = torch.stack([made(X), made(X)])
    torch.testing.assert_close(results, torch.stack([model(X), model(X)]), rtol=1e-9, atol=1e-9)


def test_a_number_that_a_part_is_given_stops_the_module_that_gives_it() -> None:
    part = net(lambda m, x, scale: m.bn(m.conv(x)) * scale)
    model = nn.Module()
    model.part, model.counting = part, Counting()
    outer = type("Outer", (nn.Module,), {"forward": lambda m, x: m.part(x, m.counting())})
    model.__class__ = outer
    _, report = fxr.rewrite(model.eval(), "conv_bn")
    assert report.into == "modules"
    assert "" in [each.name for each in report.stops]


@pytest.mark.parametrize(
    ("model", "times"),
    [(nn.Sequential(conv(), bn()), 1), (net(lambda m, x: m.bn(m.conv(x))), 2)],
    ids=["torch's own", "a user's"],
)
def test_what_only_torchs_containers_call_is_traced_once(
    model: Any, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are known to do the same each time."""
    traces: Counter[int] = Counter()
    trace = fx.Tracer.trace

    def counting(self: fx.Tracer, root: Any, *args: Any) -> fx.Graph:
        traces[id(root)] += 1
        return trace(self, root, *args)

    monkeypatch.setattr(fx.Tracer, "trace", counting)
    fxr.rewrite(model.eval(), "conv_bn", into="graph")
    assert traces.total() == times


@pytest.mark.parametrize(
    ("one", "other"),
    [(1, 1.0), (0.0, -0.0), (True, 1), ("a", "b"), ([1, 2], [1]), (slice(0, 1), slice(0, 2))],
)
def test_graphs_that_differ_in_an_argument_are_told_apart(one: Any, other: Any) -> None:
    graphs = [fx.Graph(), fx.Graph()]
    for graph, value in zip(graphs, (one, other), strict=True):
        graph.output(graph.call_function(torch.add, (graph.placeholder("x"), value)))
    assert first_difference(graphs[0], graphs[1], {}, {}) is not None
    assert first_difference(graphs[0], graphs[0], {}, {}) is None


def test_not_a_number_is_the_same_number() -> None:
    graphs = [fx.Graph(), fx.Graph()]
    for graph in graphs:
        graph.output(graph.call_function(torch.add, (graph.placeholder("x"), float("nan"))))
    assert first_difference(*graphs, {}, {}) is None
