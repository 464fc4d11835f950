"""Models that other folders of batch norms get wrong, or leave changed."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import checks
import nets
import pytest
import torch
from nets import Forward, X, bn, conv, conv_bn
from torch import fx, nn
from torch.nn.modules import module as nn_module

import fxrewrite as fxr


def convolutions(module: nn.Module) -> list[str]:
    return sorted(name for name, each in module.named_modules() if isinstance(each, nn.Conv2d))


# A module that is used more than once.


def test_pytorch_issue_104593() -> None:
    """A convolution with a batch norm on one of two paths: the other path keeps its weights."""
    model = Forward(lambda m, x: m.conv(x) + m.bn(m.conv(x * 2)), conv=conv(), bn=bn())
    fused, _ = checks.folded(model, X, applied=1)
    assert fused.get_submodule("conv") is model.conv


def test_pytorch_issue_197539() -> None:
    """The same with the two paths returned side by side, the folded one first."""
    model = Forward(lambda m, x: (m.bn(m.conv(x)), m.conv(x * 2)), conv=conv(), bn=bn())
    fused, _ = checks.folded(model, X, applied=1)
    assert fused.get_submodule("conv") is model.conv


class Whole(nn.Sequential):
    """A container that the tests keep as one node."""


@pytest.mark.parametrize(
    ("forward", "names"),
    [
        (lambda m, x: m.bn(m.conv(x)), ["conv"]),
        (lambda m, x: m.bn(input=m.conv(input=x)), ["conv"]),
        (lambda m, x: m.bn(m.alias(x)), ["conv"]),
        (lambda m, x: m.bn(m.conv(x)) + m.conv(x), ["conv", "conv_1"]),
        (lambda m, x: m.bn(m.conv(x)) + m.alias(x), ["conv", "conv_1"]),
        (lambda m, x: m.bn(m.conv(x)) * m.conv.weight.mean(), ["conv_1"]),
        (lambda m, x: m.bn(m.conv(x)) * m.alias.weight.mean(), ["conv_1"]),
        (lambda m, x: m.bn(m.conv(x)) + m.whole(x), ["conv_1", "whole.0"]),
        (lambda m, x: m.bn(m.conv(x)) + m.bn(m.conv(x * 2)), ["conv"]),
        (lambda m, x: m.bn(m.conv(x)) + m.bn(m.alias(x * 2)), ["conv"]),
        (lambda m, x: m.bn(m.conv(x)) + m.other(m.conv(x * 2)), ["conv", "conv_1"]),
        (lambda m, x: m.bn(m.conv(x)) + m.bn(m.bn(m.conv(x * 2))), ["conv_1", "conv_1_1"]),
        (lambda m, x: m.bn(m.bn(m.conv(x))) + m.bn(m.conv(x * 2)), ["conv", "conv_1"]),
    ],
    ids=[
        "alone",
        "by keyword",
        "under another name",
        "called again",
        "called again under another name",
        "weight read",
        "weight read under another name",
        "inside a leaf that is called",
        "twice with one batch norm",
        "under two names with one batch norm",
        "with two batch norms",
        "with one batch norm, then with it twice",
        "with one batch norm twice, then once",
    ],
)
def test_who_keeps_the_name(forward: Any, names: list[str]) -> None:
    """The fold takes the convolution's name if nothing else uses it, or else a fresh one."""
    shared = conv()
    members = {"conv": shared, "alias": shared, "whole": Whole(shared), "bn": bn(), "other": bn()}
    model = Forward(forward, **members).double()
    before = checks.Record(model)
    expected = checks.outputs(model, X)
    fused, report = fxr.Rewriter("conv_bn", leaf_modules=[Whole]).rewrite(model)
    before.assert_unchanged()
    assert not report.refused
    assert convolutions(fused) == names
    assert checks.largest_error(expected, checks.outputs(fused, X)) <= 1e-9


