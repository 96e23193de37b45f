"""Keep measured results and write the tables of README and docs/ from them.

`python -m simulations.results --demo runs/demo0 runs/demo1 runs/demo2 --compare runs/compare` copies the reports and
pieces to benchmarks/results/, the pictures to docs/, and fills the pages between their markers. Without arguments it
fills them from what is kept; `simulations.throughput` writes there itself (`out=`).
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from simulations import methods_report, rounds, why_random
from simulations.compare import draw, print_table
from simulations.superlink import PROJECT
from smi_fed.files import write_json
from smi_fed.report import read_report

RESULTS = PROJECT / "benchmarks" / "results"


def main(arguments: list[str] | None = None) -> int:
    """Copy what is named, then fill the pages; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--demo", type=Path, nargs="+", help="artefact directories of demo runs")
    parser.add_argument("--compare", type=Path, nargs="+", help="output directories of comparisons")
    parser.add_argument("--rounds", type=Path, nargs="+", help="output directories of the study of rounds")
    parser.add_argument("--methods", type=Path, nargs="+", help="output directories of the study of methods")
    parser.add_argument("--why", type=Path, help="output directory of `simulations.why_random`")
    parser.add_argument("--scale", type=Path, help="scale.json of `simulations.scale`, its picture beside it")
    keep(parser.parse_args(arguments))
    for file in sorted({file for file, _ in SECTIONS.values()}):
        page = PROJECT / file
        page.write_text(filled(page.read_text(encoding="utf-8"), file), encoding="utf-8")
    return 0


def keep(options: argparse.Namespace) -> None:
    """Copy what is named to where it is kept."""
    if options.rounds:
        text = "".join((path / "runs.jsonl").read_text(encoding="utf-8") for path in options.rounds)
        (RESULTS / "rounds.jsonl").write_text(text, encoding="utf-8")
        rounds.draw([json.loads(line) for line in text.splitlines()], PROJECT / "docs" / "rounds.png")
    if options.methods:
        text = "".join((path / "pieces.jsonl").read_text(encoding="utf-8") for path in options.methods)
        (RESULTS / "methods.jsonl").write_text(text, encoding="utf-8")
        methods_report.draw([json.loads(line) for line in text.splitlines()], PROJECT / "docs" / "methods.png")
    if options.why:
        shutil.copy(options.why / "why.json", RESULTS / "why_random.json")
    if options.demo:
        reports = [read_report(path / "report.json") for path in options.demo]
        write_json(RESULTS / "demo.json", {"cpus": os.cpu_count(), "reports": reports})
        shutil.copy(options.demo[0] / "synthetic.png", PROJECT / "docs" / "synthetic.png")
    if options.compare:
        text = "".join((path / "pieces.jsonl").read_text(encoding="utf-8") for path in options.compare)
        (RESULTS / "compare.jsonl").write_text(text, encoding="utf-8")
        draw([json.loads(line) for line in text.splitlines()], PROJECT / "docs" / "convergence.png")
    if options.scale:
        shutil.copy(options.scale, RESULTS / "scale.json")
        shutil.copy(options.scale.with_name("scale.png"), PROJECT / "docs" / "scale.png")


def filled(text: str, file: str) -> str:
    """A page with its tables as the kept results have them.

    Args:
        text: of the page.
        file: its path from the project's root, one that `SECTIONS` names.

    Raises:
        ValueError: a section's markers are not there.
    """
    up = "../" * file.count("/")
    for name, (place, render) in SECTIONS.items():
        if place == file:
            before, start, rest = text.partition(f"<!-- {name}:start -->\n")
            _, end, after = rest.partition(f"<!-- {name}:end -->")
            if not end:
                raise ValueError(f"{file}: no markers <!-- {name}:start --> and <!-- {name}:end -->")
            table = render().replace("](benchmarks/", f"]({up}benchmarks/")
            text = before + start + table + end + after
    return text


