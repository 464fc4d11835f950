"""How many times as fast layers are when they are merged, within the limits and beyond.

    python tests/benchmarks/bench_siblings.py [threads]

Each line is one kind of layer: over so many shapes the slowest, the median and the fastest. Calls
of the separate and of the merged layers take turns, together with what reads them.
"""

from __future__ import annotations

import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from fxrewrite.patterns.merge_siblings import FEW_OUTPUTS, FEW_WEIGHTS
from torch.nn import functional as F

Calls = Callable[[], Any]
SECONDS, LARGEST = 0.3, 1e9


def medians(*calls: Calls) -> list[float]:
    """The median time of each call in seconds; they take turns."""
    for call in calls * 2:
        call()
    start = time.perf_counter()
    for call in calls:
        call()
    rounds = max(9, min(600, int(SECONDS / (time.perf_counter() - start))))
    times: list[list[float]] = [[] for _ in calls]
    for i in range(rounds):
        order = list(zip(calls, times, strict=True))
        for call, taken in order if i % 2 else order[::-1]:
            start = time.perf_counter()
            call()
            taken.append(time.perf_counter() - start)
    return [statistics.median(each) for each in times]


def gain(x: Any, weights: list[Any], layer: Any, dim: int, read: Any) -> float:
    """The time of separate layers with what reads them, over that of merged ones."""
    whole, sizes = torch.cat(weights), [len(each) for each in weights]
    apart, merged = medians(
        lambda: read([layer(x, each, each.new_zeros(len(each))) for each in weights]),
        lambda: read(
            torch.split_with_sizes(layer(x, whole, whole.new_zeros(len(whole))), sizes, dim)
        ),
    )
    return apart / merged


def linears() -> Iterator[tuple[int, int, float]]:
    """Gate and value, and query, key and value: weights, outputs and gain."""
    for count, width, rows in itertools.product(
        (2, 3), (64, 128, 256, 512, 1024), (1, 4, 16, 64, 256, 1024)
    ):
        if width * width * rows * count > LARGEST:
            continue

        def attend(parts: Any, heads: int = width // 64) -> Any:
            split = (p.view(1, len(p), heads, -1).transpose(1, 2) for p in parts)
            return F.scaled_dot_product_attention(*split)

        read = attend if count == 3 else lambda parts: F.silu(parts[0]) * parts[1]
        weights = [torch.randn(width, width) for _ in range(count)]
        measured = gain(torch.randn(rows, width), weights, F.linear, -1, read)
        yield count * width * width, count * width * rows, measured


def convs(kernel: int) -> Iterator[tuple[int, int, float]]:
    """Branches, each with a ReLU: weights, outputs and gain."""
    for count, channels, side, batch in itertools.product(
        (2, 3), (8, 16, 32, 64, 128, 256), (7, 14, 28, 56), (1, 8)
    ):
        weights = [torch.randn(channels, channels, kernel, kernel) for _ in range(count)]
        size, places = sum(each.numel() for each in weights), side * side * batch
        if size * places > LARGEST:
            continue

        def layer(x: Any, weight: Any, bias: Any) -> Any:
            return F.conv2d(x, weight, bias, padding=kernel // 2)

        x = torch.randn(batch, channels, side, side)
        measured = gain(x, weights, layer, 1, lambda parts: [F.relu(each) for each in parts])
        yield size, count * channels * places, measured


def main() -> None:
    """Print the table."""
    torch.set_num_threads(int(sys.argv[1]) if len(sys.argv) > 1 else 1)
    torch.set_grad_enabled(False)
    for name, measured in (("linear", linears()), ("1x1", convs(1)), ("3x3", convs(3))):
        found: dict[str, list[float]] = {"within": [], "beyond": []}
        for weights, outputs, gained in measured:
            is_small = weights < FEW_WEIGHTS and outputs < FEW_OUTPUTS
            found["within" if is_small else "beyond"].append(gained)
        for where, gains in found.items():
            told = (min(gains), statistics.median(gains), max(gains))
            shown = ", ".join(f"{each:.2f}" for each in told)
            print(f"{name:6} {where} {len(gains):3} shapes: {shown}", flush=True)


if __name__ == "__main__":
    main()
