"""The models that tests are about: of given members, of random steps, or plain chains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from fxrewrite.testing.written import compiled

CONVS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
BATCH_NORMS: dict[int, Any] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
ANY_CONV = tuple(CONVS.values())
ANY_BATCH_NORM = tuple(BATCH_NORMS.values())


def randomise(model: nn.Module, seed: int = 0, decades: float = 0.0) -> nn.Module:
    """Fill all tensors so that no fold is trivial; the model is returned, in eval mode.

    Weights of batch norms are of both signs, some near zero and some zero. With `decades`, scales
    and variances range over that many powers of ten up and down, per channel.
    """
    make = torch.Generator().manual_seed(seed)

    def normal(like: torch.Tensor) -> torch.Tensor:
        return torch.randn(like.shape, generator=make, dtype=torch.float64)

    def spread(like: torch.Tensor) -> torch.Tensor:
        powers = torch.rand(like.shape, generator=make, dtype=torch.float64) * 2 - 1
        return 10 ** (powers * decades)

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, ANY_CONV):
                fan_in = module.weight[0].numel()
                module.weight.copy_(normal(module.weight) / fan_in**0.5)
                if module.bias is not None:
                    module.bias.copy_(normal(module.bias))
            elif isinstance(module, ANY_BATCH_NORM):
                if module.running_mean is not None:
                    module.running_mean.copy_(normal(module.running_mean))
                    var = (0.5 + normal(module.running_var).abs()) * spread(module.running_var)
                    module.running_var.copy_(var)
                if module.weight is not None:
                    weight = normal(module.weight) * spread(module.weight)
                    rare = torch.rand(weight.shape, generator=make)
                    weight = torch.where(rare < 0.1, weight * 1e-8, weight)
                    module.weight.copy_(torch.where(rare < 0.03, torch.zeros(()), weight))
                if module.bias is not None:
                    module.bias.copy_(normal(module.bias))
    return model.eval()


def random_input(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """A normally distributed float64 input."""
    make = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=make, dtype=torch.float64)


class Forward(nn.Module):
    """A model of these members whose forward is a function of the model and its input."""

    def __init__(self, forward: Any, **members: Any) -> None:
        super().__init__()
        self.of = forward
        for name, member in members.items():
            setattr(self, name, member)
        randomise(self)

    def forward(self, x: torch.Tensor) -> Any:
        return self.of(self, x)


def conv() -> nn.Conv2d:
    return nn.Conv2d(4, 4, 3, padding=1)


def bn() -> nn.BatchNorm2d:
    return nn.BatchNorm2d(4)


def conv_bn(forward: Any = lambda m, x: m.bn(m.conv(x)), **members: Any) -> Forward:
    """A convolution and a batch norm, called one after the other unless told otherwise."""
    return Forward(forward, **{"conv": conv(), "bn": bn(), **members})


X = random_input((2, 4, 5, 5))


def chain_of_blocks(count: int) -> fx.GraphModule:
    """A graph module of that many conv -> bn -> relu."""
    blocks = [layer for _ in range(count) for layer in (conv(), bn(), nn.ReLU())]
    return fx.symbolic_trace(randomise(nn.Sequential(*blocks)))


class Tied(nn.Module):
    """Batch norms that are folded, one that stays, tied weights, and what no state dict holds."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv(), bn(), nn.GELU())
        self.conv = nn.Conv2d(4, 4, 1, bias=False)
        self.norm, self.stays = bn(), bn()
        self.head, self.tied = nn.Linear(4, 4), nn.Linear(4, 4)
        self.tied.weight = self.head.weight
        self.register_buffer("scale", torch.full((4,), 0.5), persistent=False)
        self.register_buffer("offset", torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stays(self.norm(self.conv(self.stem(x))).tanh())
        x = x.mean((2, 3)) * self.scale + self.offset + torch.tensor(0.25)
        return self.tied(self.head(x))


def tied() -> nn.Module:
    """Such a model in float32, with a buffer that is not what it was built with."""
    net = randomise(Tied())
    net.offset.fill_(3.0)
    return net.float()


class Attention(nn.Module):
    """One head, in whose forward three layers read one value."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(4, 3), nn.Linear(4, 3, bias=False)
        self.v, self.out = nn.Linear(4, 2), nn.Linear(2, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = torch.softmax(self.q(x) @ self.k(x).transpose(-1, -2), -1)
        return self.out(weights @ self.v(x))


# What follows is for random models. All values have one shape, so any step may follow any other.

Step = tuple[Any, ...]
Values = tuple[Any, ...]


def call(net: nn.Module, values: Values, module: nn.Module, at: int) -> Any:
    return module(values[at])


def call_by_keyword(net: nn.Module, values: Values, module: nn.Module, at: int) -> Any:
    return module(input=values[at])


def read_weight(net: nn.Module, values: Values, module: nn.Module, at: int) -> Any:
    return values[at] * module.weight.mean()


def relu(net: nn.Module, values: Values, at: int) -> Any:
    return F.relu(values[at])


def relu_in_place(net: nn.Module, values: Values, at: int) -> Any:
    return F.relu(values[at], inplace=True)


def scale_in_place(net: nn.Module, values: Values, at: int) -> Any:
    return values[at].mul_(0.5)


def write_through_view(net: nn.Module, values: Values, at: int) -> Any:
    values[at][:, :1].add_(1.0)
    return values[at]


def view(net: nn.Module, values: Values, at: int) -> Any:
    return values[at].view_as(values[0])


def add(net: nn.Module, values: Values, at: int, other: int) -> Any:
    return values[at] + values[other]


def chunk_and_cat(net: nn.Module, values: Values, at: int) -> Any:
    return torch.cat(values[at].chunk(2, dim=1)[::-1], dim=1)


def add_constant(net: nn.Module, values: Values, at: int) -> Any:
    return values[at] + torch.tensor(0.5)


ON_ONE_VALUE = (
    relu,
    relu_in_place,
    scale_in_place,
    write_through_view,
    view,
    chunk_and_cat,
)


class Net(nn.Module):
    """Carries out its steps; step i reads earlier values by number and makes value i + 1.

    The forward is a line of source for each step, so that it can be read as users' code is.
    """

    def __init__(
        self, members: dict[str, nn.Module], steps: list[Step], outputs: list[int]
    ) -> None:
        super().__init__()
        self.steps, self.outputs = steps, outputs
        lines, values = ["def forward(self, x0):"], ["x0"]
        for i, (step, *args) in enumerate(steps):
            given = [f"self.{each}" if each in members else repr(each) for each in args]
            read = ", ".join(["self", f"({', '.join(values)},)", *given])
            lines.append(f"    x{i + 1} = step{i}({read})  # {step.__name__}")
            values.append(f"x{i + 1}")
        lines.append(f"    return ({', '.join(values[at] for at in outputs)},)")
        namespace = {f"step{i}": step for i, (step, *_) in enumerate(steps)}
        compiled("\n".join([*lines, ""]), namespace)
        self.written = namespace["forward"]
        for name, member in members.items():
            parent: nn.Module = self
            *path, last = name.split(".")
            for part in path:
                if not hasattr(parent, part):
                    parent.add_module(part, nn.Module())
                parent = getattr(parent, part)
            parent.add_module(last, member)

    def forward(self, x: torch.Tensor) -> Any:
        return self.written(self, x)

    def extra_repr(self) -> str:
        steps = ", ".join(f"{step.__name__}{tuple(args)}" for step, *args in self.steps)
        return f"steps: {steps} -> {self.outputs}"


def halve_output(module: nn.Module, args: Any, output: Any) -> Any:
    return tuple(each * 0.5 for each in output) if isinstance(output, tuple) else output * 0.5


def halve_input(module: nn.Module, args: Any) -> Any:
    return tuple(arg * 0.5 for arg in args)


def leave_gradient(module: nn.Module, *gradients: Any) -> None:
    return None


HOOKS: list[Callable[[nn.Module], Any]] = [
    lambda module: module.register_forward_hook(halve_output),
    lambda module: module.register_forward_pre_hook(halve_input),
    lambda module: module.register_full_backward_hook(leave_gradient),
]