@pytest.mark.parametrize("whole_first", [True, False])
def test_a_part_of_a_leaf_that_is_called_by_itself(whole_first: bool) -> None:
    """What a leaf module contains stays inside it, though one more call of it was folded."""

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        first = m.whole(x) if whole_first else None
        y = m.bn(m.whole[0](x))
        return y + (m.whole(x) if first is None else first)

    model = Forward(forward, whole=Whole(conv(), nn.ReLU()), bn=bn()).double()
    expected = checks.outputs(model, X)
    fused, _ = fxr.Rewriter("conv_bn", into="graph", leaf_modules=[Whole]).rewrite(
        model, expect={"conv_bn": 1}
    )
    assert fused.get_submodule("whole") is model.whole
    assert convolutions(fused) == ["whole.0", "whole_0"]
    assert checks.largest_error(expected, checks.outputs(fused, X)) <= 1e-9


class Decaying(nn.Module):
    """Writes to the statistics of a batch norm that it has, and returns its input."""

    def __init__(self, bn: nn.Module) -> None:
        super().__init__()
        self.bn = bn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.bn.running_mean.mul_(0.5)
        return x * 1


def test_statistics_that_a_leaf_may_write_to() -> None:
    """A batch norm that a leaf holds too is not folded: nobody knows what the leaf does to it."""
    norm = bn()
    model = Forward(
        lambda m, x: m.bn(m.conv(m.leaf(x))), leaf=Decaying(norm), conv=conv(), bn=norm
    ).double()
    fused, report = fxr.Rewriter("conv_bn", into="graph", leaf_modules=[Decaying]).rewrite(model)
    assert (
        "running_mean, to which a module that is kept whole may write" in report.refused[0].reason
    )
    expected = checks.outputs(copy.deepcopy(model), X)
    assert checks.largest_error(expected, checks.outputs(fused, X)) <= 1e-9


def test_other_keys_of_the_state_dict_survive() -> None:
    """What was not folded keeps its key, and what is used no more goes."""
    model = Forward(lambda m, x: m.last(m.bn(m.conv(x))), conv=conv(), bn=bn(), last=conv())
    fused, _ = checks.folded(model, X, applied=1)
    assert fused.state_dict().keys() == {
        f"{name}.{tensor}" for name in ("conv", "last") for tensor in ("weight", "bias")
    }


def test_a_second_name_in_a_graph_module() -> None:
    """In a GraphModule a module is called by either of its names; one call does not move both."""
    model = Forward(lambda m, x: m.bn(m.conv(x)) + m.conv(x), conv=conv(), bn=bn())
    model.alias = model.conv
    graph = fx.Tracer().trace(model)
    next(node for node in graph.nodes if node.name == "conv_1").target = "alias"
    fused, _ = checks.folded(fx.GraphModule(model, graph), X, applied=1)
    assert fused.get_submodule("alias") is model.conv
    assert convolutions(fused) == ["alias", "conv_1"]


def test_tied_parameters() -> None:
    """A convolution that shares its weight with another module leaves the other one's as it was."""
    model = Forward(lambda m, x: m.bn(m.conv(x)) + m.tied(x), conv=conv(), tied=conv(), bn=bn())
    model.tied.weight = model.conv.weight
    fused, _ = checks.folded(model, X, applied=1)
    assert fused.get_parameter("tied.weight") is model.conv.weight
    assert fused.get_parameter("conv.weight") is not model.conv.weight


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: (m.bn(y := m.conv(x)), y),
        lambda m, x: m.bn(y := m.conv(x)) + y.mean(),
        lambda m, x: m.bn(y := m.conv(x)) + m.other(y),
        lambda m, x: (y := m.conv(x), y.mul_(2.0), m.bn(y))[-1],
        lambda m, x: (y := m.conv(x), y[:, :1].mul_(2.0), m.bn(y))[-1],
        lambda m, x: (y := m.conv(x), y.view(-1).add_(1.0), m.bn(m.drop(y)))[-1],
    ],
    ids=["returned", "read", "two batch norms", "written", "written in part", "written by a view"],
)
def test_what_else_reads_the_convolution(forward: Any) -> None:
    """A convolution whose output anything else reads or writes is not folded."""
    model = Forward(forward, conv=conv(), bn=bn(), other=bn(), drop=nn.Dropout())
    _, report = checks.folded(model, X, applied=0)
    assert "is also read by" in report.why("bn")


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: (y := m.conv(x), x.add_(1.0), m.bn(y) + x)[-1],
        lambda m, x: (y := m.bn(m.conv(x)), x.add_(1.0), y + x)[-1],
        lambda m, x: torch.relu_(m.bn(m.conv(x.mul_(2.0)))) + x,
    ],
    ids=["to the input in between", "to the input behind", "before and behind"],
)
def test_writes_beside_the_chain(forward: Any) -> None:
    """Writes that the chain does not see, since it reads its input at the same moment as before."""
    checks.folded(Forward(forward, conv=conv(), bn=bn()), X, applied=1)


