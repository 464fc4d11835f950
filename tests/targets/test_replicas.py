"""Replicas as `nn.DataParallel` makes them: each in a thread, with the hooks of one model."""

from __future__ import annotations

import threading
from typing import Any

import torch
from nets import X, bn, conv, randomise
from torch import nn

import fxrewrite as fxr


class Block(nn.Module):
    """A convolution and a norm that may be called apart."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = conv(), bn()

    def forward(self, x: torch.Tensor) -> Any:
        y = self.conv(x)
        return self.bn(y) if x.sum() > -1e9 else y


def replica(module: nn.Module) -> nn.Module:
    """One replica, as `torch.nn.parallel.replicate` makes it for each device."""
    made: Any = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        made._modules[name] = None if child is None else replica(child)
    for name, parameter in module._parameters.items():
        if parameter is None:
            made._parameters[name] = None
        else:
            setattr(made, name, parameter.detach())
    return made  # type: ignore[no-any-return]


def test_each_replica_is_guarded_in_its_thread() -> None:
    torch.manual_seed(0)
    model = randomise(nn.Sequential(Block(), Block())).double().eval()
    made, _ = fxr.rewrite(model, "conv_bn", X, expect={"conv_bn": 2})
    found: list[Any] = []

    def run(each: nn.Module, x: torch.Tensor) -> None:
        with torch.no_grad():
            try:
                for _ in range(10):
                    y = each(x)
                found.append(torch.allclose(y, model(x), rtol=1e-9, atol=1e-9))
            except fxr.errors.GuardError as error:
                found.append(str(error).partition(".")[0])

    inputs = [X, X * 2, X - 1e9]
    threads = [threading.Thread(target=run, args=(replica(made), x)) for x in inputs]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert sorted(map(str, found)) == ["True", "True", "what 0"]
