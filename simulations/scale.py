"""What grows with clients? `python -m simulations.scale [--clients 4 16 64] [--ray-nodes 2] [--output DIR]`.

Real rounds of the app, client and server, in one process and over a grid without a network: models
of about 20 MB, and of everything else as little as it takes. Each number of clients has a process
of its own, whose memory is watched while clients train one by one and the server works. With
`--ray-nodes` the most clients are inverted once more, on a real Ray cluster of so many nodes with a
core each. It writes `scale.json` and `scale.png`.
"""

from __future__ import annotations

import resource
import shlex
import sys
import threading
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import psutil

from simulations.local_clients import check_clients
from simulations.ray_nodes import ray_nodes
from simulations.runner import Cell, Line, Lines, Page, Study, Table, run
from smi_fed.checks import require
from smi_fed.config import Settings
from smi_fed.files import write_json
from smi_fed.inversion.checkpoint import digest_of

INTERVAL = 0.02
"""Seconds between two looks at the memory."""

LARGEST_RATIO = 1.5
"""Of peak memory, between most and fewest clients."""

SETTINGS, ARCH = ("experiment=scale",), "vit_p8_w192_d12"


def add_options(parser: ArgumentParser) -> None:
    """What is measured."""
    parser.add_argument("--clients", type=int, nargs="+", default=[4, 16, 64], help="numbers of clients")
    parser.add_argument("--rounds", type=int, default=1, help="rounds of each run")
    parser.add_argument("--ray-nodes", type=int, default=0, help="nodes of a Ray cluster for one more run; 0 is none")


def cells(options: Namespace) -> list[Cell]:
    """One for each number of clients, the fewest first."""
    require(min(options.clients) >= 2, "clients", options.clients, "ints >= 2")
    places = [(clients, 0) for clients in sorted(options.clients)]
    places += [(max(options.clients), options.ray_nodes)] if options.ray_nodes else []
    return [
        Cell(
            {"clients": clients, "rounds": options.rounds, "ray_nodes": nodes},
            (f"strategy.min_nodes={clients}", f"strategy.rounds={options.rounds}"),
        )
        for clients, nodes in places
    ]


def measure(settings: Settings, cell: Cell) -> Line:
    """One run in this process, inversions in it or on a cluster."""
    if not cell["ray_nodes"]:
        return _run(settings, cell)
    with ray_nodes(cell["ray_nodes"]) as addresses:
        found = replace(settings.server, executor="ray", threads=1, ray_address=addresses.inside)
        return _run(replace(settings, server=found), cell)


def _run(settings: Settings, cell: Cell) -> Line:
    from simulations.local_grid import local_run

    clients, rounds = cell["clients"], cell["rounds"]
    with local_run(settings, cell.words, clients, arch=ARCH) as (federated, grid):
        before, strategy = psutil.Process().memory_info().rss, federated.strategy
        assert strategy is not None
        with watching() as peaks:
            strategy.core.on_round = lambda _: peaks.append(0)
            report = federated.execute(grid)
    server = [each["server_seconds"] for each in report["rounds"]]
    student = sum(weight.nbytes for weight in federated.student.state_dict().values())
    return {
        "model_megabytes": student / 1e6,
        "before_megabytes": before / 1e6,
        "peak_megabytes": max(peaks) / 1e6,
        "peak_megabytes_by_round": [peak / 1e6 for peak in peaks[:rounds]],
        "largest_resident_megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6,
        "server_seconds": sum(server),
        "server_seconds_per_client": sum(server) / clients / rounds,
        "inversion_seconds_per_client": report["inversion"]["seconds"] / clients / rounds,
        "distillation_seconds_per_client": report["distillation"]["seconds"] / clients / rounds,
        "seconds": report["seconds"]["total"],
        "student": digest_of(federated.student.state_dict().values()),
        "teachers": [len(each["admitted"]) for each in report["rounds"]],
    }


@contextmanager
def watching() -> Iterator[list[int]]:
    """The largest resident memory in bytes of this process, since the last entry was appended."""
    peaks, over, process = [0], threading.Event(), psutil.Process()

    def look() -> None:
        while not over.is_set():
            peaks[-1] = max(peaks[-1], process.memory_info().rss)
            time.sleep(INTERVAL)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield peaks
    finally:
        over.set()
        thread.join()


def alone(lines: Lines) -> list[Line]:
    """Those of a server that inverts in its own process."""
    return [line for line in lines if not line.get("ray_nodes")]


