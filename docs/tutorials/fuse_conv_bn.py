"""
Folding batch norms into convolutions
=====================================

In eval mode a batch norm multiplies each channel by a constant and adds another. A convolution
right before it can do the same with a scaled weight and a shifted bias, so that the batch norm
need not run at all. This program folds the batch norms of a small model, checks the result, asks
why two of them had to stay, writes the rule anew to show how little it is, and times ResNet-18.

The idea, and the three ways of placing a batch norm in the model below, come from PyTorch's
tutorial "Building a Convolution/Batch Norm fuser in FX".
"""

# %%
# A model
# -------
#
# FX sees through containers. A batch norm beside its convolution, one at the head of a
# ``Sequential``, and one inside a module of our own are the same to it: a call after a call.
# Two more can't be folded. One normalises the model's input, which no convolution makes. The other
# follows a convolution whose output a skip connection also reads.

import copy

import torch
from torch import nn
from torch.utils import benchmark
from torchvision.models import resnet18

import fxrewrite as fxr


class Normalised(nn.Module):
    """A batch norm wrapped in a module."""

    def __init__(self, channels):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x):
        """Only the batch norm."""
        return self.norm(x)


class Model(nn.Module):
    """Five batch norms, three of them right after a convolution that nothing else reads."""

    def __init__(self):
        super().__init__()
        self.whiten = nn.BatchNorm2d(3)
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.stem_bn = nn.BatchNorm2d(8)
        self.expand = nn.Conv2d(8, 16, 1)
        self.block = nn.Sequential(nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1))
        self.wrapped = Normalised(16)
        self.branch = nn.Conv2d(16, 16, 3, padding=1, groups=4)
        self.branch_bn = nn.BatchNorm2d(16)

    def forward(self, x):
        """Images to features."""
        x = self.stem_bn(self.stem(self.whiten(x)))
        x = self.wrapped(self.block(self.expand(x)))
        branch = self.branch(x)
        return branch + self.branch_bn(branch)


# %%
# A new batch norm has mean 0, variance 1, weight 1 and bias 0. Folding it changes next to nothing,
# and a wrong fold would go unseen. So everything is drawn at random, weights of both signs too.


