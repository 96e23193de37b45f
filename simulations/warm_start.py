"""What a warm start saves: `python -m simulations.warm_start [--seeds 0 1 2] [--out FILE.json] [OVERRIDE ...]`.

Clients are trained, inverted, and trained on as in a second round; the second inversion
starts once from noise and once from the first one's images. Told is after how many
iterations the warm one has the loss with which the cold one ends.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

from clients.app import own_images, own_statistics
from simulations.local_clients import trained_clients
from simulations.measuring import environment
from simulations.superlink import PROJECT
from smi_fed.config import Settings, load_settings
from smi_fed.files import write_json
from smi_fed.inversion import SparseImages, invert
from smi_fed.pipeline import TrainedTeacher, draw_targets, seeded
from smi_fed.pool import start_from
from smi_fed.training import train

CLIENTS = 4


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = [row for seed in options.seeds for row in measure(seed, options.overrides)]
    for row in rows:
        there, total = row["iterations_to_cold_end"], len(row["cold"])
        print(f"seed {row['seed']}, client {row['client']}: cold ends at {row['cold'][-1]:.3f} after {total} "
              f"iterations; warm begins at {row['warm'][0]:.3f}, is there after {there or 'none of its'}, ends at "
              f"{row['warm'][-1]:.3f}")  # fmt: skip
    shares = [(row["iterations_to_cold_end"] or len(row["cold"])) / len(row["cold"]) for row in rows]
    print(f"median: {statistics.median(shares):.0%} of the iterations ({min(shares):.0%} to {max(shares):.0%})")
    if options.out:
        write_json(options.out, {"environment": environment(torch.device("cpu")), "rows": rows})
    return 0


def measure(seed: int, overrides: list[str]) -> list[dict[str, Any]]:
    """One row per client."""
    settings = load_settings(PROJECT / "conf", ["experiment=warm_start", f"seed={seed}", *overrides])
    rows = []
    for number, teacher in enumerate(trained_clients(settings, CLIENTS, PROJECT / "runs" / "warm_start")):
        targets = draw_targets(teacher, settings.server.images_per_teacher, seeded(seed, 1, number))
        first, _ = losses(settings, teacher, targets, seeded(seed, 1, number))
        data = own_images(settings, number, CLIENTS, teacher.model.spec)
        train(teacher.model, data, settings.client.training, generator=seeded(seed, number, 2))
        known = own_statistics(settings, teacher.model, data)
        later = TrainedTeacher(teacher.name, teacher.model, len(data), teacher.label_counts, known)
        targets = draw_targets(later, settings.server.images_per_teacher, seeded(seed, 2, number))
        _, cold = losses(settings, later, targets, seeded(seed, 2, number))
        _, warm = losses(settings, later, targets, seeded(seed, 2, number), start_from(first, targets))
        there = next((i + 1 for i, loss in enumerate(warm) if loss <= cold[-1]), None)
        rows.append({"seed": seed, "client": number, "cold": cold, "warm": warm, "iterations_to_cold_end": there})
    return rows


def losses(
    settings: Settings,
    teacher: TrainedTeacher,
    targets: torch.Tensor,
    generator: torch.Generator,
    warm: SparseImages | None = None,
) -> tuple[SparseImages, list[float]]:
    """Images, and the mean loss over batches after each iteration."""
    iterations = settings.inversion.iterations
    seen: list[float] = []
    images = invert(
        teacher.model, targets, settings.inversion, generator=generator, statistics=teacher.statistics, warm=warm,
        progress=lambda now: seen.append(float(now.loss)),
    )  # fmt: skip
    batches = torch.tensor(seen).view(-1, iterations)
    return images, batches.mean(0).tolist()


if __name__ == "__main__":
    sys.exit(main())
