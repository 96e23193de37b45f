"""Is sparse worth it? `python -m simulations.compare [--seeds 0 1 2] [OVERRIDE ...]`.

The same trained clients are distilled after dense, attention-sparse and random-sparse
inversion at several iteration budgets (settings: conf/experiment/compare.yaml). Each piece
is one JSON line, written when it is done; a run that was stopped goes on where it was. The
picture is student accuracy against inversion seconds.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from simulations.ledger import append_line, read_lines
from simulations.local_clients import digest, trained_clients
from simulations.superlink import PROJECT
from smi_fed.checks import SettingError
from smi_fed.config import Settings, load_settings
from smi_fed.convergence import reaches, speedup
from smi_fed.data import load_images
from smi_fed.devices import choose_device
from smi_fed.files import replacing, writable_directory
from smi_fed.inversion import InversionConfig, StopSchedule
from smi_fed.models import build_seeded
from smi_fed.pipeline import PipelineConfig, TrainedTeacher, distill_student, ensemble_accuracy, invert_teacher, seeded
from smi_fed.progress import show_log
from smi_fed.training import accuracy

log = logging.getLogger("smi_fed")

METHODS = ("dense", "attention", "random")
BUDGETS = (20, 40, 80)
TARGETS = (0.80, 0.85)


def budgeted(config: InversionConfig, method: str, iterations: int) -> InversionConfig:
    """`config` with another number of iterations, its stops moved in proportion; `dense` has none."""
    if method == "dense":
        return replace(config, iterations=iterations, schedule=StopSchedule())
    return replace(config.scaled(iterations), selection=method)


def main(arguments: list[str] | None = None) -> int:
    """Run all pieces that are missing, then draw; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=PROJECT / "runs" / "compare")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args(arguments)
    show_log()
    lines: list[dict[str, Any]] = []
    try:
        output = writable_directory(options.output)
        for seed in options.seeds:
            settings = load_settings(PROJECT / "conf", ["experiment=compare", f"seed={seed}", *options.overrides])
            if settings.server.threads:
                torch.set_num_threads(settings.server.threads)
            lines += compare(settings, options.clients, output)
    except (SettingError, OSError) as error:
        print(f"smi-fed: {error}", file=sys.stderr)
        return 2
    print_table(lines)
    draw(lines, output / "convergence.png")
    print(f"artefacts: {output}")
    return 0


def compare(settings: Settings, clients: int, output: Path) -> list[dict[str, Any]]:
    """All pieces of one seed; finished ones are read from `pieces.jsonl`."""
    ledger = output / "pieces.jsonl"
    device, reason = choose_device(settings.server.device)
    log.info("seed %d, device: %s (%s)", settings.seed, device, reason)
    known = read_lines(ledger)
    teachers: list[TrainedTeacher] = []
    done = []
    for iterations in BUDGETS:
        for method in METHODS:  # methods alternate, so that a change of the machine's speed meets all
            key = digest(settings, clients, iterations, method, str(device), torch.__version__)
            if key not in known:
                if not teachers:
                    teachers = trained_clients(settings, clients, output / "clients")
                    for teacher in teachers:
                        teacher.model.to(device)
                known[key] = {"key": key, **piece(settings, teachers, method, iterations, device)}
                append_line(ledger, known[key])
            done.append(known[key])
    return done


def piece(settings: Settings, teachers: list[TrainedTeacher], method: str, iterations: int,
          device: torch.device) -> dict[str, Any]:  # fmt: skip
    """One student from one method at one budget."""
    _, test = load_images(settings.data)
    inversion = budgeted(settings.inversion, method, iterations)
    pipeline = PipelineConfig(settings.server.images_per_teacher, inversion, settings.distillation)
    log.info("seed %d: %s, %d iterations", settings.seed, method, iterations)
    pairs = [invert_teacher(t, i, pipeline, seeded(settings.seed, 1, i)) for i, t in enumerate(teachers)]
    student = build_seeded(settings.model.student, settings.seed).to(device)
    images = [each for each, _ in pairs]
    distilled = distill_student(
        student, teachers, images, pipeline.distillation, seeded(settings.seed, 1, len(teachers))
    )
    return {
        "seed": settings.seed,
        "method": method,
        "iterations": iterations,
        "schedule": str(inversion.schedule),
        "inversion_seconds": sum(record.seconds for _, record in pairs),
        "distillation_seconds": distilled.seconds,
        "flops": sum(record.flops for _, record in pairs),
        "kept_fraction": statistics.fmean(each.kept_fraction for each in images),
        "student_test_accuracy": accuracy(student, test),
        "ensemble_test_accuracy": ensemble_accuracy(teachers, settings.distillation.ensemble, test),
        "device": str(device),
    }