def with_random_batch_norms(model):
    """The model in eval mode, as if it had been trained."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.weight, -1.5, 1.5)
            nn.init.normal_(module.bias)
    return model.eval()


torch.manual_seed(0)
model = with_random_batch_norms(Model())

# %%
# Folding
# -------
#
# :func:`fxrewrite.fuse` gives a new model. The one that it was given stays as it was, and all
# weights that did not change are shared between the two.

fused = fxr.fuse(model)
print(fused.code)

# %%
# Each of the three pairs is one convolution now, under the convolution's old name. The two batch
# norms that had to stay are still called.

batch_norms = [name for name, each in fused.named_modules() if isinstance(each, nn.BatchNorm2d)]
assert batch_norms == ["whiten", "branch_bn"]
assert "stem_bn" not in fused.code
assert "block.0" not in fused.code
assert "wrapped" not in fused.code

# %%
# Is it the same model?
# ---------------------
#
# In exact arithmetic, yes. In float64 the outputs agree to the last few bits. In float32 each
# model rounds in its own way, so both are measured against the original model in float64: folding
# has not moved the result further away.

x = torch.randn(4, 3, 32, 32)
exact = copy.deepcopy(model).double()

with torch.no_grad():
    expected = exact(x.double())
    torch.testing.assert_close(fxr.fuse(exact)(x.double()), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-5)
    error_before = (model(x) - expected).abs().max() / expected.abs().max()
    error_after = (fused(x) - expected).abs().max() / expected.abs().max()

print(f"largest relative error: {error_before:.1e} as it was, {error_after:.1e} folded")
assert error_after <= 1e-6

# %%
# What was done, and what was not
# -------------------------------
#
# :func:`fxrewrite.rewrite` takes any rules and gives a report with the new model. ``"conv_bn"`` is
# the name of the rule set behind ``fuse``.

_, report = fxr.rewrite(model, "conv_bn", expect={"conv_bn": 3})
print(report)

# %%
# A batch norm was *missed* where no convolution stands before it. It was *refused* where one
# does, but folding would be wrong. The report can be asked about any module of the model.

print(report.why("whiten"))
print(report.why("branch_bn"))
print(report.why("wrapped.norm"))
assert "reads the model's input" in report.why("whiten")
assert "also read by" in report.why("branch_bn")

# %%
# The rule, from scratch
# ----------------------
#
# The built-in rule knows more kinds of layers and number types, but it is no different in kind
# from this one. A *pattern* is a class: its fields are the steps of a chain, in order.


@fxr.pattern
class ConvBn:
    """A convolution and the batch norm that reads it."""

    conv: nn.Conv2d
    bn: nn.BatchNorm2d


# %%
# A *guard* looks at a match and gives a reason to leave it alone, or ``None``. That the
# convolution has no other reader, that both modules are in eval mode, carry no hooks and are not
# needed elsewhere, is the engine's business and need not be said here.


def keeps_statistics(m: ConvBn) -> str | None:
    """A batch norm without running statistics depends on the batch."""
    return "it keeps no running statistics" if m.bn.running_mean is None else None


# %%
# A *rule* makes the replacement out of a match. It builds new tensors and a new module and touches
# neither the graph nor the modules it was given. ``evolve`` copies a module with some of its
# tensors changed.


@fxr.rule(where=[keeps_statistics])
def fold(m: ConvBn) -> fxr.Replace:
    """Let the convolution do what the batch norm did."""
    conv, bn = m.conv, m.bn
    scale = bn.weight.double() / (bn.running_var.double() + bn.eps).sqrt()
    shift = bn.bias - bn.running_mean * scale
    if conv.bias is not None:
        shift = shift + conv.bias * scale
    weight = conv.weight * scale.view(-1, 1, 1, 1)
    new_conv = fxr.evolve(conv, weight=weight.to(conv.weight), bias=shift.to(conv.weight))
    return fxr.Replace(new_conv, slot="conv")


# %%
# That is all of it. It finds the same three places and gives the same model.

ours, our_report = fxr.rewrite(model, fold)
print(our_report)
assert ours.code == fused.code
with torch.no_grad():
    torch.testing.assert_close(ours(x), fused(x))

# %%
# And since a match is an instance of the pattern's class, a rule can be tried without any model.

pair = with_random_batch_norms(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))
with torch.no_grad():
    action = fold(ConvBn(conv=pair[0], bn=pair[1]))
    torch.testing.assert_close(action.module(x), pair(x), rtol=1e-4, atol=1e-5)

# %%
# Is it faster?
# -------------
#
# ResNet-18 on a batch of ten images: as it comes, folded, and folded and compiled with TorchScript.
# The three take turns, so that whatever else the machine does slows all of them alike, and the
# medians are compared.

images = torch.randn(10, 3, 224, 224)
network = with_random_batch_norms(resnet18())
folded, report = fxr.rewrite(network, "conv_bn", expect={"conv_bn": 20})
scripted = torch.jit.script(folded)

with torch.no_grad():
    expected = network(images)
    for each in (folded, scripted):
        error = (each(images) - expected).abs().max() / expected.abs().max()
        assert error <= 1e-5, f"relative error {error:.1e}"

# %%
# How much is won depends on the machine. The convolutions do nearly all of the arithmetic, and the
# batch norms mostly move memory: a few percent of the time on one thread, more where many threads
# share the memory.

contestants = {"unfused": network, "fused": folded, "fused and scripted": scripted}
timers = {
    name: benchmark.Timer(
        "model(images)",
        globals={"model": each, "images": images},
        num_threads=torch.get_num_threads(),
    )
    for name, each in contestants.items()
}
times = {name: [] for name in timers}
with torch.no_grad():
    for _ in range(5):
        for name, timer in timers.items():
            times[name].append(timer.timeit(1).median)

medians = {name: torch.tensor(each).median().item() for name, each in times.items()}
for name, median in medians.items():
    print(f"{name:20}{1e3 * median:8.1f} ms{medians['unfused'] / median:8.2f}x")