# Hooks.


def give(*results: Any) -> Any:
    """A hook that does nothing, whatever it is called with."""
    return lambda *args, **kwargs: None


@pytest.mark.parametrize("name", ["conv", "drop", "bn"])
@pytest.mark.parametrize(
    ("register", "words"),
    [
        ("register_forward_hook", "a forward hook"),
        ("register_forward_pre_hook", "a forward pre hook"),
        ("register_full_backward_hook", "a backward hook"),
        ("register_full_backward_pre_hook", "a backward pre hook"),
        ("register_state_dict_post_hook", "a state dict hook"),
        ("register_state_dict_pre_hook", "a state dict pre hook"),
        ("register_load_state_dict_pre_hook", "a load state dict pre hook"),
        ("register_load_state_dict_post_hook", "a load state dict post hook"),
    ],
)
def test_a_module_with_a_hook(name: str, register: str, words: str) -> None:
    """A chain with a hook on any of its modules stays, and the reason names module and hook."""
    members = {"conv": conv(), "drop": nn.Dropout(), "bn": bn()}
    model = Forward(lambda m, x: m.bn(m.drop(m.conv(x))), **members)
    getattr(model.get_submodule(name), register)(give())
    fused, report = checks.folded(model, X, applied=0)
    assert f"{name} carries {words}," in report.why("bn")
    assert fused.get_submodule(name) is model.get_submodule(name)


def test_a_hook_on_a_container_still_runs() -> None:
    """A container with a hook is kept whole, for its hook would not run otherwise."""
    model = Forward(lambda m, x: m.bn(m.conv(m.inner(x))), conv=conv(), bn=bn(), inner=conv_bn())
    model.inner.register_forward_hook(nets.halve_output)
    fused, report = checks.folded(model, X, applied=1)
    assert fused.get_submodule("inner") is model.inner
    assert report.why("inner.bn") == (
        "inner.bn: missed by fold_conv_bn: "
        "it is inside inner (Forward), which is kept whole, since it carries a forward hook"
    )


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_a_hook_on_the_model_still_acts(register: str) -> None:
    """Hooks of the model itself are hooks of the result, and what is inside is folded."""
    hook = nets.halve_output if register == "register_forward_hook" else nets.halve_input
    model = conv_bn()
    getattr(model, register)(hook)
    checks.folded(model, X, applied=1)


def test_a_hook_on_the_model_that_takes_keywords() -> None:
    """How a hook wants to be called goes with it into the result."""
    model = conv_bn()
    model.register_forward_hook(lambda m, args, kwargs, output: -output, with_kwargs=True)
    checks.folded(model, X, applied=1)


@pytest.fixture
def _global_hook() -> Iterator[None]:
    handle = nn_module.register_module_forward_hook(
        lambda module, args, output: -output if isinstance(module, nn.Conv2d) else None
    )
    yield
    handle.remove()


@pytest.mark.usefixtures("_global_hook")
def test_a_hook_on_all_modules() -> None:
    """While a hook is registered for all modules of the process, nothing is folded."""
    _, report = checks.folded(conv_bn(), X, applied=0)
    assert "global module hook" in report.why("bn")


def test_a_shared_fold_that_is_folded_again_at_one_of_its_calls() -> None:
    """bn(conv(bn(bn(conv(x))))) with one convolution and one batch norm: two folds, not one."""

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        return m.bn(m.conv(m.bn(m.bn(m.conv(x)))))

    model = Forward(forward, conv=nn.Conv2d(4, 4, 1), bn=bn()).double()
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    expected = checks.outputs(model, x)
    fused, _ = fxr.rewrite(model, "conv_bn", expect={"conv_bn": 3})
    assert len(convolutions(fused)) == 2
    assert checks.largest_error(expected, checks.outputs(fused, x)) <= 1e-9