def curves(lines: Iterable[dict[str, Any]]) -> dict[tuple[int, str], list[dict[str, Any]]]:
    """Pieces by (seed, method), in order of iterations."""
    grouped: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for line in sorted(lines, key=lambda each: each["iterations"]):
        grouped.setdefault((line["seed"], line["method"]), []).append(line)
    return grouped


def seconds_to(curve: list[dict[str, Any]], target: float) -> float | None:
    """Inversion seconds of the cheapest budget from which on the student holds `target`."""
    held = reaches([p["student_test_accuracy"] for p in curve], [float(p["iterations"]) for p in curve], target)
    return next((p["inversion_seconds"] for p in curve if p["iterations"] == held), None)


def print_table(lines: list[dict[str, Any]], console: Console | None = None) -> None:
    """Accuracy by method and budget, and seconds to each target against dense: median (lowest to highest)."""
    console = console or Console(width=120)
    grouped = curves(lines)
    seeds = sorted({seed for seed, _ in grouped})
    table = Table(title=f"student test accuracy in % (inversion seconds), median (range) of seeds {seeds}")
    for heading in ("method", *(f"{budget} iterations" for budget in BUDGETS)):
        table.add_column(heading)
    for method in METHODS:
        cells = []
        for budget in BUDGETS:
            here = [p for seed in seeds for p in grouped[seed, method] if p["iterations"] == budget]
            cells.append(f"{_spread([100 * p['student_test_accuracy'] for p in here])} "
                         f"({statistics.median(p['inversion_seconds'] for p in here):.0f} s)")  # fmt: skip
        table.add_row(method, *cells)
    console.print(table)
    for target in TARGETS:
        for method in METHODS:
            own = [seconds_to(grouped[seed, method], target) for seed in seeds]
            dense = [seconds_to(grouped[seed, "dense"], target) for seed in seeds]
            reached = [value for value in own if value is not None]
            ratios = [r for r in map(speedup, own, dense) if r is not None]
            console.print(
                f"{target:.0%}, {method}: {len(reached)} of {len(seeds)} seeds reach it"
                + (f", {_spread(reached)} s" if reached else "")
                + (f", {_spread(ratios, 2)} times as fast as the cheapest dense" if ratios else "")
            )


def _spread(values: list[float], digits: int = 1) -> str:
    middle = f"{statistics.median(values):.{digits}f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def draw(lines: list[dict[str, Any]], path: Path) -> None:
    """Student accuracy against inversion seconds; a thin line per seed, a thick one for the mean."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axis = figure.subplots()
    grouped = curves(lines)
    for method, colour in zip(METHODS, ("tab:gray", "tab:orange", "tab:blue"), strict=True):
        own = [curve for (_, name), curve in grouped.items() if name == method]
        points = [[(p["inversion_seconds"], 100 * p["student_test_accuracy"]) for p in curve] for curve in own]
        for curve in points if len(points) > 1 else []:
            axis.plot(*zip(*curve, strict=True), color=colour, alpha=0.35, linewidth=1)
        mean = torch.tensor(points, dtype=torch.float64).mean(0).tolist()
        axis.plot(*zip(*mean, strict=True), color=colour, marker="o", label=method)
    for target in TARGETS:
        axis.axhline(100 * target, color="black", linewidth=0.5, linestyle=":")
    seeds = len({seed for seed, _ in grouped})
    title = f"Same clients, same number of images; {seeds} seed{'s' if seeds > 1 else ''}"
    axis.set(xlabel="inversion seconds, all clients", ylabel="student test accuracy in %", title=title)
    axis.legend(title="inversion")
    with replacing(path) as part:
        figure.savefig(part, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