def demo_table() -> str:
    """A Markdown table of the demo's seeds."""
    kept = json.loads((RESULTS / "demo.json").read_text(encoding="utf-8"))
    rows = [
        "| seed | clients, % | ensemble, % | student, % | patches kept | FLOPs below dense | seconds: train, invert, "
        "distill, total |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    rows += [_demo_row(report) for report in kept["reports"]]
    where = f"{kept['reports'][0]['device']}, {kept['cpus']} cores"
    rows.append(
        f"\nHeld-out test split, last step, on {where}; `python -m simulations.demo --output runs/demoN seed=N`, "
        "[raw reports](benchmarks/results/demo.json). Totals are without the start of Flower and Ray.\n"
    )
    return "\n".join(rows)


def _demo_row(report: dict[str, Any]) -> str:
    clients = ", ".join(f"{100 * each['test_accuracy']:.1f}" for each in report["clients"])
    inversion, seconds = report["inversion"], report["seconds"]
    cells = [
        report["seed"], clients, f"{100 * report['ensemble']['test_accuracy']:.1f}",
        f"**{100 * report['student']['test_accuracy']:.1f}**", f"{inversion['kept_fraction']:.0%}",
        f"{1 - inversion['flops'] / inversion['dense_flops']:.0%}",
        ", ".join(f"{seconds[stage]:.0f}" for stage in ("train", "inversion", "distillation", "total")),
    ]  # fmt: skip
    return "| " + " | ".join(map(str, cells)) + " |"


def compare_table() -> str:
    """What `make compare` printed, from the kept pieces."""
    lines = kept_lines("compare")
    return printed(lambda console: print_table(lines, console)) + (
        f"`python -m simulations.compare --seeds {seeds_of(lines)}`, one thread; here each seed was a process of its "
        "own and two ran at a time on two cores. [Raw pieces](benchmarks/results/compare.jsonl).\n"
    )


def rounds_table() -> str:
    """What `simulations.rounds` printed, from the kept runs."""
    lines = kept_lines("rounds")
    return printed(lambda console: rounds.print_table(lines, console)) + (
        f"`python -m simulations.rounds --seeds {seeds_of(lines)}`, real runs on Flower's simulation engine, CPU. "
        "[Raw runs](benchmarks/results/rounds.jsonl).\n"
    )


def methods_table() -> str:
    """All methods of `simulations.inversion_methods` in one Markdown table, from the kept pieces."""
    lines = kept_lines("methods")
    return methods_report.markdown(lines) + (
        f"\n`python -m simulations.inversion_methods --seeds {seeds_of(lines)}`: student test accuracy in %, mean ± "
        "standard deviation over the seeds (inversion seconds of the process on one thread). "
        "[Raw pieces](benchmarks/results/methods.jsonl).\n"
    )


def why_table() -> str:
    """What `simulations.why_random` printed."""
    found = json.loads((RESULTS / "why_random.json").read_text(encoding="utf-8"))["teachers"]
    return printed(lambda console: why_random.print_tables(found, console)) + (
        f"`python -m simulations.why_random --seeds {seeds_of(found)}`. [Raw](benchmarks/results/why_random.json).\n"
    )


def kept_lines(name: str) -> list[dict[str, Any]]:
    """The kept JSON lines of a study."""
    text = (RESULTS / f"{name}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def seeds_of(lines: list[dict[str, Any]]) -> str:
    """The seeds that occur, as a command takes them."""
    return " ".join(str(seed) for seed in sorted({line["seed"] for line in lines}))


def printed(show: Callable[[Console], None]) -> str:
    """What `show` prints, as a block of text."""
    file = io.StringIO()
    show(Console(file=file, width=110))
    return "```text\n" + "\n".join(line.rstrip() for line in file.getvalue().splitlines()) + "\n```\n"


def throughput_table() -> str:
    """A Markdown table of every throughput measurement that is kept."""
    rows = [
        "| model, device | dtype, batch | dense / naive | sparse / dense (bound) | sparse / naive | images a second: "
        "naive, dense, sparse | share of matmul rate: dense, last stage | memory, last stage / dense |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    rows += [
        _throughput_row(json.loads(path.read_text(encoding="utf-8")), path.name)
        for path in sorted(RESULTS.glob("throughput-*.json"))
    ]
    return "\n".join(rows) + "\n"


def _throughput_row(found: dict[str, Any], name: str) -> str:
    config, ratios, where = found["config"], found["ratios"], found["environment"]
    shares = [stage["share_of_matmul_rate"] for stage in (found["stages"][0], found["stages"][-1])]
    cells = [
        f"[{config['model']}](benchmarks/results/{name}), {where['device_name']}, {where['threads']} threads",
        f"{config['dtype']}, {config['batch']}",
        f"{ratios['dense over naive']:.2f}",
        f"**{ratios['sparse over dense']:.2f}** ({ratios['sparse over dense, bound']:.2f})",
        f"{ratios['sparse over naive']:.2f}",
        ", ".join(f"{rate:.3g}" for rate in found["images_per_second"].values()),
        ", ".join(f"{share:.0%}" for share in shares),
        f"{found['last_stage_over_dense_memory']:.0%}",
    ]
    return "| " + " | ".join(cells) + " |"


SCALE_COLUMNS = {
    "clients": ("clients", "d"),
    "peak_megabytes": ("peak, MB", ".0f"),
    "before_megabytes": ("before the round, MB", ".0f"),
    "server_seconds_per_client": ("server, seconds per client", ".2f"),
    "inversion_seconds_per_client": ("of it inversion", ".2f"),
    "distillation_seconds_per_client": ("of it distillation", ".2f"),
}
"""Of the scale benchmark: heading and format of each of a run's figures."""


def scale_table() -> str:
    """Memory and the server's work over numbers of clients, with its picture; where nothing is kept, that."""
    path = RESULTS / "scale.json"
    if not path.exists():
        return "No measurement is kept yet: `python -m simulations.scale --clients 4 16 64` makes one.\n"
    found = json.loads(path.read_text(encoding="utf-8"))
    runs, where = found["runs"], found["environment"]
    first, last = runs[0], runs[-1]
    rows = ["| " + " | ".join(heading for heading, _ in SCALE_COLUMNS.values()) + " |"]
    rows.append("| " + " | ".join("---" for _ in SCALE_COLUMNS) + " |")
    rows += [
        "| " + " | ".join(format(run[key], form) for key, (_, form) in SCALE_COLUMNS.items()) + " |" for run in runs
    ]
    rounds = len(first["peak_megabytes_by_round"])
    words = ["python", "-m", "simulations.scale", "--clients", *(str(run["clients"]) for run in runs)]
    words += ["--rounds", str(rounds), *found["overrides"][1:]]
    rows.append(
        f"\n{last['clients']} over {first['clients']} clients: {found['peak_ratio']:.2f} times the peak memory, "
        f"{found['server_seconds_per_client_ratio']:.2f} times the server's seconds per client.\n\n"
        f"`{shlex.join(words)}`: models of {first['model_megabytes']:.1f} MB, {where['device_name']}, {where['cores']} "
        "cores, one thread; client and server in one process. [Raw figures](benchmarks/results/scale.json).\n\n"
        "![Memory and the server's seconds over the number of clients](scale.png)\n"
    )
    return "\n".join(rows)


SECTIONS: dict[str, tuple[str, Callable[[], str]]] = {
    "demo": ("README.md", demo_table),
    "compare": ("docs/sparse.md", compare_table),
    "throughput": ("docs/cost.md", throughput_table),
    "rounds": ("docs/rounds.md", rounds_table),
    "methods": ("docs/inversion-methods.md", methods_table),
    "why": ("docs/inversion-methods.md", why_table),
    "scale": ("docs/many-clients.md", scale_table),
}
"""The page in which each section stands, and what writes it."""


if __name__ == "__main__":
    sys.exit(main())
