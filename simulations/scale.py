"""What grows with clients? `python -m simulations.scale [--clients 4 16 64] [--rounds 1] [--output DIR]`.

Real rounds of the app, client and server, in one process and over a grid without a network: models
of about 20 MB, and of everything else as little as it takes. Each number of clients has a process
of its own, whose memory is watched while clients train one by one and the server works. It writes
`scale.json` and `scale.png`.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch

from simulations.measuring import environment
from simulations.superlink import PROJECT
from smi_fed.checks import SettingError
from smi_fed.config import join_overrides, load_settings
from smi_fed.files import replacing, writable_directory, write_json

INTERVAL = 0.02
"""Seconds between two looks at the memory."""

LARGEST_RATIO = 1.5
"""Of peak memory, between most and fewest clients."""

SETTINGS, ARCH = ("experiment=scale",), "vit_p8_w192_d12"


def main(arguments: list[str] | None = None) -> int:
    """Measure every number of clients; returns the exit status, 1 where memory grew by more than `LARGEST_RATIO`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[4, 16, 64], help="numbers of clients")
    parser.add_argument("--rounds", type=int, default=1, help="rounds of each run")
    parser.add_argument("--output", type=Path, default=PROJECT / "runs" / "scale", help="where results go")
    parser.add_argument("--only", type=int, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", help="Hydra overrides, such as distillation.steps=100")
    options = parser.parse_args(arguments)
    output = writable_directory(options.output.expanduser().absolute())
    if options.only is not None:
        measure(options.only, options.rounds, options.overrides, output)
        return 0
    try:
        if min(options.clients) < 2 or options.rounds < 1:
            raise SettingError("clients", options.clients, "ints >= 2, and at least one round")
        load_settings(PROJECT / "conf", join_overrides([*SETTINGS, *options.overrides]))
    except SettingError as error:
        print(f"smi-fed: {error}", file=sys.stderr)
        return 2
    lines = []
    for clients in sorted(options.clients):
        print(f"{clients} clients ...", flush=True)
        command = [sys.executable, "-m", "simulations.scale", "--only", str(clients), "--output", str(output)]
        command += ["--rounds", str(options.rounds), *options.overrides]
        done = subprocess.run(command, cwd=PROJECT, check=False)
        if done.returncode:
            print(f"smi-fed: the run of {clients} clients failed", file=sys.stderr)
            return 1
        lines.append(json.loads(line_path(output, clients).read_text(encoding="utf-8")))
    found = {"environment": environment(torch.device("cpu")), "overrides": [*SETTINGS, *options.overrides]}
    found |= {"runs": lines, **ratios(lines)}
    write_json(output / "scale.json", found)
    draw(output / "scale.png", lines)
    print(table(lines))
    print(f"peak memory, most over fewest clients: {found['peak_ratio']:.2f} (allowed: {LARGEST_RATIO})")
    print(f"results: {output}")
    return int(found["peak_ratio"] > LARGEST_RATIO)


def line_path(output: Path, clients: int) -> Path:
    """Where one run's figures stand."""
    return output / f"clients-{clients}.json"


def measure(clients: int, rounds: int, overrides: Sequence[str], output: Path) -> None:
    """One run in this process; its figures go to `line_path`."""
    from clients.app import app
    from server.run import FederatedRun
    from simulations.local_grid import InProcessGrid
    from smi_fed.progress import show_log

    torch.set_num_threads(1)
    show_log()
    words = [*SETTINGS, f"strategy.min_nodes={clients}", f"strategy.rounds={rounds}", *overrides]
    text = join_overrides(words)
    settings = load_settings(PROJECT / "conf", text)
    nodes = {100 + i: {"partition-id": i, "num-partitions": clients, "arch": ARCH} for i in range(clients)}
    run = FederatedRun(settings, output / f"run-{clients}")
    before = psutil.Process().memory_info().rss
    assert run.strategy is not None
    with watching() as peaks:
        run.strategy.core.on_round = lambda _: peaks.append(0)
        # Clients keep their own models on disk, as on machines of their own: they are no part of the server's memory.
        with tempfile.TemporaryDirectory(prefix="smi-fed-scale-") as own:
            report = run.execute(InProcessGrid(app, nodes, {"overrides": text, "client-state": own}))
    server = [each["server_seconds"] for each in report["rounds"]]
    student = sum(weight.nbytes for weight in run.student.state_dict().values())
    write_json(line_path(output, clients), {
        "clients": clients,
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
        "teachers": [len(each["admitted"]) for each in report["rounds"]],
    })  # fmt: skip


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


def ratios(lines: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Most over fewest clients: peak memory, and the server's seconds per client."""
    first, last = lines[0], lines[-1]
    keys = {"peak_ratio": "peak_megabytes", "server_seconds_per_client_ratio": "server_seconds_per_client"}
    return {name: last[key] / first[key] for name, key in keys.items()}


HEADINGS = {
    "clients": "clients", "before_megabytes": "MB before", "peak_megabytes": "peak MB",
    "server_seconds_per_client": "server s/client", "inversion_seconds_per_client": "inversion",
    "distillation_seconds_per_client": "distillation", "seconds": "whole run, s",
}  # fmt: skip


def table(lines: Sequence[dict[str, Any]]) -> str:
    """The figures as aligned text."""
    rows = [list(HEADINGS.values())]
    for line in lines:
        values = [line[key] for key in HEADINGS]
        rows.append([f"{value:.2f}" if isinstance(value, float) else str(value) for value in values])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(word.rjust(width) for word, width in zip(row, widths, strict=True)) for row in rows)


def draw(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    """Peak memory and the server's seconds per client over the number of clients."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
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
    with replacing(path) as part:
        figure.savefig(part, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
