"""Timing and memory, fairly: one process, methods in turn, medians."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from smi_fed.models import Classifier, ModelSpec, build_model

SPREAD = 2.0
"""Standard deviation over classes that a trained model's logits have or exceed."""


def random_model(name: str, device: torch.device, classes: int) -> Classifier:
    """A model without pretrained weights, its head scaled until it prefers some classes.

    timm's initial heads are near zero, and a teacher that is sure of nothing cannot show
    whether its confidence falls.
    """
    model = build_model(ModelSpec(name, num_classes=classes)).to(device).eval()
    with torch.no_grad():
        logits = model(torch.rand(8, 3, *model.image_size, device=device))
        backbone: Any = model.backbone
        backbone.get_classifier().weight.mul_(SPREAD / logits.std(1).mean())
    return model


def synchronise(device: torch.device) -> None:
    """Wait until `device` has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def alternating(
    methods: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    repeats: int,
    warmup: int,
    inner: int = 1,
    tick: Callable[[], None] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds per call of each method, `repeats` samples each, after `warmup` dropped ones.

    Methods take turns, so that a change of the machine's speed meets all of them.

    Args:
        inner: calls per sample; the device is waited for once per sample.
        tick: called after each sample.
    """
    samples: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(warmup + repeats):
        for name, method in methods.items():
            synchronise(device)
            started = time.perf_counter()
            for _ in range(inner):
                method()
            synchronise(device)
            samples[name].append((time.perf_counter() - started) / inner)
            tick()
    return {name: values[warmup:] for name, values in samples.items()}


def matmul_rate(
    device: torch.device, dtype: torch.dtype, sizes: tuple[int, ...] | None = None, repeats: int = 7
) -> float:
    """FLOPs per second of a square matrix product, the best of several sizes, median of repeats."""
    sizes = sizes or ((4096, 8192, 12288) if device.type == "cuda" else (1024, 2048, 3072))
    rates = []
    for size in sizes:
        first, second = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        seconds = alternating(
            {"mm": lambda a=first, b=second: a @ b}, device, repeats=repeats, warmup=2, inner=3 if size < 2000 else 1
        )
        rates.append(2 * size**3 / statistics.median(seconds["mm"]))
    return max(rates)


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """The most memory that `call` held at once beyond what was held before it.

    On a GPU by torch's allocator; on CPU from every allocation that the profiler saw.
    """
    if device.type == "cuda":
        synchronise(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        synchronise(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    held = most = 0
    for event in sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"]):
        held += event["args"]["Bytes"]
        most = max(most, held)
    return most
