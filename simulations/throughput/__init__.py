"""What an inversion costs, and against what: `python -m simulations.throughput [KEY=VALUE ...]`.

Three yardsticks: `naive`, dense inversion as commonly published (`simulations.throughput.naive`);
`dense`, our own engine without a stop, so that sparsity is credited only with what it
adds; and the bound, FLOPs over the matrix-multiply rate that this device reached in this
run. Settings and the command for a GPU: simulations/throughput/throughput.yaml. Weights and images are
random: what is timed does not depend on them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from simulations.runner import Cell, Study, run
from simulations.runner.ledger import environment
from simulations.throughput.checks import agreement, whole_run
from simulations.throughput.measuring import matmul_rate, random_model
from simulations.throughput.one_device import federation
from simulations.throughput.stages import CLASSES, ThroughputConfig, sweep, trajectory
from simulations.throughput.table import tables
from smi_fed.checks import read
from smi_fed.config import compose
from smi_fed.files import writable_directory, write_json
from smi_fed.models import ModelSpec, build_model


def settings(words: Sequence[str]) -> ThroughputConfig:
    """throughput.yaml with overrides.

    Raises:
        SettingError: naming what cannot be.
    """
    return read(ThroughputConfig, compose(Path(__file__).parent, words, "throughput"))


def measure(config: ThroughputConfig, device: torch.device) -> dict[str, Any]:
    """All that the command measures."""
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    model = random_model(config.model, device, CLASSES)
    targets = torch.arange(config.batch, device=device) % CLASSES
    rates = {name: matmul_rate(device, getattr(torch, name)) for name in ("float32", "bfloat16")}
    result: dict[str, Any] = {"config": asdict(config), "environment": environment(device), "matmul_rate": rates}
    result |= trajectory(config, model, targets, rates[config.dtype])
    if config.sweep:
        result["sweep"] = sweep(config, model, rates[config.dtype])
    if config.run:
        result["run"] = whole_run(config.inversion(), config.run, model, targets, result["stages"])
    result["agreement"] = agreement(config.inversion(), model, targets[:4])
    if config.federation.images:
        del model
        result["federation"] = federation(config.federation, config.inversion(), device, config.seed)
    return result


def check(config: ThroughputConfig, _cell: Cell) -> None:
    """Build the model on the meta device, and see that the result can be written.

    Raises:
        SettingError, OSError: it cannot.
    """
    with torch.device("meta"):
        build_model(ModelSpec(config.model, num_classes=CLASSES))
    if config.out:
        writable_directory(Path(config.out).expanduser().parent)


STUDY = Study(
    name="throughput", about=__doc__, cells=lambda _: [Cell({})], table=tables, ledger=False, check=check,
    measure=lambda config, cell: measure(config, cell.device), compose=settings,
    place=lambda config: (config.device, config.threads),
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write; returns the exit status."""
    done = run(STUDY, arguments)
    for line in done.lines:
        if out := line["config"]["out"]:
            write_json(Path(out).expanduser(), line)
            print(f"written: {out}")
    return done.status
