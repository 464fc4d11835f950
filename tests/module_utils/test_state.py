"""A snapshot sees each change of what it was taken of, and puts it back."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fxrewrite.module_utils.state import Snapshot


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
        self.count = 0
        self.table = {"a": [torch.ones(2)], "b": 1}
        self.latest = deque([1, 2])
        self.pair = (torch.ones(2), 3)
        self.names = {"x"}
        self.unregistered = [nn.Linear(2, 2)]


def write(tensor: torch.Tensor) -> None:
    with torch.no_grad():
        tensor.add_(1)


# Each with whether torch's count of writes and what is where show it, without a copy of tensors.
CHANGES: dict[str, tuple[Callable[[Any], object], bool]] = {
    "count": (lambda m: setattr(m, "count", 1), True),
    "extra": (lambda m: setattr(m, "extra", 1), True),
    "inner.0.kernel_size": (lambda m: setattr(m.inner[0], "kernel_size", (1, 1)), True),
    "inner.1.training": (lambda m: m.inner[1].eval(), True),
    "inner.1": (lambda m: m.inner.__setitem__(1, nn.Identity()), True),
    "inner.more": (lambda m: m.inner.add_module("more", nn.Identity()), True),
    "inner.0.bias": (lambda m: m.inner[0].register_parameter("bias", None), True),
    "inner.0._forward_hooks": (lambda m: m.inner[0].register_forward_hook(print), True),
    "inner.__class__": (lambda m: setattr(m.inner, "__class__", nn.ModuleList), True),
    "table.b": (lambda m: m.table.update(b=2), True),
    "table.a": (lambda m: m.table["a"].append(1), True),
    "latest": (lambda m: m.latest.append(3), True),
    "names": (lambda m: m.names.add("y"), True),
    "unregistered.training": (lambda m: m.unregistered[0].eval(), True),
    "the tensor inner.0.weight": (lambda m: write(m.inner[0].weight), True),
    "the tensor inner.1.running_mean": (lambda m: write(m.inner[1].running_mean), True),
    "the tensor table.a": (lambda m: write(m.table["a"][0]), True),
    "the tensor pair": (lambda m: write(m.pair[0]), True),
    "the tensor unregistered.weight": (lambda m: write(m.unregistered[0].weight), True),
    "the tensor inner.0.weight, requires_grad": (
        lambda m: m.inner[0].weight.requires_grad_(False),
        True,
    ),
    "the tensor inner.0.weight, grad": (
        lambda m: setattr(m.inner[0].weight, "grad", torch.ones(3, 3, 1, 1)),
        True,
    ),
    "the tensor inner.0.weight, hook": (lambda m: m.inner[0].weight.register_hook(print), True),
    "the tensor inner.0.weight, attribute": (
        lambda m: setattr(m.inner[0].weight, "owner", "me"),
        True,
    ),
    "the tensor inner.0.bias, data": (
        lambda m: setattr(m.inner[0].bias, "data", m.inner[0].bias.detach().clone()),
        True,
    ),
    "the tensor inner.1.running_var, transposed": (
        lambda m: m.inner[1].running_var.unsqueeze_(0),
        True,
    ),
    "the tensor inner.0.weight, by .data": (lambda m: m.inner[0].weight.data.add_(1), False),
    "the tensor inner.1.running_var, by NumPy": (
        lambda m: m.inner[1].running_var.numpy().fill(2),
        False,
    ),
}


def test_nothing_changed() -> None:
    model = Model()
    before, stamp = Snapshot({"": model}), Snapshot([model], contents=False)
    model.inner.eval()(torch.ones(1, 3, 2, 2))
    model.inner.train()
    assert before.restore() == []
    assert stamp.difference() is None


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
def test_a_module_of_torch_jit_which_lacks_registries_is_compared_as_well() -> None:
    traced = torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2))
    before, stamp = Snapshot({"": traced}), Snapshot([traced], contents=False)
    assert before.difference() is stamp.difference() is None
    traced.register_forward_hook(print)
    assert before.difference() == "_forward_hooks"
    assert stamp.difference() == "TopLevelTracedModule._forward_hooks"
    assert before.restore()
    assert not traced._forward_hooks


@pytest.mark.parametrize("what", CHANGES)
def test_each_change_is_seen_and_undone(what: str) -> None:
    change, _ = CHANGES[what]
    model = Model()
    before, as_was = Snapshot({"": model}), torch.tensor([each.sum() for each in tensors(model)])
    change(model)
    assert before.difference() == what.partition(", ")[0]
    assert before.restore()
    assert before.difference(versions=False) is None
    assert torch.equal(torch.tensor([each.sum() for each in tensors(model)]), as_was)
    assert not hasattr(model, "extra")


AT_A_GLANCE = {
    "a write": lambda m: write(m.inner[0].weight),
    "a write to a buffer": lambda m: write(m.inner[1].running_mean),
    "an attribute": lambda m: setattr(m.inner[0], "stride", (2, 2)),
    "a new attribute": lambda m: setattr(m, "extra", 1),
    "a parameter": lambda m: setattr(m.inner[0], "bias", nn.Parameter(torch.ones(3))),
    "a parameter that goes": lambda m: setattr(m.inner[0], "bias", None),
    "a submodule": lambda m: setattr(m.inner[0], "more", nn.ReLU()),
    "a hook": lambda m: m.inner[0].register_forward_hook(print),
    "the mode": lambda m: m.inner[1].eval() if m.training else m.inner[1].train(),
}


@pytest.mark.parametrize("what", AT_A_GLANCE)
def test_what_is_seen_at_a_glance_and_put_back_but_for_numbers(what: str) -> None:
    model = Model()
    stamp, exact = Snapshot([model], contents=False), Snapshot({"": model})
    with contextlib.suppress(ZeroDivisionError), stamp:
        AT_A_GLANCE[what](model)
        assert stamp.difference() is not None
        raise ZeroDivisionError
    assert (exact.difference() is None) is not what.startswith("a write")


def test_a_write_of_what_is_there_is_seen_unless_versions_do_not_count() -> None:
    tensor = torch.ones(2)
    before = Snapshot([tensor])
    tensor.fill_(1)
    assert before.difference() == "the tensor Tensor"
    assert before.difference(versions=False) is None


def test_what_is_skipped_is_not_copied() -> None:
    """Which tensors there are is seen nevertheless."""
    model = Model()
    before = Snapshot({"": model}, skipped=("_parameters", "_buffers"))
    write(model.inner[0].weight)
    write(model.inner[1].running_mean)
    assert before.difference() is None
    model.inner[0].weight = nn.Parameter(torch.ones(3, 3, 1, 1))
    assert before.restore() == ["inner.0.weight"]


@pytest.mark.parametrize("kind", ["nan", "sparse", "meta", "complex", "inference", "zero"])
def test_tensors_of_all_kinds(kind: str) -> None:
    with torch.inference_mode(kind == "inference"):
        tensor = {
            "nan": torch.tensor([float("nan"), 1.0]),
            "sparse": torch.eye(2).to_sparse(),
            "meta": torch.ones(2, device="meta"),
            "complex": torch.ones(2, dtype=torch.complex64).conj(),
        }.get(kind, torch.zeros(2))
        before = Snapshot([tensor])
        assert before.difference() is None
        tensor.mul_(-1)  # which makes 0.0 to -0.0
        assert before.difference() == "the tensor Tensor"
        before.restore()
        # Of layouts without bytes to compare, nothing but writes is seen.
        assert before.difference(versions=False) is None or kind in ("sparse", "meta")
        if kind in ("inference", "zero"):
            assert not tensor.signbit().any()


def test_a_context_puts_back_when_an_error_leaves_it() -> None:
    model = Model()
    before = Snapshot([model])

    def fail() -> None:
        with before, before:
            model.count = 1
            write(model.inner[0].weight)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert model.count == 0
    assert before.difference(versions=False) is None
    with before:
        model.count = 1
    assert model.count == 1


def tensors(model: Any) -> list[torch.Tensor]:
    return [*model.state_dict().values(), *model.table["a"][:1], model.pair[0]]