def ratios(lines: Lines) -> dict[str, float]:
    """Most over fewest clients: peak memory, and the server's seconds per client."""
    lines = alone(lines)
    keys = {"peak_ratio": "peak_megabytes", "server_seconds_per_client_ratio": "server_seconds_per_client"}
    return {name: lines[-1][key] / lines[0][key] for name, key in keys.items()}


COLUMNS = {
    "clients": ("clients", "d"),
    "peak_megabytes": ("peak, MB", ".0f"),
    "before_megabytes": ("before the round, MB", ".0f"),
    "server_seconds_per_client": ("server, seconds per client", ".2f"),
    "inversion_seconds_per_client": ("of it inversion", ".2f"),
    "distillation_seconds_per_client": ("of it distillation", ".2f"),
}
"""Heading and format of each of a run's figures."""


def table(lines: Lines) -> list[Table]:
    """The figures, and how far they grew."""
    headings, found = [heading for heading, _ in COLUMNS.values()], ratios(lines)
    own = alone(lines)
    rows = [[format(line[key], form) for key, (_, form) in COLUMNS.items()] for line in lines]
    notes = [
        f"{own[-1]['clients']} over {own[0]['clients']} clients: {found['peak_ratio']:.2f} times the peak memory, "
        f"{found['server_seconds_per_client_ratio']:.2f} times the server's seconds per client."
    ]
    for line, row in zip(lines, rows, strict=True):
        if line not in own:
            row[0] += f", {line['ray_nodes']} Ray nodes"
            same = [each["student"] for each in own if each["clients"] == line["clients"]] == [line["student"]]
            notes.append(
                f"Inverted on {line['ray_nodes']} Ray nodes, the student of {line['clients']} clients is "
                f"{'the same, bit for bit' if same else 'another one'}."
            )
    return [Table(rows=[headings, *rows], notes=notes)]


def _arguments(lines: Lines) -> str:
    first = lines[0]
    words = ["--clients", *(str(line["clients"]) for line in alone(lines))]
    words += ["--rounds", str(len(first["peak_megabytes_by_round"]))]
    words += [word for line in lines if (n := line.get("ray_nodes")) for word in ("--ray-nodes", str(n))]
    return shlex.join([*words, *(first["changes"] if "changes" in first else first["overrides"][1:])])


def _note(lines: Lines) -> str:
    where = lines[0]["environment"]
    models = f"models of {lines[0]['model_megabytes']:.1f} MB, {where['device_name']}, {where['cores']} cores"
    return f": {models}, one thread; client and server in one process."


def figure(lines: Lines) -> Any:
    """Peak memory and the server's seconds per client over the number of clients."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = drawn.subplots(1, 2)
    lines = alone(lines)
    clients = [line["clients"] for line in lines]
    models = [line["before_megabytes"] + line["clients"] * line["model_megabytes"] for line in lines]
    left.plot(clients, [line["peak_megabytes"] for line in lines], "o-", label="peak")
    left.plot(clients, [line["before_megabytes"] for line in lines], "s--", label="before the round")
    left.plot(clients, models, ":", color="tab:gray", label="if all models were held once")
    left.set(xlabel="clients", ylabel="resident memory, MB", title="Memory of client and server process")
    for key, label in (("server", "server"), ("inversion", "of it inversion"), ("distillation", "of it distillation")):
        right.plot(clients, [line[f"{key}_seconds_per_client"] for line in lines], "o-", label=label)
    right.set(xlabel="clients", ylabel="seconds per client", title="The server's work")
    for axis in (left, right):
        axis.set_ylim(bottom=0)
        axis.legend(fontsize=8)
    return drawn


STUDY = Study(
    name="scale", about=__doc__, cells=cells, measure=measure, table=table, figure=figure, picture="scale.png",
    page=Page("docs/many-clients.md", "Raw figures", _note, True, _arguments), words=SETTINGS, options=add_options,
    check=check_clients, in_turn="", own_process=True,
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure every number of clients; returns the exit status, 1 where memory grew by more than `LARGEST_RATIO`."""
    done = run(STUDY, arguments)
    if done.status:
        return done.status
    found = ratios(done.lines)
    shared = {key: done.lines[0][key] for key in ("environment", "code", "changes")}
    write_json(done.output / "scale.json", {**shared, "runs": done.lines, **found})
    return int(found["peak_ratio"] > LARGEST_RATIO)


if __name__ == "__main__":
    sys.exit(main())
