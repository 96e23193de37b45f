"""Do rounds help? `python -m simulations.rounds [--seeds 0 1 2] [OVERRIDE ...]`.

Eight clients with skewed digits (conf/experiment/rounds.yaml): five rounds of data-free
distillation over four architectures, one round with as many training and distillation
steps in all, FedAvg and FedProx over clients of the student's architecture, and each
client alone with as many steps. Every federation is a real run on Flower's simulation
engine; each finished run is one JSON line, and a study that was stopped goes on.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from simulations.local_clients import check_clients, trained_clients
from simulations.processes import LaunchError
from simulations.runner import Cell, Line, Lines, Page, Study, Table, command, seeds_of
from simulations.superlink import PROJECT, superlink
from smi_fed.config import Settings, join_overrides, load_settings
from smi_fed.data import load_images
from smi_fed.report import read_report
from smi_fed.training import accuracy

CLIENTS = 8
HOMOGENEOUS = ("model=digits_homogeneous", "strategy.distillation=false")
METHODS = ("five rounds", "one round", "FedAvg", "FedProx", "alone")
WORDS = ("experiment=rounds", f"strategy.min_nodes={CLIENTS}")


def add_options(parser: ArgumentParser) -> None:
    """What of the study is measured."""
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))


def cells(options: Namespace) -> list[Cell]:
    """One for each method."""
    base = load_settings(PROJECT / "conf", [*WORDS, *options.overrides])
    return [Cell({"method": method}, tuple(overrides_of(method, base))) for method in options.methods]


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


def measure(settings: Settings, cell: Cell) -> Line:
    """One run, or each client by itself."""
    return alone(settings, cell.output) if cell["method"] == "alone" else federated(cell.words)


def federated(words: Sequence[str]) -> Line:
    """One run of the app on a SuperLink of its own; the student's accuracy after each round.

    Raises:
        LaunchError: it did not complete.
    """
    with tempfile.TemporaryDirectory(prefix="smi-fed-") as directory, superlink() as link:
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


def alone(settings: Settings, output: Path) -> Line:
    """Each client with its own data only."""
    _, test = load_images(settings.data)
    teachers = trained_clients(settings, CLIENTS, output / "clients")
    scores = [accuracy(teacher.model, test) for teacher in teachers]
    return {"accuracy": [statistics.fmean(scores)], "clients": scores}


def table(lines: Lines) -> list[Table]:
    """Accuracy after the last round by method: mean and each seed; and what rounds add."""
    rows, last = [["method", "mean", "each seed", "after round 1"]], dict[str, dict[int, float]]()
    for method in METHODS:
        own = sorted((line for line in lines if line["method"] == method), key=lambda line: line["seed"])
        last[method] = {line["seed"]: 100 * line["accuracy"][-1] for line in own}
        if own:
            first = statistics.fmean(100 * line["accuracy"][0] for line in own)
            each = ", ".join(f"{value:.1f}" for value in last[method].values())
            mean = statistics.fmean(last[method].values())
            rows.append([method, f"{mean:.1f}", each, f"{first:.1f}" if len(own[0]["accuracy"]) > 1 else ""])
    five, one = last["five rounds"], last["one round"]
    gains = [five[seed] - one[seed] for seed in five if seed in one]
    each = ", ".join(f"{gain:+.1f}" for gain in gains)
    notes = [f"five rounds over one: {statistics.fmean(gains):+.1f} points ({each})"] if gains else []
    return [Table(f"student test accuracy in %, {CLIENTS} clients, seeds {seeds_of(lines)}", rows, notes)]


def figure(lines: Lines) -> Any:
    """Accuracy over rounds; a thin line per seed, a thick one for the mean, a level for what has one round."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(8, 5), layout="constrained")
    axis = drawn.subplots()
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
    return drawn


STUDY = Study(
    name="rounds", about=__doc__, cells=cells, measure=measure, table=table, figure=figure, picture="rounds.png",
    page=Page("docs/rounds.md", "Raw runs", lambda _: ", real runs on Flower's simulation engine, CPU."),
    words=WORDS, options=add_options, check=check_clients,
)  # fmt: skip
main = command(STUDY)


if __name__ == "__main__":
    sys.exit(main())
