"""Models that can't be traced as a whole: the parts that can be are found, and rewritten."""

from __future__ import annotations

import copy
import json
from collections import Counter
from typing import Any

import checks
import nets
import pytest
import torch
from nets import Forward, X, bn, conv
from torch import fx, nn
from torchvision.models import detection

import fxrewrite as fxr


def branch(m: Any, x: torch.Tensor) -> torch.Tensor:
    """Data decide what happens, so this can't be traced."""
    return m.last(m.a(x)) if x.sum() > 0 else m.last(m.b(x))


def block() -> nn.Sequential:
    return nn.Sequential(conv(), bn(), nn.ReLU())


def unclear(**more: nn.Module) -> Forward:
    return Forward(branch, a=block(), b=block(), last=nn.Tanh(), **more)


def rewritten(
    model: nn.Module, applied: int, example: Any = None, **options: Any
) -> tuple[Any, fxr.Report]:
    """conv_bn on a model that can't be traced, held to what holds for every such model."""
    model.double()
    before = checks.Record(model)
    made, report = fxr.Rewriter("conv_bn", **options).rewrite(model, example)
    before.assert_unchanged()
    assert (report.into, type(made)) == ("modules", type(model))
    assert len(report.applied) == applied, report
    count = sum(map(checks.is_batch_norm, model.modules()))
    assert len(report.findings) == count
    for x in (X, -X, X.abs(), -X.abs()):
        expected = checks.outputs(model, x)
        assert checks.largest_error(expected, checks.outputs(made, x)) <= 1e-9
    return made, report


def test_the_children_of_what_can_not_be_traced_are_parts_and_both_sides_stay_right() -> None:
    made, report = rewritten(unclear(), applied=2)
    assert isinstance(made.a[1], nn.Identity)
    assert isinstance(made.b[1], nn.Identity)
    assert [finding.anchor for finding in report.applied] == ["a.1", "b.1"]


def test_what_can_not_be_traced_is_one_node_of_the_part_around_it() -> None:
    """A batch norm behind it, whose convolution is before it, is not folded across it."""
    model = nets.randomise(nn.Sequential(conv(), unclear(), bn(), conv(), bn()))
    made, report = rewritten(model, applied=3)
    assert "2: missed by fold_conv_bn: it reads 1 (Forward), not a Conv" in report.why("2")
    assert [each.anchor for each in report.applied] == ["4", "1.a.1", "1.b.1"]
    assert isinstance(made[4], nn.Identity)


def test_containers_without_a_forward_are_looked_through() -> None:
    def choose(m: Any, x: torch.Tensor) -> torch.Tensor:
        return m.blocks[0](x) if x.sum() > 0 else m.named["first"](x)

    blocks = nn.ModuleList([block(), nn.ModuleList([block()])])
    rewritten(Forward(choose, blocks=blocks, named=nn.ModuleDict({"first": block()})), applied=3)


def test_the_report_tells_of_each_module_that_stopped_tracing() -> None:
    model = nets.randomise(nn.Sequential(conv(), bn(), unclear(deep=unclear())))
    _, report = rewritten(model, applied=5)
    stop, inner = report.stops
    assert (inner.name, inner.anchors) == ("2.deep", 2)
    line = branch.__code__.co_firstlineno + 2
    assert (stop.name, stop.kind, stop.anchors) == ("2", "Forward", 4)
    assert stop.reason == "it branches on a value that only a real run has"
    assert stop.line.startswith(f"{__file__}:{line}: return m.last")
    said = str(report).splitlines()
    at = said.index("not traced, so that the rules went into the module tree:")
    assert [each.split()[0] for each in said[at + 1 : at + 3]] == ["2", "2.deep"]
    assert [each["name"] for each in json.loads(report.to_json())["stops"]] == ["2", "2.deep"]


def test_what_untraced_code_calls_is_seen_in_a_run() -> None:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        return m.bn(m.conv(x)) if x.sum() > 0 else x

    made, _ = rewritten(Forward(forward, conv=conv(), bn=bn(), block=block()), 2, X.abs())
    assert isinstance(made.bn, nn.Identity)


def test_an_anchor_of_untraced_code_says_what_it_reads_there() -> None:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        return m.bn(m.act(m.conv(x)) if x.sum() > 0 else x)

    model = Forward(forward, conv=conv(), bn=bn(), act=nn.ReLU())
    _, report = rewritten(model, 0, X.abs())
    assert "it reads act (ReLU), not a Conv1d, Conv2d or Conv3d" in report.why("bn")
    _, report = rewritten(model, 0, -X.abs())
    assert "it reads a value of code that can't be traced, not a Conv1d" in report.why("bn")
    members = dict(model.named_children())
    model = Forward(lambda m, x: m.bn(m.act(m.conv(x * int(x[0, 0, 0, 0])))), **members)
    assert "a run on example_inputs would show" in rewritten(model, 0)[1].why("bn")


