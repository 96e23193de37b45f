"""What does one slow client cost? `python -m simulations.stragglers [--seeds 0 1 2] [OVERRIDE ...]`.

Eight clients with digits (conf/experiment/stragglers.yaml), seven of which answer after `--pace`
seconds and one after ten times as many. Rounds wait for all of them, or for a quorum, or there
are no rounds and the student is refreshed every four models. Real rounds of the app, client and
server in one process, over a grid without a network: it holds each reply back until its client's
seconds are over, by the clock. What a client computes is done in the same process, once its
reply is due; that costs a run without rounds the most.
"""

from __future__ import annotations

import statistics
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from flwr.app import Message

from simulations.local_clients import check_clients
from simulations.local_grid import InProcessGrid, local_run, node_id
from simulations.runner import Cell, Line, Lines, Page, Study, Table, command, seeds_of
from smi_fed.config import Settings

CLIENTS, SLOWER, TARGET = 8, 10, 0.85
WORDS = ("experiment=stragglers", f"strategy.min_nodes={CLIENTS}")
METHODS: dict[str, tuple[str, ...]] = {
    "rounds of all": ("strategy.rounds=2",),
    "rounds of a quorum": ("strategy.rounds=4", f"strategy.quorum={CLIENTS - 1}", "strategy.grace_seconds=2"),
    "without rounds": ("strategy.rounds=6", f"strategy.quorum={CLIENTS // 2}", "strategy.asynchronous=true"),
}
COLOURS = dict(zip(METHODS, ("tab:blue", "tab:orange", "tab:green"), strict=True))


class SlowGrid(InProcessGrid):
    """A grid whose nodes take their time.

    Args:
        pace: seconds from each node's question to its reply, at least.
    """

    def __init__(self, *args: Any, pace: Mapping[int, float], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.pace, self.since = pace, dict[str, float]()

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Take in messages; from now on their nodes work."""
        ids = super().push_messages(messages)
        self.since |= dict.fromkeys(ids, time.monotonic())
        return ids

    def _is_silent(self, asked: str) -> bool:
        node = self.asked[asked].metadata.dst_node_id
        return time.monotonic() < self.since[asked] + self.pace[node] or super()._is_silent(asked)


def add_options(parser: ArgumentParser) -> None:
    """What of the study is measured."""
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--pace", type=float, default=12.0, help="seconds of a client that is not slow")


def cells(options: Namespace) -> list[Cell]:
    """One for each way to wait."""
    return [Cell({"method": name, "pace": options.pace}, METHODS[name]) for name in options.methods]


def measure(settings: Settings, cell: Cell) -> Line:
    """One run in this process; the student's accuracy over seconds."""
    pace = {node_id(i): cell["pace"] * (SLOWER if i == CLIENTS - 1 else 1) for i in range(CLIENTS)}
    with local_run(settings, cell.words, CLIENTS, partial(SlowGrid, pace=pace)) as (federated, grid):
        report = federated.execute(grid)
        ages = [[verdict.age for verdict in record.admitted] for record in federated.strategy.rounds]  # type: ignore[union-attr]
    return {
        "seconds": [each["seconds"] for each in report["rounds"]],
        "accuracy": [each["student_test_accuracy"] for each in report["rounds"]],
        "server_seconds": [each["server_seconds"] for each in report["rounds"]],
        "ages": ages,
        "ensemble": report["ensemble"]["test_accuracy"],
    }


def seconds_to(line: Line, target: float = TARGET) -> float | None:
    """When the student was first at least that good; None where it never was."""
    reached = (s for s, value in zip(line["seconds"], line["accuracy"], strict=True) if value >= target)
    return next(reached, None)


def table(lines: Lines) -> list[Table]:
    """Seconds to the target and the last accuracy by method, over seeds."""
    rows = [[
        "waiting for", f"seconds to {TARGET:.0%}, median", "each seed", "first student, %", "after seconds",
        "last student, %", "after seconds",
    ]]  # fmt: skip
    for method in METHODS:
        own = sorted((line for line in lines if line["method"] == method), key=lambda line: line["seed"])
        if own:
            rows.append([method, *_row(own)])
    return [Table(f"one of {CLIENTS} clients {SLOWER} times slower, seeds {seeds_of(lines)}", rows, [])]


def _row(lines: Sequence[Line]) -> list[str]:
    times = [seconds_to(line) for line in lines]
    reached = [each for each in times if each is not None]
    median = f"{statistics.median(reached):.0f}" if len(reached) == len(times) else f"{len(reached)} of {len(times)}"
    each = ", ".join("never" if found is None else f"{found:.0f}" for found in times)
    cells = [
        value
        for place in (0, -1)
        for value in (
            ", ".join(f"{100 * line['accuracy'][place]:.1f}" for line in lines),
            f"{statistics.median(line['seconds'][place] for line in lines):.0f}",
        )
    ]
    return [median, each, *cells]


def figure(lines: Lines) -> Any:
    """Accuracy over seconds, a thin line per run."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(8, 5), layout="constrained")
    axis, named = drawn.subplots(), set[str]()
    for line in lines:
        method = line["method"]
        axis.plot(
            line["seconds"], [100 * value for value in line["accuracy"]], color=COLOURS[method], marker="o",
            markersize=4, label=None if method in named else method,
        )  # fmt: skip
        named.add(method)
    axis.axhline(100 * TARGET, color="tab:gray", linestyle="--", linewidth=1)
    axis.set(
        xlabel="seconds since the start", ylabel="student test accuracy in %",
        title=f"Digits, {CLIENTS} clients, one of them {SLOWER} times slower",
    )  # fmt: skip
    axis.legend(loc="lower right")
    return drawn


STUDY = Study(
    name="stragglers", about=__doc__, cells=cells, measure=measure, table=table, figure=figure,
    picture="stragglers.png",
    page=Page("docs/late-clients.md", "Raw runs", lambda _: ", client and server in one process, CPU."),
    words=WORDS, options=add_options, check=check_clients,
)  # fmt: skip
main = command(STUDY)


if __name__ == "__main__":
    sys.exit(main())
