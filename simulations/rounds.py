"""Do rounds help? `python -m simulations.rounds [--seeds 0 1 2] [OVERRIDE ...]`.

Eight clients with skewed digits (conf/experiment/rounds.yaml): five rounds of data-free
distillation over four architectures, one round with as many training and distillation
steps in all, FedAvg and FedProx over clients of the student's architecture, and each
client alone with as many steps. Every federation is a real run on Flower's simulation
engine; each finished run is one JSON line, and a study that was stopped goes on.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from simulations.ledger import append_line, read_lines
from simulations.local_clients import digest, trained_clients
from simulations.superlink import PROJECT, LaunchError, SuperLink, superlink
from smi_fed.checks import SettingError
from smi_fed.config import Settings, join_overrides, load_settings
from smi_fed.data import load_images
from smi_fed.files import replacing, writable_directory
from smi_fed.progress import show_log
from smi_fed.report import read_report
from smi_fed.training import accuracy

CLIENTS = 8
HOMOGENEOUS = ("model=digits_homogeneous", "strategy.distillation=false")
METHODS = ("five rounds", "one round", "FedAvg", "FedProx", "alone")


def overrides_of(method: str, settings: Settings) -> list[str]:
    """What a method changes in the experiment's settings."""
    rounds = settings.strategy.rounds
    steps, distillation = settings.client.training.steps, settings.distillation.steps
    return {
        "five rounds": [],
        "one round": [
            "strategy.rounds=1",
            f"client.training.steps={rounds * steps}",
            f"distillation.steps={rounds * distillation}",
            f"server.images_per_teacher={rounds * settings.server.images_per_teacher}",
        ],
        "FedAvg": list(HOMOGENEOUS),
        "FedProx": [*HOMOGENEOUS, "strategy.name=FedProx", "strategy.arguments={proximal_mu: 0.1}"],
        "alone": [f"client.training.steps={rounds * steps}"],
    }[method]


def main(arguments: list[str] | None = None) -> int:
    """Run what is missing, then draw; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=PROJECT / "runs" / "rounds")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args(arguments)
    show_log()
    try:
        output = writable_directory(options.output.expanduser().absolute())
        lines = study(options.seeds, options.methods, options.overrides, output)
    except (SettingError, OSError, LaunchError) as error:
        print(f"smi-fed: {error}", file=sys.stderr)
        return 2
    print_table(lines)
    draw(lines, output / "rounds.png")
    print(f"artefacts: {output}")
    return 0


def study(seeds: Sequence[int], methods: Sequence[str], changes: list[str], output: Path) -> list[dict[str, Any]]:
    """One line per seed and method; finished ones are read from `runs.jsonl`."""
    ledger = output / "runs.jsonl"
    known, found = read_lines(ledger), []
    with superlink() as link:
        for seed in seeds:
            for method in methods:
                common = ["experiment=rounds", f"seed={seed}", f"strategy.min_nodes={CLIENTS}", *changes]
                words = [*common, *overrides_of(method, load_settings(PROJECT / "conf", common))]
                settings = load_settings(PROJECT / "conf", words)
                key = digest(settings, method, torch.__version__)
                if key not in known:
                    result = alone(settings, output) if method == "alone" else federated(link, words)
                    known[key] = {"key": key, "seed": seed, "method": method, "overrides": words, **result}
                    append_line(ledger, known[key])
                found.append(known[key])
    return found


def federated(link: SuperLink, words: list[str]) -> dict[str, Any]:
    """One run of the app; the student's accuracy after each round.

    Raises:
        LaunchError: it did not complete.
    """
    with tempfile.TemporaryDirectory(prefix="smi-fed-") as directory:
        status = link.run(join_overrides(words), Path(directory), supernodes=CLIENTS)
        if status != "finished:completed":
            raise LaunchError(f"a run ended as {status}; see the log above")
        report = read_report(Path(directory) / "report.json")
    return {
        "accuracy": [each["student_test_accuracy"] for each in report["rounds"]],
        "round_seconds": [each["seconds"] for each in report["rounds"]],
        "seconds": report["seconds"],
        "ensemble": (report["ensemble"] or {}).get("test_accuracy"),
        "clients": [each["test_accuracy"] for each in report["clients"]],
        "versions": report["versions"],
    }


def alone(settings: Settings, output: Path) -> dict[str, Any]:
    """Each client with its own data only."""
    torch.set_num_threads(1)
    _, test = load_images(settings.data)
    teachers = trained_clients(settings, CLIENTS, output / "clients")
    scores = [accuracy(teacher.model, test) for teacher in teachers]
    return {"accuracy": [statistics.fmean(scores)], "clients": scores}


def print_table(lines: list[dict[str, Any]], console: Console | None = None) -> None:
    """Accuracy after the last round by method: mean and each seed; and what rounds add."""
    console = console or Console(width=110)
    seeds = sorted({line["seed"] for line in lines})
    table = Table(title=f"student test accuracy in %, {CLIENTS} clients, seeds {seeds}")
    for heading in ("method", "mean", "each seed", "after round 1"):
        table.add_column(heading)
    last: dict[str, list[float]] = {}
    for method in METHODS:
        own = [line for line in lines if line["method"] == method]
        if own:
            last[method] = [100 * line["accuracy"][-1] for line in own]
            first = [100 * line["accuracy"][0] for line in own]
            shown = f"{statistics.fmean(first):.1f}" if len(own[0]["accuracy"]) > 1 else ""
            each = ", ".join(f"{value:.1f}" for value in last[method])
            table.add_row(method, f"{statistics.fmean(last[method]):.1f}", each, shown)
    console.print(table)
    if {"five rounds", "one round"} <= last.keys():
        gains = [five - one for five, one in zip(last["five rounds"], last["one round"], strict=True)]
        console.print(f"five rounds over one: {statistics.fmean(gains):+.1f} points "
                      f"({', '.join(f'{gain:+.1f}' for gain in gains)})")  # fmt: skip


def draw(lines: list[dict[str, Any]], path: Path) -> None:
    """Accuracy over rounds; a thin line per seed, a thick one for the mean, a level for what has one round."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axis = figure.subplots()
    colours = ("tab:blue", "tab:cyan", "tab:orange", "tab:red", "tab:gray")
    for method, colour in zip(METHODS, colours, strict=True):
        curves = [[100 * value for value in line["accuracy"]] for line in lines if line["method"] == method]
        if not curves:
            continue
        mean = [statistics.fmean(values) for values in zip(*curves, strict=True)]
        if len(mean) == 1:
            axis.axhline(mean[0], color=colour, linestyle="--", label=f"{method}: {mean[0]:.1f} %")
            continue
        for curve in curves:
            axis.plot(range(1, len(curve) + 1), curve, color=colour, alpha=0.35, linewidth=1)
        axis.plot(range(1, len(mean) + 1), mean, color=colour, marker="o", label=f"{method}: {mean[-1]:.1f} %")
    axis.set(xlabel="round", ylabel="student test accuracy in %", title="Digits, 8 clients, Dirichlet(0.1)")
    axis.set_xticks(range(1, 1 + max(len(line["accuracy"]) for line in lines)))
    axis.legend()
    with replacing(path) as part:
        figure.savefig(part, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
