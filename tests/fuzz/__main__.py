"""Fuzzing of everything that a client sends: `python -m tests.fuzz --cases 1000000`.

Every case is a function of seed, door and number: `--door NAME --number N --cases 1` makes one again.
With `--door` and a file that is there the other doors' lines in it stay. Exits with 1 when a case was neither let in
nor refused as its door promises.
"""

import argparse
import faulthandler
import gc
import logging
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from smi_fed.files import read_json, write_json
from smi_fed.progress import Bar, show_log
from tests.fuzz import campaign, measured
from tests.fuzz.door import MEBIBYTE, Door

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "fuzzing.json"
MOST = 50
"""Faults that are printed; the file has all."""
ENDLESS = 1800
"""Seconds of a hundred cases after which one of them is taken for endless, and told of with where it stands."""


def doors() -> list[Door]:
    """All of them."""
    from tests.fuzz import extremes, questions, replies, stored

    return [*replies.DOORS, *extremes.DOORS, *questions.DOORS, *stored.DOORS]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--number", type=int, default=0, help="of the first case of each door")
    parser.add_argument("--door", action="append", help="only this one; may be said several times")
    parser.add_argument("--without", action="append", default=[], help="this one is passed over")
    parser.add_argument("--output", type=Path, help=f"file of JSON; {RESULTS.name} is published")
    options = parser.parse_args(arguments)
    chosen = [
        each for each in doors() if each.name in (options.door or [each.name]) and each.name not in options.without
    ]
    if not chosen:
        parser.error(f"no such door; there are {', '.join(each.name for each in doors())}")
    faulthandler.enable()
    os.environ["HF_HUB_OFFLINE"] = "1"
    measured.exact()
    gc.collect()
    gc.freeze()  # else each collection looks through all that torch holds
    started = time.perf_counter()
    total = sum(campaign.shares(chosen, options.cases).values())
    show_log()
    logging.getLogger("smi_fed").addFilter(lambda record: record.getMessage().startswith("fuzzing"))
    logging.getLogger("flwr").setLevel(logging.CRITICAL)
    shown = list[campaign.Fault]()
    with Bar("fuzzing", total, unit="case", interval=20.0) as bar:

        def tell(done: int, faults: list[campaign.Fault]) -> None:
            bar.at(done, faults=len(faults))
            if done % 100 == 0 or done == total:
                faulthandler.dump_traceback_later(ENDLESS, exit=True)
            for fault in faults[len(shown) : MOST]:
                shown.append(fault)
                print(f"{fault.door} {fault.number}: {fault.what}", flush=True)

        found = campaign.run(chosen, options.cases, options.seed, options.number, tell)
    faulthandler.cancel_dump_traceback_later()
    gc.unfreeze()
    seconds = time.perf_counter() - started
    show(chosen, found, seconds)
    if options.output is not None:
        kept = read_json(options.output) if options.door and options.output.exists() else None
        write_json(options.output, told(chosen, found, options.seed, seconds, kept))
    return 1 if any(tally.faults for tally in found.values()) else 0


def told(
    chosen: list[Door], found: dict[str, campaign.Tally], seed: int, seconds: float, kept: dict | None = None
) -> dict:
    """The campaign as JSON; of a campaign that is `kept` what it says of other doors stays."""
    lines = []
    for door in chosen:
        tally = found[door.name]
        lines.append({
            "door": door.name, "reads": door.what, "cases": tally.cases, "accepted": tally.accepted,
            "refused": sum(tally.refused.values()), "faults": [asdict(fault) for fault in tally.faults],
            "memory": {"worst": tally.memory, "allowed": door.memory, "times_its_size": door.factor},
            "cpu_seconds": {"worst": round(tally.seconds, 4), "allowed": door.seconds},
            "reasons": campaign.reasons(tally),
        })  # fmt: skip
    if kept is not None:
        own = {line["door"]: line for line in lines}
        lines, seconds = [own.get(line["door"], line) for line in kept["doors"]], seconds + kept["seconds"]
    return {
        "command": f"python -m tests.fuzz --cases {sum(line['cases'] for line in lines)} --seed {seed}",
        "cases": sum(line["cases"] for line in lines), "seconds": round(seconds, 1), "machine": campaign.machine(),
        "doors": lines,
    }  # fmt: skip


def show(chosen: list[Door], found: dict[str, campaign.Tally], seconds: float) -> None:
    """The table."""
    console, table = (
        Console(width=140),
        Table(title=f"{sum(t.cases for t in found.values()):,} cases in {seconds:.0f} s"),
    )
    for heading in ("door", "cases", "let in", "refused", "faults", "worst MiB", "worst s"):
        table.add_column(heading, justify="left" if heading == "door" else "right")
    table.add_column("refused most often because of")
    for door in chosen:
        tally = found[door.name]
        numbers = (tally.cases, tally.accepted, sum(tally.refused.values()), len(tally.faults))
        reasons = "; ".join(f"{count:,} {reason}" for reason, count in tally.refused.most_common(2))
        table.add_row(
            door.name, *(f"{number:,}" for number in numbers), f"{tally.memory / MEBIBYTE:.1f}", f"{tally.seconds:.2f}",
            reasons,
        )  # fmt: skip
    console.print(table, markup=False)


if __name__ == "__main__":
    sys.exit(main())