def test_an_anchor_that_no_code_calls_says_so() -> None:
    """So does one that only code calls which can't be read."""
    model = Forward(lambda m, x: m.conv(x) if x.sum() > 0 else x, conv=conv(), bn=bn())
    _, report = rewritten(model, applied=0)
    assert "no call of it could be traced: tracing stopped in Forward" in report.why("bn")
    assert "it branches on a value that only a real run has" in report.why("bn")


def test_a_graph_is_refused_with_the_module_and_the_way_out() -> None:
    with pytest.raises(fxr.errors.TraceError, match="stopped in 0 ") as error:
        fxr.rewrite(nn.Sequential(unclear()).eval(), "conv_bn", into="graph")
    assert "Leave out into='graph'" in str(error.value)


def test_what_was_recorded_of_a_forward_that_stopped_is_taken_back() -> None:
    """Its reads of parameters too, of which a forward that is traced later makes new ones."""

    def stops(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(x * m.owner[0].scale)
        return m.block(y) if y.sum() > 0 else y

    inner = Forward(stops, block=block())
    model = Forward(
        lambda m, x: m.bn(m.conv(m.inner(x) * m.scale)), conv=conv(), bn=bn(), inner=inner
    )
    model.scale = nn.Parameter(torch.ones(1))
    inner.owner = [model]
    rewritten(model, applied=2)


class Counts(nn.Module):
    """Counts its calls, which a graph would not."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.calls = nets.randomise(block()), 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.block(x)


def test_a_forward_that_changes_the_model_goes_on_doing_so() -> None:
    model = nets.randomise(nn.Sequential(conv(), bn(), Counts(), Counts())).double()
    made, report = fxr.rewrite(model, "conv_bn", expect={"conv_bn": 3})
    assert [each.name for each in report.stops] == ["2", "3"]
    assert "its forward changes 2.calls" in report.stops[0].reason
    made(X)
    assert [made[2].calls, made[3].calls, model[2].calls] == [1, 1, 0]


def test_the_inside_of_a_module_with_a_hook_is_a_part_and_its_hook_runs() -> None:
    model = nets.randomise(nn.Sequential(block(), block()))
    model[1].register_forward_hook(nets.halve_output)
    _, report = checks.folded(copy.deepcopy(model), X, applied=1)
    assert report.into == "graph"
    made, _ = rewritten(model, applied=2, into="modules")
    assert isinstance(made[1][1], nn.Identity)


def test_a_leaf_that_the_user_named_stays_whole() -> None:
    _, report = rewritten(unclear(), applied=1, leaf_modules=["b"])
    assert report.why("b.1").startswith("b.1: missed")


class Deep(nn.Module):
    """Can't be traced, and holds another such module and a block."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.block = block()
        self.inner = Deep(depth - 1) if depth else block()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) if x.sum() > 0 else self.block(x)


def test_each_module_is_the_root_of_few_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chain of such modules takes traces in proportion to its length, not to its square.

    Both answers to its question are traced, and once more for the code by which values go.
    """
    traces: Counter[int] = Counter()
    trace = fx.Tracer.trace

    def counting(self: fx.Tracer, root: Any, *args: Any) -> fx.Graph:
        traces[id(root)] += 1
        return trace(self, root, *args)

    monkeypatch.setattr(fx.Tracer, "trace", counting)
    model = nets.randomise(Deep(10))
    rewritten(model, applied=12)
    assert max(traces.values()) <= 5
    assert traces.total() <= 11 * 10 + 10


DETECTION = {
    "fasterrcnn_mobilenet_v3_large_320_fpn": 46,
    "ssdlite320_mobilenet_v3_large": 70,
}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "norms"), DETECTION.items(), ids=list(DETECTION))
def test_a_detection_model_folds_every_batch_norm_and_detects_the_same(
    name: str, norms: int
) -> None:
    options: dict[str, Any] = {"weights": None, "weights_backbone": None, "num_classes": 3}
    if "rcnn" in name:
        options |= {"box_score_thresh": 0.0, "box_detections_per_img": 20}
    else:
        options |= {"detections_per_img": 20}
    model = getattr(detection, name)(**options).eval()
    images = [torch.rand(3, 64, 96, dtype=torch.float64)]
    for each in filter(checks.is_batch_norm, model.modules()):
        each.bias.data.uniform_(-0.5, 0.5)
        each.running_mean.uniform_(-0.1, 0.1)
    model.double()
    made, report = fxr.rewrite(model, "conv_bn", expect={"conv_bn": norms})
    assert (report.into, len(report.refused), len(report.missed)) == ("modules", 0, 0)
    assert not any(map(checks.is_batch_norm, made.modules()))
    with torch.no_grad():
        (expected,), (found,) = model(images), made(images)
    assert len(expected["boxes"]) == 20
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-6, atol=1e-6)
