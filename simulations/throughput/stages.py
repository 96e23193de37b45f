"""Settings; milliseconds, FLOPs and memory of an inversion's stages, and of whole trajectories made of them."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable
from dataclasses import asdict, field, replace
from functools import partial
from itertools import count
from typing import Any, Literal

import torch
from torch import Tensor

from simulations.throughput.measuring import alternating, peak_bytes
from simulations.throughput.naive import NaiveInversion
from simulations.throughput.one_device import FederationConfig
from smi_fed.checks import Count, Device, Flag, Natural, Text, checked, require
from smi_fed.inversion import InversionConfig, StopSchedule
from smi_fed.inversion.acceleration import accelerated
from smi_fed.inversion.flops import StageFlops, stage_flops
from smi_fed.inversion.loop import start, step, stop_patches
from smi_fed.inversion.losses import neighbours
from smi_fed.inversion.problem import Problem, pose
from smi_fed.inversion.state import State
from smi_fed.inversion.teacher import frozen
from smi_fed.models import Classifier
from smi_fed.progress import Bar

log = logging.getLogger("smi_fed")

CLASSES = 1000


@checked
class ThroughputConfig:
    """Settings; see simulations/throughput/throughput.yaml for what each is.

    Raises:
        SettingError: naming what cannot be.
    """

    device: Device = "auto"
    model: Text = "deit_tiny_patch16_224"
    batch: Count = 16
    dtype: Literal["float32", "bfloat16"] = "float32"
    compile: Flag = False
    iterations: Count = 4000
    schedule: Text = "50:0.3,100:0.3,200:0.3,300:0.3"
    threads: Natural = 0
    warmup: Natural = 1
    repeats: Count = 7
    inner: Count = 1
    run: Natural = 80
    sweep: tuple[Count, ...] = ()
    seed: Natural = 0
    federation: FederationConfig = field(default_factory=FederationConfig)
    out: Text = ""

    def __post_init__(self) -> None:
        stops = StopSchedule.parse(self.schedule).stops
        require(bool(stops), "schedule", self.schedule, "at least one stop: dense is measured beside it")
        require(stops[-1][0] < self.iterations, "schedule", self.schedule, "stops before the last iteration")

    def inversion(self, **changes: Any) -> InversionConfig:
        """The paper's setting as measured here, with `changes`."""
        own = {"precision": self.dtype, "compile": self.compile, "batch_size": self.batch}
        return InversionConfig.paper(**{"iterations": self.iterations, "schedule": self.schedule, **own, **changes})


def stages_of(config: ThroughputConfig, model: Classifier, targets: Tensor) -> tuple[Problem, list[State]]:
    """A batch at the beginning of each stage, the first one dense."""
    problem = pose(model, config.inversion(), config.seed)
    states = [start(problem, torch.arange(len(targets), device=targets.device), targets)]
    patches = states[0].kept.shape[1]
    for _, kept in problem.config.schedule.kept_counts(patches)[1:]:
        state = states[-1].map(torch.clone)
        stop_patches(problem, state, kept)
        states.append(state)
    return problem, states


def stepper(problem: Problem, state: State) -> Callable[[], Tensor]:
    """One iteration of `state` as a call."""
    return partial(step, problem, state, neighbours(state.kept, problem.teacher.grid))


def trajectory(config: ThroughputConfig, model: Classifier, targets: Tensor, rate: float) -> dict[str, Any]:
    """Settings; milliseconds, FLOPs and memory of every stage and method, and of whole trajectories."""
    device = targets.device
    naive = NaiveInversion(model, targets, config.seed)
    counted = stage_flops(model, config.inversion(compile=False, precision="float32"))
    with frozen(model), accelerated(model, config.inversion()), torch.enable_grad():
        problem, states = stages_of(config, model, targets)
        methods: dict[str, Callable[[], object]] = {"naive": naive.step}
        methods |= {f"stage {i}": stepper(problem, state) for i, state in enumerate(states)}
        kept = [state.kept.shape[1] for state in states]
        # A stop takes its tensors out of the state it is given, so each call gets a state of its own.
        stops: dict[str, Callable[[], object]] = {
            f"stop {i}": lambda s=states[i - 1], k=kept[i]: stop_patches(problem, replace(s), k)
            for i in range(1, len(states))
        }
        samples = config.warmup + config.repeats
        with Bar("samples", samples * (len(methods) + len(stops)), unit="sample") as bar:
            ticks = count(1)
            tick = lambda: bar.at(next(ticks))  # noqa: E731
            times = alternating(
                methods, device, repeats=config.repeats, warmup=config.warmup, inner=config.inner, tick=tick
            )
            times |= alternating(stops, device, repeats=config.repeats, warmup=config.warmup, tick=tick)
        peaks = {name: peak_bytes(methods[name], device) for name in ("naive", "stage 0", f"stage {len(states) - 1}")}
    held = {name: sum(t.nbytes for t in state.tensors().values()) for name, state in
            (("stage 0", states[0]), (f"stage {len(states) - 1}", states[-1]))}  # fmt: skip
    # Images and two moments; the engine's states hold the stopped pixels beside these.
    held["naive"] = 3 * naive.images.nbytes
    weights = sum(t.nbytes for t in model.state_dict().values())
    memory = {name: peak + held[name] + weights for name, peak in peaks.items()}
    medians = {name: statistics.median(values) for name, values in times.items()}
    return summary(config, counted, medians, memory, rate) | {"samples": times}


