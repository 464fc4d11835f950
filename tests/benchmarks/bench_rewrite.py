"""What folding batch norms costs and gains, next to `torch.fx.experimental.optimization.fuse`.

Run it as a script; it takes about six minutes. What is compared takes turns, and medians count.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import fx, nn
from torch.fx.experimental.optimization import fuse as torch_fuse
from torch.profiler import ProfilerActivity, profile
from torchvision.models import resnet18, resnet50

import fxrewrite as fxr

# A size is left out for torch's fuse where one call would take longer than this.
PATIENCE_S = 30.0

Clock: TypeAlias = Callable[[], float]


def main() -> None:
    """Measure and print everything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, nargs="+", default=[1, 100, 400, 1600, 6400])
    parser.add_argument("--seconds", type=float, default=10.0, help="for each row, at least")
    parser.add_argument("--batch", type=int, default=10, help="images for resnet18")
    options = parser.parse_args()
    load = f"{torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f} of {os.cpu_count()}"
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {_processor()}, {load}")
    print("\nCPU time per fold, beyond symbolic_trace + recompile, on a chain of conv-bn-relu")
    # A full collection costs what the whole process holds, so one that happens to fall into a call
    # tells little of that call. `timeit` leaves them out; a user does not.
    print("Garbage collector off, as timeit does it:")
    print_cost(options.blocks, options.seconds, collector=False)
    print("Garbage collector on:")
    print_cost(options.blocks, options.seconds, collector=True)
    print_memory()
    print_inference(options.batch, options.seconds)


def print_cost(sizes: Sequence[int], seconds: float, *, collector: bool) -> None:
    """One line for each size."""
    print(f"{'blocks':>8}{'traced in':>12}{'ours':>12}{'torch':>12}{'ours/torch':>12}{'rounds':>8}")
    for blocks in sizes:
        model = chain(blocks)
        calls: dict[str, Callable[[], object]] = {
            "base": lambda model=model: fx.symbolic_trace(model).recompile(),
            "ours": lambda model=model: fxr.fuse(model),
            "torch": lambda model=model: torch_fuse(model),
        }
        # The work is on one thread, so its CPU time is what it takes on an idle machine.
        clock = time.process_time
        warm_up = {name: timed(call, clock, collector=collector) for name, call in calls.items()}
        if warm_up["torch"] > PATIENCE_S:
            del calls["torch"]
        times = in_turns(calls, seconds, clock, collector=collector)
        base = statistics.median(times["base"]) / blocks
        ours = _beyond(times, "ours", blocks)
        if "torch" in calls:
            theirs = _beyond(times, "torch", blocks)
            peer = f"{_us(theirs)}{ours / theirs:12.2f}"
        else:
            peer = f"  skipped: one call takes {warm_up['torch']:.0f} s"
        print(f"{blocks:8}{_us(base)}{_us(ours)}{peer}{len(times['base']):8}")


def print_memory() -> None:
    """Memory that a rewrite of resnet50 takes, by what torch's CPU allocator reports."""
    model = resnet50().eval()
    weights = sum(each.nbytes for each in model.state_dict().values())
    print(f"\nMemory of tensors beside the model, resnet50 ({weights / 1e6:.1f} MB)")
    print(f"{'':8}{'at peak':>12}{'afterwards':>12}{'peak/model':>12}")
    for name, call in (("ours", fxr.fuse), ("torch", torch_fuse)):
        peak, left = allocated(lambda call=call: call(model))
        print(f"{name:8}{peak / 1e6:9.1f} MB{left / 1e6:9.1f} MB{peak / weights:12.2f}")


def print_inference(batch: int, seconds: float) -> None:
    """Time of one forward of resnet18: as it is, ours, torch's."""
    model = resnet18().eval()
    images = torch.randn(batch, 3, 224, 224)
    models = {"original": model, "ours": fxr.fuse(model), "torch": torch_fuse(model)}
    calls = {name: lambda each=each: each(images) for name, each in models.items()}
    with torch.no_grad():
        for call in calls.values():
            call()
        times = in_turns(calls, seconds, time.perf_counter, collector=True)
    medians = {name: statistics.median(each) for name, each in times.items()}
    print(f"\nInference, resnet18 on {batch}x3x224x224, {len(times['ours'])} rounds")
    print(f"{'':8}{'median':>12}{'fastest':>12}{'speed-up':>12}")
    for name, median in medians.items():
        gain = medians["original"] / median
        print(f"{name:8}{1e3 * median:9.1f} ms{1e3 * min(times[name]):9.1f} ms{gain:12.3f}")


def chain(blocks: int) -> nn.Module:
    """Small convolutions, so that the arithmetic of the folds does not hide the rest."""
    steps = (
        nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        for _ in range(blocks)
    )
    return nn.Sequential(*steps).eval()


def in_turns(
    calls: Mapping[str, Callable[[], object]], seconds: float, clock: Clock, *, collector: bool
) -> dict[str, list[float]]:
    """Times of each call, which take turns until the time is up, five rounds at least."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    start = time.perf_counter()
    while len(times["ours"]) < 5 or time.perf_counter() - start < seconds:
        for name, call in calls.items():
            times[name].append(timed(call, clock, collector=collector))
    return times


def timed(call: Callable[[], object], clock: Clock, *, collector: bool) -> float:
    """Seconds that one call takes; what it returns is let go of after the clock has stopped."""
    gc.collect()
    if not collector:
        gc.disable()
    start = clock()
    result = call()
    stop = clock()
    gc.enable()
    del result
    return stop - start


def allocated(call: Callable[[], object]) -> tuple[int, int]:
    """The most that a call had allocated at one time, and what its result keeps, in bytes."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        result = call()
        gc.collect()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiled.export_chrome_trace(str(path))
        events: list[dict[str, Any]] = json.loads(path.read_text())["traceEvents"]
    del result
    live = peak = 0
    memory = [event for event in events if event.get("name") == "[memory]"]
    for event in sorted(memory, key=lambda event: event["args"]["Ev Idx"]):
        live += event["args"]["Bytes"]
        peak = max(peak, live)
    return peak, live


def _beyond(times: dict[str, list[float]], name: str, blocks: int) -> float:
    extra = [each - base for each, base in zip(times[name], times["base"], strict=True)]
    return statistics.median(extra) / blocks


def _us(seconds: float) -> str:
    return f"{1e6 * seconds:9.1f} us"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = (line.partition(": ")[2] for line in lines if line.startswith("model name"))
    return next(named, platform.processor())


if __name__ == "__main__":
    main()
