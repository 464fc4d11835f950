"""What a rewritten model survives, and what of the original survives in it."""

import copy
import io
import pickle
from contextlib import AbstractContextManager
from typing import Any

import checks
import nets
import pytest
import torch
from torch import nn

import fxrewrite as fxr


class Block(nn.Module):
    """Two convolutions with batch norms and a residual path; the second is shared."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nets.conv(), nets.bn(), nn.ReLU(inplace=True))
        self.conv = nets.conv()
        self.bn = nets.bn()
        self.head = nn.Conv2d(4, 2, 1)
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.stem(x)
        y = torch.relu(self.bn(self.conv(y)) + y) + self.conv(x)
        return self.head(y) * self.scale


def pair() -> tuple[nn.Module, Any]:
    """A model and its rewritten twin, in float64."""
    model = nets.randomise(Block()).double()
    fused, _ = fxr.rewrite(model, "conv_bn", expect={"conv_bn": 2})
    return model, fused


def assert_same(model: nn.Module, other: Any) -> None:
    with torch.no_grad():
        torch.testing.assert_close(other(nets.X), model(nets.X), rtol=1e-9, atol=1e-9)


def saved_and_loaded(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "send",
    [
        torch.jit.script,
        lambda fused: torch.jit.freeze(torch.jit.script(fused)),
        lambda fused: torch.jit.trace(fused, nets.X),
        saved_and_loaded,
        lambda fused: pickle.loads(pickle.dumps(fused)),
        copy.deepcopy,
        copy.copy,
        lambda fused: torch.export.export(fused, (nets.X,)).module(),
        torch.fx.symbolic_trace,
    ],
    ids=["script", "freeze", "trace", "save", "pickle", "deepcopy", "copy", "export", "fx"],
)
@pytest.mark.filterwarnings("ignore:.*is deprecated. Please:FutureWarning")
@pytest.mark.filterwarnings("ignore:The TorchScript type system:UserWarning")
def test_what_the_result_survives(send: Any) -> None:
    """The result computes the same after a trip through each of torch's ways to carry a model."""
    model, fused = pair()
    assert_same(model, send(fused))


class Postponed(nn.Sequential):
    """Its annotations are strings, as `from __future__ import annotations` makes all of them."""

    def forward(self, input: "torch.Tensor") -> "torch.Tensor":
        return super().forward(input)


@pytest.mark.filterwarnings("ignore:.*is deprecated. Please:FutureWarning")
@pytest.mark.filterwarnings("ignore:The TorchScript type system:UserWarning")
def test_postponed_annotations_can_be_scripted() -> None:
    """A model of a file with postponed annotations is scripted like any other."""
    model = nets.randomise(Postponed(nets.conv(), nets.bn())).double()
    assert_same(model, torch.jit.script(fxr.fuse(model)))


def test_a_state_dict_goes_from_one_result_into_another() -> None:
    """The state dict of a result loads, strictly, into the result of another model like it."""
    model, fused = pair()
    other = fxr.fuse(nets.randomise(Block(), seed=1).double())
    other.load_state_dict(fused.state_dict())
    assert_same(model, other)


def test_the_code_is_readable() -> None:
    """The printed code names the convolutions by their own names, and no folded batch norm."""
    _, fused = pair()
    lines = [line.strip() for line in fused.code.splitlines()]
    assert not [line for line in lines if "bn" in line or "self.stem.1" in line]
    assert [line.partition(";")[0] for line in lines if line.startswith("stem")] == [
        'stem_0 = getattr(self.stem, "0")(x)',
        'stem_2 = getattr(self.stem, "2")(stem_0)',
    ]
    assert "self.conv_1(stem_2)" in fused.code
    assert not any(isinstance(each, nn.BatchNorm2d) for each in fused.modules())


def test_untouched_tensors_are_the_same_objects() -> None:
    """Memory grows by the new weights alone: every other tensor is the model's own."""
    model, fused = pair()
    own = {id(each) for each in model.state_dict(keep_vars=True).values()}
    state = fused.state_dict(keep_vars=True)
    new = [name for name, tensor in state.items() if id(tensor) not in own]
    assert sorted(new) == ["conv_1.bias", "conv_1.weight", "stem.0.bias", "stem.0.weight"]
    storages = {each.untyped_storage().data_ptr() for each in model.state_dict().values()}
    for name in new:
        storage = state[name].untyped_storage()
        assert storage.data_ptr() not in storages
        assert storage.nbytes() == state[name].nbytes


@pytest.mark.parametrize(
    ("rank", "memory_format"), [(2, torch.channels_last), (3, torch.channels_last_3d)]
)
def test_the_memory_format_is_kept(rank: int, memory_format: torch.memory_format) -> None:
    """A channels_last weight folds to a channels_last weight, and a plain one to a plain one."""
    layers = nets.CONVS[rank](4, 6, 3), nets.BATCH_NORMS[rank](6)
    model = nets.randomise(nn.Sequential(*layers))
    plain = fxr.fuse(model).get_parameter("0.weight")
    assert plain.is_contiguous()
    last = fxr.fuse(model.to(memory_format=memory_format)).get_parameter("0.weight")
    assert last.is_contiguous(memory_format=memory_format)
    assert last.stride() == model[0].weight.stride()
    assert torch.equal(plain, last)