def summary(
    config: ThroughputConfig,
    counted: list[StageFlops],
    medians: dict[str, float],
    memory: dict[str, int],
    rate: float,
) -> dict[str, Any]:
    """Stages and whole trajectories from medians (seconds), peaks (bytes) and the matmul rate."""
    batch, last = config.batch, len(counted) - 1
    stages = []
    for i, stage in enumerate(counted):
        seconds, flops = medians[f"stage {i}"], batch * stage.iteration
        stages.append(asdict(stage) | {
            "ms": 1000 * seconds,
            "stop_ms": 1000 * medians.get(f"stop {i}", 0.0),
            "bound_ms": 1000 * flops / rate,
            "share_of_matmul_rate": flops / rate / seconds,
        })  # fmt: skip
    sparse = sum((s["end"] - s["begin"]) * s["ms"] + s["stop_ms"] for s in stages) / 1000
    seconds = {
        "naive": config.iterations * medians["naive"],
        "dense": config.iterations * medians["stage 0"],
        "sparse": sparse,
    }
    flops = {"dense": config.iterations * counted[0].iteration, "sparse": sum(stage.total for stage in counted)}
    peaks = {"naive": memory["naive"], "dense": memory["stage 0"], "last stage": memory[f"stage {last}"]}
    return {
        "stages": stages,
        "naive_ms": 1000 * medians["naive"],
        "trajectory_seconds": seconds,
        "images_per_second": {name: batch / value for name, value in seconds.items()},
        "flops_per_image": flops,
        "flops_below_dense": 1 - flops["sparse"] / flops["dense"],
        "bound_images_per_second": {name: rate / value for name, value in flops.items()},
        "peak_bytes": peaks,
        "last_stage_over_dense_memory": peaks["last stage"] / peaks["dense"],
        "ratios": {
            "dense over naive": seconds["naive"] / seconds["dense"],
            "sparse over dense": seconds["dense"] / seconds["sparse"],
            "sparse over naive": seconds["naive"] / seconds["sparse"],
            "sparse over dense, bound": flops["dense"] / flops["sparse"],
        },
    }


def sweep(config: ThroughputConfig, model: Classifier, rate: float) -> list[dict[str, Any]]:
    """Milliseconds per image and share of the matmul rate at other batch sizes, dense and in the last stage."""
    rows = []
    counted = stage_flops(model, config.inversion(compile=False, precision="float32"))
    device = next(model.parameters()).device
    for batch in config.sweep:
        try:
            with frozen(model), accelerated(model, config.inversion()), torch.enable_grad():
                problem, states = stages_of(config, model, torch.arange(batch, device=device) % CLASSES)
                methods = {"dense": stepper(problem, states[0]), "last stage": stepper(problem, states[-1])}
                times = alternating(methods, device, repeats=config.repeats, warmup=config.warmup, inner=config.inner)
        except torch.OutOfMemoryError:
            log.warning("batch %d does not fit", batch)
            continue
        row: dict[str, Any] = {"batch": batch}
        for name, stage in (("dense", counted[0]), ("last stage", counted[-1])):
            seconds = statistics.median(times[name])
            row[name] = {
                "ms_per_image": 1000 * seconds / batch,
                "share_of_matmul_rate": batch * stage.iteration / rate / seconds,
            }
        rows.append(row)
    return rows
