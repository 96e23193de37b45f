"""The table of `simulations.baselines`."""

from __future__ import annotations

import math
import statistics

from simulations.methods.report import spread
from simulations.runner import Lines, Table, seeds_of

KNOWS = {
    "alone": "nothing",
    "ensemble": "every model",
    "FedAvg": "the mean of all models, each round",
    "FedProx": "the mean of all models, each round",
    "class statistics": "sums of features by class",
    "FedDF": "every model, and public pictures",
    "DENSE": "every model, and examples a class",
    "FedMITR": "every model, and examples a class",
    "ours": "every model, examples a class, and means of features",
}
"""What the server learns."""


def table(lines: Lines) -> list[Table]:
    """Accuracy and cost by method, means over the seeds."""
    from simulations.baselines import METHODS

    rows = [["method", "accuracy, %", "client s", "server s", "MB", "server knows", "needs"]]
    for method, baseline in METHODS.items():
        own = [line for line in lines if line["method"] == method]
        if not own:
            continue
        client, server, sent = (_mean([line[key] for line in own if line[key] is not None])
                                for key in ("client_seconds", "server_seconds", "bytes"))  # fmt: skip
        scores = spread([100 * line["accuracy"] for line in own])
        if "best" in own[0]:
            scores += f" (best {spread([100 * line['best'] for line in own])})"
        costs = [f"{client:.0f}", f"{server:.0f}", f"{sent / 1e6:.2g}"]
        rows.append([method, scores, *costs, KNOWS[method], baseline.needs])
    return [Table(f"four clients, Dirichlet(0.3), seeds {seeds_of(lines)}", rows)]


def _mean(values: list[float]) -> float:
    return statistics.fmean(values) if values else math.nan