@pytest.mark.parametrize("weight", [True, False])
@pytest.mark.parametrize("bias", [True, False, None])
def test_requires_grad_is_kept(weight: bool, bias: bool | None) -> None:
    """A frozen tensor folds to a frozen one; a new bias does as the weight does."""
    conv = nn.Conv2d(4, 4, 1, bias=bias is not None)
    conv.weight.requires_grad_(weight)
    if bias is not None:
        conv.bias.requires_grad_(bias)
    fused = fxr.fuse(nets.randomise(nn.Sequential(conv, nets.bn())))
    assert fused.get_parameter("0.weight").requires_grad is weight
    assert fused.get_parameter("0.bias").requires_grad is (weight if bias is None else bias)


def test_gradients_flow() -> None:
    """The new weights are leaves that learn, and the input's gradient is that of the model."""
    model, fused = pair()
    x, again = nets.X.clone().requires_grad_(), nets.X.clone().requires_grad_()
    model(x).sum().backward()
    fused(again).sum().backward()
    torch.testing.assert_close(again.grad, x.grad, rtol=1e-9, atol=1e-9)
    for name, parameter in fused.named_parameters():
        assert parameter.is_leaf, name
        assert parameter.grad is not None, name


def test_a_rewrite_leaves_no_gradients_behind() -> None:
    """The fold is not recorded: no new tensor remembers how it was made."""
    _, fused = pair()
    assert all(parameter.grad_fn is None for parameter in fused.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_type_is_kept(dtype: torch.dtype) -> None:
    """All tensors and the output keep the model's type."""
    model = nets.randomise(Block()).to(dtype)
    fused = fxr.fuse(model)
    assert {each.dtype for each in fused.state_dict().values()} == {dtype}
    assert fused(nets.X.to(dtype)).dtype == dtype


def test_a_model_on_the_meta_device() -> None:
    """Without data a model is rewritten all the same: the right shapes, on the same device."""
    with torch.device("meta"):
        model = Block().eval()
    fused, _ = fxr.rewrite(model, "conv_bn", expect={"conv_bn": 2})
    assert all(each.is_meta for each in fused.state_dict().values())
    assert fused(nets.X.float().to("meta")).shape == (2, 2, 5, 5)
    shapes = {name: each.shape for name, each in pair()[1].state_dict().items()}
    assert {name: each.shape for name, each in fused.state_dict().items()} == shapes


@pytest.mark.parametrize("into", ["graph", "modules"])
def test_on_the_meta_device_what_is_called_twice_is_rewritten_as_with_numbers(into: Any) -> None:
    """Two answers of a rule without numbers are alike if all else is."""

    def twice(m: Any, x: Any) -> Any:
        return m.block(x) + m.block(x + 1)

    def looping(m: Any, xs: Any) -> Any:  # which is not traced, so that the block is a part
        return [m.block(x) for x in xs]

    x = nets.X
    forward, given = (twice, (x,)) if into == "graph" else (looping, ([x, x[:1]],))
    model = nets.Forward(forward, block=nn.Sequential(nets.conv(), nets.bn())).double()
    expected, report = fxr.rewrite(model, "conv_bn", given, into=into)
    assert report.applied
    given = torch.utils._pytree.tree_map(lambda x: x.to("meta"), given)
    found, _ = fxr.rewrite(model.to("meta"), "conv_bn", given, into=into)
    assert found.state_dict().keys() == expected.state_dict().keys()


@pytest.mark.parametrize(
    "context",
    [
        torch.no_grad,
        torch.inference_mode,
        torch.enable_grad,
        lambda: torch.autocast("cpu", dtype=torch.bfloat16),
        lambda: torch.device("meta"),
    ],
    ids=["no_grad", "inference_mode", "enable_grad", "autocast", "meta as the default device"],
)
def test_a_rewrite_inside_of_a_context(context: Any) -> None:
    """Whatever the caller is in the middle of, the result is the same to the bit, and can learn."""
    model, expected = pair()
    entered: AbstractContextManager[Any] = context()
    with entered:
        fused = fxr.fuse(model)
    for name, tensor in expected.state_dict(keep_vars=True).items():
        found = fused.state_dict(keep_vars=True)[name]
        assert not found.is_inference()
        assert found.requires_grad == tensor.requires_grad
        assert torch.equal(found, tensor)
    fused(nets.X).sum().backward()


def test_a_default_dtype_does_not_matter() -> None:
    """The process's default dtype has no part in the fold."""
    model, expected = pair()
    torch.set_default_dtype(torch.float16)
    try:
        fused = fxr.fuse(model)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(map(torch.equal, fused.state_dict().values(), expected.state_dict().values()))


@pytest.mark.parametrize("training", [False, True])
def test_the_mode_is_kept(training: bool) -> None:
    """Each module of the result is in the mode that the model's was in, the root too."""
    model = nets.randomise(Block())
    model.head.train(training)
    model.training = training
    fused = fxr.fuse(model)
    assert fused.training is training
    assert fused.get_submodule("head").training is training
    assert not fused.get_submodule("stem").training
    assert not fused.get_submodule("conv_1").training


def test_the_model_and_the_result_learn_apart() -> None:
    """Training the result's new weights leaves the model's own alone."""
    model, fused = pair()
    expected = model(nets.X).detach()
    with torch.no_grad():
        fused.get_parameter("stem.0.weight").add_(1.0)
        fused.get_parameter("conv_1.bias").add_(1.0)
    assert torch.equal(model(nets.X), expected)


def test_a_result_can_be_rewritten_and_loaded_again() -> None:
    """A result that was saved and loaded is a model like any other."""
    _, fused = pair()
    expected = [fused(nets.X)]
    again, report = fxr.rewrite(saved_and_loaded(fused), "conv_bn")
    assert report.findings == ()
    assert checks.largest_error(expected, [again(nets.X)]) == 0.0
