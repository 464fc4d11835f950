"""What AIMET proves of its folding of batch norms into the layers before and behind them.

After `TrainingExtensions/torch/test/python/test_bn_fold.py` of AIMET (Qualcomm, BSD-3-Clause) at
commit c51b284b, the class TestTrainingExtensionBnFold. The names are theirs, the models and the
words are not. docs/peers.md lists what differs.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from checks import difference, norms, rewritten
from fxrewrite.patterns.conv_bn import ConvBn, fold_conv_bn
from nets import BATCH_NORMS, random_input, randomise
from torch import nn
from torch.nn.utils import fusion

import fxrewrite as fxr


def example(layer: nn.Module) -> torch.Tensor:
    """An input with ten channels, of the rank that a layer reads."""
    return random_input((2, 10, *[6] * (layer.weight.dim() - 2)))


def norm_of(layer: nn.Module, features: int) -> nn.Module:
    return BATCH_NORMS[max(layer.weight.dim() - 2, 1)](features)


def before(layer: nn.Module) -> nn.Sequential:
    """A norm between an activation and a layer."""
    return randomise(nn.Sequential(nn.ReLU(), norm_of(layer, 10), layer)).double()


def after(layer: nn.Module) -> nn.Sequential:
    """A norm between a layer and an activation."""
    features = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    return randomise(nn.Sequential(layer, norm_of(layer, features), nn.ReLU())).double()


def check(model: nn.Sequential, layer: int, into: Any) -> Any:
    """The norm goes, and the new bias is like the weight in all but its shape; gives the layer."""
    x = example(model[layer])
    made, _ = rewritten(model, "affine", x, example_inputs=x, into=into)
    assert norms(made) == []
    new: Any = made.get_submodule(str(layer))
    assert new.bias.requires_grad == new.weight.requires_grad
    assert (new.bias.device, new.bias.dtype) == (new.weight.device, new.weight.dtype)
    return new


class Mixed(nn.Module):
    """A norm behind a convolution, one before one, and two that read the same convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(10, 8, 3), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6)
        self.conv3, self.conv4 = nn.Conv2d(6, 8, 3), nn.Conv2d(8, 8, 3)
        self.bn3, self.bn4 = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.relu, self.fc1 = nn.ReLU(), nn.Linear(32, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.bn2(self.relu(self.conv2(x)))
        x = self.conv4(self.conv3(x))
        x = self.bn3(x) + self.bn4(x)
        return self.fc1(x.view(x.size(0), -1))


def mixed() -> tuple[Any, torch.Tensor]:
    return randomise(Mixed()).double(), random_input((2, 10, 10, 10))


def two_pairs() -> Any:
    """Two convolutions with a norm each."""
    pairs = [(nn.Conv2d(10, 10, 1, bias=False), nn.BatchNorm2d(10), nn.ReLU()) for _ in range(2)]
    return randomise(nn.Sequential(*pairs[0], *pairs[1])).double()


def test_fold_resnet18(into: Any) -> None:
    """One pair of several can be chosen, by a guard: the other stays, to the very module."""
    model = two_pairs()

    def is_chosen(m: ConvBn) -> str | None:
        return None if m.conv is model[3] else "it was not asked for"

    @fxr.rule(where=[*fold_conv_bn.guards, is_chosen])
    def fold_given(m: ConvBn) -> Any:
        return fold_conv_bn(m)

    made, report = rewritten(model, fold_given, example(model[0]), into=into)
    assert norms(made) == ["1"]
    assert "it was not asked for" in report.why("1")
    assert not torch.equal(made.get_submodule("3").weight, model[3].weight)
    assert made.get_submodule("0").weight is model[0].weight


def test_python_impl(into: Any) -> None:
    """Another implementation, torch's, makes the same weights; AIMET compares two of its own."""
    model = two_pairs()
    made, _ = rewritten(model, "conv_bn", example(model[0]), into=into)
    for at in (0, 3):
        theirs = fusion.fuse_conv_bn_eval(model[at], model[at + 1])
        for name in ("weight", "bias"):
            mine = getattr(made.get_submodule(str(at)), name)
            torch.testing.assert_close(mine, getattr(theirs, name), rtol=1e-12, atol=1e-12)


def test_fold_bn_before_conv_no_bias(into: Any) -> None:
    check(before(nn.Conv2d(10, 6, 2, bias=False)), 2, into)


def test_fold_bn_before_conv_with_bias(into: Any) -> None:
    check(before(nn.Conv2d(10, 6, 3)), 2, into)


def kept(model: nn.Sequential, into: Any) -> str:
    """The reason why the norm in a model stays."""
    x = example(model[2])
    made, report = rewritten(model, "affine", x, example_inputs=x, into=into)
    assert norms(made) == ["1"]
    assert torch.equal(made(x), model(x))
    return report.why("1")


def test_fold_bn_before_conv_with_padding(into: Any) -> None:
    """Zeros that are padded would have to be padded with the shift, so the norm stays."""
    model = before(nn.Conv2d(10, 6, 3, padding=1, bias=False))
    assert "it shifts what the convolution pads with zeros" in kept(model, into)


def test_fold_bn_before_conv_with_padding_that_keeps_a_shift(into: Any) -> None:
    """Unlike in AIMET, another padding mode is no obstacle, nor are zeros if nothing is shifted."""
    check(before(nn.Conv2d(10, 6, 3, padding=1, padding_mode="reflect")), 2, into)
    unshifted: Any = before(nn.Conv2d(10, 6, 3, padding=1))
    nn.init.zeros_(unshifted[1].running_mean)
    nn.init.zeros_(unshifted[1].bias)
    x = example(unshifted[2])
    made, _ = rewritten(unshifted, "affine", x, into=into)
    assert norms(made) == []


def test_fold_bn_before_conv_transpose(into: Any) -> None:
    """Outputs at the border see a part of the shift only, so the norm stays."""
    model = before(nn.ConvTranspose2d(10, 6, 3, bias=False))
    assert "it shifts what a transposed convolution reads" in kept(model, into)


def test_fold_bn_before_conv_transpose_with_a_kernel_of_one(into: Any) -> None:
    """Unlike AIMET's, that of one place folds: each output sees one input."""
    check(before(nn.ConvTranspose2d(10, 6, 1)), 2, into)


KEEPS_BEFORE = [
    nn.Conv2d(10, 20, 3, padding=1),
    nn.Conv1d(10, 20, 3, padding=1),
    nn.ConvTranspose2d(10, 20, 3),
]
FOLDS_BEFORE = [nn.Conv2d(10, 20, 3), nn.Linear(10, 10)]
FOLDS_BEFORE_HERE = [
    nn.Conv2d(10, 10, 2, groups=10),
    nn.Conv2d(10, 20, 2, groups=2),
    nn.Conv1d(10, 10, 2, groups=10),
    nn.Conv1d(10, 20, 2, groups=2),
]
FOLDS_AFTER = [
    *(nn.Conv2d(10, 20, 2, padding=padding) for padding in (0, 1)),
    *(nn.Conv2d(10, 20, 2, groups=2), nn.Conv2d(10, 10, 2, groups=10)),
    *(nn.Conv1d(10, 20, 2, padding=padding) for padding in (0, 1)),
    *(nn.Conv1d(10, 20, 2, groups=2), nn.Conv1d(10, 10, 2, groups=10)),
    *(nn.ConvTranspose2d(10, 20, 2, padding=padding) for padding in (0, 1)),
    *(nn.ConvTranspose2d(10, 10, 2, groups=10), nn.Linear(10, 10)),
]
FOLDS_AFTER_HERE = [nn.ConvTranspose2d(10, 20, 2, groups=2)]


@pytest.mark.parametrize("layer", KEEPS_BEFORE, ids=repr)
def test_filter_conv_bn_pair_that_stays(layer: nn.Module) -> None:
    kept(before(layer), "graph")


@pytest.mark.parametrize("layer", [*FOLDS_BEFORE, *FOLDS_BEFORE_HERE], ids=repr)
def test_filter_conv_bn_pair(layer: nn.Module) -> None:
    """A norm before a layer; groups are no obstacle, as they are in AIMET."""
    check(before(layer), 2, "graph")


@pytest.mark.parametrize("layer", [*FOLDS_AFTER, *FOLDS_AFTER_HERE], ids=repr)
def test_filter_conv_bn_pair_behind(layer: nn.Module) -> None:
    """A norm behind a layer; groups of a transposed one are no obstacle, as they are in AIMET."""
    check(after(layer), 0, "graph")


def test_fold_bn_after_conv_no_bias(into: Any) -> None:
    check(after(nn.Conv2d(10, 6, 3, bias=False)), 0, into)


def test_fold_bn_after_conv_depthwise(into: Any) -> None:
    check(after(nn.Conv2d(10, 10, 3, groups=10)), 0, into)


def test_fold_bn_after_transposed_conv_depthwise(into: Any) -> None:
    check(after(nn.ConvTranspose2d(10, 10, 3, groups=10)), 0, into)


def test_fold_bn_after_conv_with_bias(into: Any) -> None:
    check(after(nn.Conv2d(10, 6, 3)), 0, into)


def test_fold_bn_before_linear_layer_no_bias(into: Any) -> None:
    check(before(nn.Linear(10, 6, bias=False)), 2, into)


def test_fold_bn_before_linear_layer_with_bias(into: Any) -> None:
    check(before(nn.Linear(10, 6)), 2, into)


def test_fold_bn_after_linear_layer_no_bias(into: Any) -> None:
    check(after(nn.Linear(10, 6, bias=False)), 0, into)


def test_fold_bn_after_linear_layer_with_bias(into: Any) -> None:
    check(after(nn.Linear(10, 6)), 0, into)


def test_find_batch_norms_to_fold() -> None:
    """`plan` names the pairs, and of the others the reasons, without folding anything."""
    model, _ = mixed()
    report = fxr.plan(model, "affine")
    pairs = {tuple(name for _, name in each.steps) for each in report.applied}
    assert pairs == {("conv1", "bn1"), ("bn2", "conv3")}
    for name, other in (("bn3", "bn4"), ("bn4", "bn3")):
        assert f"is also read by {other}" in report.why(name)
    assert len(norms(model)) == 4


def test_bn_fold_auto_mode_transposed_conv2d(into: Any) -> None:
    """Each transposed convolution of two takes its norm."""
    pair = (nn.ConvTranspose2d(10, 10, 3), nn.BatchNorm2d(10), nn.ReLU())
    last = (nn.ConvTranspose2d(10, 10, 3), nn.BatchNorm2d(10))
    model = randomise(nn.Sequential(*pair, *last)).double()
    made, report = rewritten(model, "affine", example(model[0]), into=into)
    assert norms(made) == []
    assert len(report.applied) == 2


class TwoInputs(nn.Module):
    """A forward that takes any number of arguments, and reads two."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 6, 2, 2, 2, bias=False), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(3, 4, 3, 2, 2), nn.BatchNorm2d(4)
        self.conv3, self.pool = nn.Conv2d(4, 6, 3, 2, 2), nn.AdaptiveAvgPool2d(10)

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        x = self.bn1(self.conv1(inputs[0]))
        y = self.bn2(self.conv2(inputs[1]))
        return torch.relu(x + self.pool(self.conv3(y)))


@pytest.mark.parametrize("known", [False, True])
def test_find_batch_norms_to_fold_multi_input(into: Any, known: bool) -> None:
    """Both norms go, into the convolutions before them, whether inputs are given or not."""
    model = randomise(TwoInputs()).double()
    inputs = (random_input((1, 3, 16, 16)), random_input((1, 3, 20, 20)))
    options = {"example_inputs": inputs} if known else {}
    made, report = rewritten(model, "affine", *inputs, into=into, **options)
    assert norms(made) == []
    pairs = {tuple(name for _, name in each.steps) for each in report.applied}
    assert pairs == {("conv1", "bn1"), ("conv2", "bn2")}


def test_bn_fold_auto_mode(into: Any) -> None:
    """Of four norms two go, one into the layer before it and one into the layer behind it."""
    model, x = mixed()
    made, report = rewritten(model, "affine", x, into=into)
    assert norms(made) == ["bn3", "bn4"]
    assert len(report.applied) == 2


def test_fold_auto_mode_with_bn_after_Conv1d_layer(into: Any) -> None:
    check(after(nn.Conv1d(10, 6, 2)), 0, into)


def test_fold_manual_with_bn_after_Conv1d_layer_no_bias(into: Any) -> None:
    check(after(nn.Conv1d(10, 6, 2, bias=False)), 0, into)


def test_bn_conversion(into: Any) -> None:
    """A norm that nothing takes stays, with the tensors that it had.

    AIMET writes scale and shift into its weight and bias, and other statistics.
    """
    model: Any = nn.Sequential(nn.Conv1d(10, 6, 2), nn.ReLU(), nn.BatchNorm1d(6))
    randomise(model).double()
    made, report = rewritten(model, "inference", example(model[0]), into=into)
    assert norms(made) == ["2"]
    assert "it reads 1 (ReLU)" in report.why("2")
    bn = made.get_submodule("2")
    for name, tensor in model[2].state_dict(keep_vars=True).items():
        assert getattr(bn, name) is tensor


def test_multi_gpu() -> None:
    """What was folded can be wrapped in `nn.DataParallel`. Here that has no GPU, and calls it."""
    model, x = mixed()
    made, _ = rewritten(model, "affine", x)
    assert difference(nn.DataParallel(model), nn.DataParallel(made), x) <= 1e-9


def test_multi_gpu_of_a_wrapped_model() -> None:
    """Unlike AIMET's, nothing is folded inside of the wrapper, whose forward reads parameters."""
    model, x = mixed()
    wrapped = nn.DataParallel(model)
    made, report = rewritten(wrapped, "affine", x)
    assert norms(made) == norms(wrapped)
    assert "parameters of the Conv2d may be asked for" in report.why("module.bn1")


def test_fold_bn_before_Conv1d_with_bias(into: Any) -> None:
    check(before(nn.Conv1d(10, 6, 2)), 2, into)


def test_fold_bn_before_Conv1d_no_bias(into: Any) -> None:
    check(before(nn.Conv1d(10, 6, 2, bias=False)), 2, into)


def test_fold_bn_before_Conv1d_of_an_unknown_rank(into: Any) -> None:
    """AIMET is always given an input; without one a `BatchNorm1d` stays that may read no batch."""
    model = before(nn.Conv1d(10, 6, 2))
    made, report = rewritten(model, "affine", example(model[2]), into=into)
    assert norms(made) == ["1"]
    assert "example_inputs would decide it" in report.why("1")


def test_bn_fold_conv3d_fold_backward(into: Any) -> None:
    check(after(nn.Conv3d(10, 6, 3)), 0, into)


def test_bn_fold_conv3d_fold_forward(into: Any) -> None:
    """The norm before a convolution goes; the one behind the last activation stays."""
    model = before(nn.Conv3d(10, 6, 3))
    model.extend([nn.ReLU(), nn.BatchNorm3d(6)])
    randomise(model).double()
    made, _ = rewritten(model, "affine", example(model[2]), into=into)
    assert norms(made) == ["4"]
