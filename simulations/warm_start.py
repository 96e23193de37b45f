"""What a warm start saves: `python -m simulations.warm_start [--seeds 0 1 2] [OVERRIDE ...]`.

Clients are trained, inverted, and trained on as in a second round; the second inversion
starts once from noise and once from the first one's images. Told is after how many
iterations the warm one has the loss with which the cold one ends.
"""

from __future__ import annotations

import statistics
import sys

import torch

from clients.app import own_images, own_statistics
from simulations.local_clients import check_clients, trained_client
from simulations.runner import Cell, Line, Lines, Study, Table, command
from smi_fed.config import Settings
from smi_fed.inversion import SparseImages, invert
from smi_fed.pipeline import TrainedTeacher, draw_targets, seeded
from smi_fed.pool import start_from
from smi_fed.training import train

CLIENTS = 4


def measure(settings: Settings, cell: Cell) -> Line:
    """Both curves of one client."""
    number = cell["client"]
    teacher = trained_client(settings, number, CLIENTS, cell.output / "clients")
    teacher.model.to(cell.device)
    targets = draw_targets(teacher, settings.server.images_per_teacher, seeded(settings.seed, 1, number))
    first, _ = losses(settings, teacher, targets, seeded(settings.seed, 1, number))
    data = own_images(settings, number, CLIENTS, teacher.model.spec)
    train(teacher.model, data, settings.client.training, generator=seeded(settings.seed, number, 2))
    known = own_statistics(settings, teacher.model, data)
    later = TrainedTeacher(teacher.name, teacher.model, len(data), teacher.label_counts, known)
    targets = draw_targets(later, settings.server.images_per_teacher, seeded(settings.seed, 2, number))
    _, cold = losses(settings, later, targets, seeded(settings.seed, 2, number))
    _, warm = losses(settings, later, targets, seeded(settings.seed, 2, number), start_from(first, targets))
    there = next((i + 1 for i, loss in enumerate(warm) if loss <= cold[-1]), None)
    return {"cold": cold, "warm": warm, "iterations_to_cold_end": there}


def table(lines: Lines) -> list[Table]:
    """A sentence for each client, and the median."""
    per_client = [
        f"seed {line['seed']}, client {line['client']}: cold ends at {line['cold'][-1]:.3f} after {len(line['cold'])} "
        f"iterations; warm begins at {line['warm'][0]:.3f}, is there after "
        f"{line['iterations_to_cold_end'] or 'none of its'}, ends at {line['warm'][-1]:.3f}"
        for line in lines
    ]
    shares = [(line["iterations_to_cold_end"] or len(line["cold"])) / len(line["cold"]) for line in lines]
    spread = f"({min(shares):.0%} to {max(shares):.0%})"
    return [Table(notes=[*per_client, f"median: {statistics.median(shares):.0%} of the iterations {spread}"])]


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


STUDY = Study(
    name="warm_start", about=__doc__, cells=lambda _: [Cell({"client": number}) for number in range(CLIENTS)],
    measure=measure, table=table, words=("experiment=warm_start",), check=check_clients,
)  # fmt: skip
main = command(STUDY)


if __name__ == "__main__":
    sys.exit(main())
