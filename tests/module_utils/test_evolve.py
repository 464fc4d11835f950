"""A changed copy of a module: what is named is new, and all else is shared."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fxrewrite as fxr


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 2))
        self.bias = nn.Parameter(torch.randn(2), requires_grad=False)
        self.register_parameter("none", None)
        self.register_buffer("mean", torch.randn(2))
        self.register_buffer("unsaved", torch.randn(2), persistent=False)
        self.child, self.eps, self.sizes = nn.Linear(2, 2), 0.5, [1]

    def forward(self, x):
        return self.child(x @ self.weight) * self.eps


NAMES = ["weight", "bias", "none", "mean", "unsaved"]


@given(st.sets(st.sampled_from(NAMES)), st.booleans())
def test_evolve_changes_what_is_named_and_shares_all_else(names, as_none):
    module = Mixed().eval()
    before = copy.deepcopy(module.state_dict())
    new = {name: None if as_none else torch.randn(2, 3) for name in names}
    evolved = fxr.evolve(module, **new)
    for name in NAMES:
        given, old, now = new.get(name), getattr(module, name), getattr(evolved, name)
        if name not in names:
            assert now is old
        elif given is None:
            assert now is None
        else:
            assert torch.equal(now, given)
            is_parameter = name in module._parameters
            assert isinstance(now, nn.Parameter) is is_parameter
            if is_parameter:
                assert now.requires_grad is (old is None or old.requires_grad)
    assert (type(evolved), evolved.child, evolved.training) == (Mixed, module.child, False)
    kept = [name for name in before if name not in names or not as_none]
    assert set(evolved.state_dict()) - {"none"} == set(kept)
    torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)


def test_evolve_is_a_module_of_its_own():
    module = Mixed()
    module.register_forward_hook(lambda m, args, out: out + 1)
    evolved = fxr.evolve(module, eps=2.0)
    assert (module.eps, evolved.eps) == (0.5, 2.0)
    evolved.train(False)
    evolved.extra = nn.ReLU()
    evolved.register_buffer("more", torch.zeros(1), persistent=False)
    evolved.register_forward_hook(lambda m, args, out: out + 1)
    del evolved.weight
    assert module.training
    assert list(module._modules) == ["child"]
    assert "more" not in module._buffers
    assert "more" not in module._non_persistent_buffers_set
    assert "weight" in module._parameters
    assert len(module._forward_hooks) == 1


def test_evolve_keeps_a_parameter_that_is_given_as_one():
    parameter = nn.Parameter(torch.ones(2, 2), requires_grad=False)
    assert fxr.evolve(nn.Linear(2, 2), weight=parameter).weight is parameter


def test_evolve_takes_integers_which_never_need_a_gradient():
    assert not fxr.evolve(
        nn.Linear(2, 2), weight=torch.ones(2, 2, dtype=torch.int8)
    ).weight.requires_grad


def test_evolve_replaces_a_child():
    module = Mixed()
    evolved = fxr.evolve(module, child=nn.ReLU())
    assert type(evolved.child) is nn.ReLU
    assert type(module.child) is nn.Linear


def test_evolve_refuses_a_name_that_the_module_does_not_have():
    with pytest.raises(AttributeError, match="Linear has no 'wieght'; its tensors: weight, bias"):
        fxr.evolve(nn.Linear(2, 2), wieght=None)


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("change", [{"padding": 2}, {"kernel_size": 2}, {"padding": "valid"}])
@pytest.mark.parametrize("given", [{"padding": 1}, {"padding": "same", "dilation": 2}])
def test_evolve_keeps_what_a_convolution_makes_of_its_geometry(rank, change, given):
    """Whatever the mode of padding, it pads as one does that is made so."""
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1]
    options = {"kernel_size": 3, "padding_mode": "reflect", **given}
    made = kind(2, 3, **{**options, **change}).double()
    old = kind(2, 3, **options, stride=(1,) * rank).double()
    new = fxr.evolve(old, weight=made.weight, bias=made.bias, **change)
    x = torch.randn(2, 2, *[7, 6, 5][:rank], dtype=torch.float64)
    assert torch.equal(new(x), made(x))
    assert new.stride == old.stride
