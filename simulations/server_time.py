"""How long does the server work? `python -m simulations.server_time [--seeds 0 1 2] [OVERRIDE ...]`.

The demo's four clients are trained once for each seed. Their models are then inverted and
distilled by the pipeline of an earlier commit, in a worktree and an environment of its own, and
by this checkout, in turn, each in a process of its own with its own defaults.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

from safetensors.torch import save_file

from simulations.local_clients import check_clients, trained_clients
from simulations.processes import LaunchError
from simulations.runner import Cell, Line, Lines, Page, Study, Table, command
from simulations.runner.ledger import PROJECT
from smi_fed.config import Settings

EARLIER, CHECKOUT, CLIENTS = "9793433", "this checkout", 4
WITHOUT_BFLOAT16 = {"ONEDNN_MAX_CPU_ISA": "AVX2"}
"""Products of bfloat16 as on processors that have no units for it, which some of this project's users have."""


def add_options(parser: ArgumentParser) -> None:
    """What of the study is measured."""
    parser.add_argument("--units", action="store_true", help="let bfloat16 units be used where the processor has them")


def cells(options: Namespace) -> list[Cell]:
    """One for each tree."""
    return [Cell({"tree": tree, "bfloat16_units": options.units}) for tree in (EARLIER, CHECKOUT)]


def measure(settings: Settings, cell: Cell) -> Line:
    """The server's work in one tree, in a process of its own."""
    tree, python = PROJECT, Path(sys.executable)
    if cell["tree"] == EARLIER:
        tree = worktree(cell.output.absolute() / EARLIER)
        python = tree / ".venv" / "bin" / "python"
    clients = exported(settings, cell.output.absolute())
    words = [str(python), str(PROJECT / "simulations" / "server_work.py"), str(tree), str(clients), *cell.words]
    env = {**os.environ, **({} if cell["bfloat16_units"] else WITHOUT_BFLOAT16)}
    done = subprocess.run(words, cwd=tree, env=env, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise LaunchError(f"the work in {cell['tree']} ended with status {done.returncode}; see above")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def exported(settings: Settings, output: Path) -> Path:
    """The clients' weights, as any tree reads them."""
    place = output / "weights" / str(settings.seed)
    place.mkdir(parents=True, exist_ok=True)
    for number, teacher in enumerate(trained_clients(settings, CLIENTS, output / "clients")):
        save_file(teacher.model.state_dict(), place / f"client-{number}.safetensors")
    return place


def worktree(place: Path) -> Path:
    """The earlier commit with its environment; made where it is not there.

    Raises:
        LaunchError: the commit is not in this repository, or its environment cannot be made.
    """
    commands = {
        place / "pyproject.toml": ["git", "-C", str(PROJECT), "worktree", "add", "--detach", str(place), EARLIER],
        place / ".venv" / ".ready": ["bash", str(place / "scripts" / "setup.sh"), str(place / ".venv")],
    }
    for made, words in commands.items():
        where = place if place.exists() else PROJECT
        if not made.exists() and subprocess.run(words, cwd=where, check=False).returncode:
            raise LaunchError(f"{' '.join(words)} failed")
    return place


def table(lines: Lines) -> list[Table]:
    """Seconds and accuracy of each seed, and the ratio of the medians."""
    rows = [["tree", "seed", "inversion, s", "distillation, s", "together, s", "student, %"]]
    for line in sorted(lines, key=lambda line: (line["seed"], line["tree"] == CHECKOUT)):
        inversion, distillation = line["inversion_seconds"], line["distillation_seconds"]
        seconds = [f"{each:.1f}" for each in (inversion, distillation, inversion + distillation)]
        rows.append([line["tree"], str(line["seed"]), *seconds, f"{100 * line['accuracy']:.1f}"])
    medians = {
        tree: statistics.median(line["inversion_seconds"] + line["distillation_seconds"] for line in own)
        for tree in (EARLIER, CHECKOUT)
        if (own := [line for line in lines if line["tree"] == tree])
    }
    notes = [f"{CHECKOUT} takes {medians[CHECKOUT] / medians[EARLIER]:.2f} of the seconds"] if len(medians) == 2 else []
    units = all(line["bfloat16_units"] for line in lines)
    return [Table(f"{CLIENTS} clients of the demo, {'with' if units else 'without'} bfloat16 units", rows, notes)]


STUDY = Study(
    name="server_time", about=__doc__, cells=cells, measure=measure, table=table, in_turn="tree",
    page=Page("docs/cost.md", "Raw pieces", lambda _: ", CPU."), options=add_options, check=check_clients,
)  # fmt: skip
main = command(STUDY)


if __name__ == "__main__":
    sys.exit(main())
