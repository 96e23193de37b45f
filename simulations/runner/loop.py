"""From a study and a command line to measured lines, a table and a picture."""

from __future__ import annotations

import logging
import multiprocessing
import signal
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain, pairwise, zip_longest
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from simulations.runner import ledger
from simulations.runner.ledger import LEDGER, PROJECT, Line, Lines
from simulations.runner.publication import save_figure, show
from simulations.runner.study import Cell, Study
from smi_fed.checks import SettingError, require
from smi_fed.devices import choose_device
from smi_fed.files import writable_directory
from smi_fed.progress import show_log

log = logging.getLogger("smi_fed")


@dataclass(frozen=True)
class Outcome:
    """The lines of a command's cells, in their order, and the exit status.

    It is 1 where a cell could not be measured, 2 for settings that cannot be, 130 for an interruption.
    """

    status: int
    lines: Lines = ()
    output: Path = Path()


def command(study: Study) -> Callable[..., int]:
    """The study's `main`, from arguments (None: those of the process) to the exit status."""
    return lambda arguments=None: run(study, arguments).status


def run(study: Study, arguments: Sequence[str] | None = None) -> Outcome:
    """Measure all cells that are missing, print the table, draw; what fails is told and does not stop the others."""
    options = parsed(study, sys.argv[1:] if arguments is None else arguments)
    show_log()
    # Both unwind what is open, processes of a study too; a shell's background job would inherit SIGINT as ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        output = writable_directory(options.output.expanduser().absolute()) if study.ledger else Path()
        code = ledger.code_version()
        cells = planned(study, options, output, code)
        shared = {"code": code, "changes": options.overrides}
        known, failed = _measure_missing(study, cells, output / LEDGER, shared)
        lines = [known[cell.key] for cell in cells if cell.key in known]
        if lines:
            show(study.table(lines), Console(width=120))
        if lines and study.figure:
            save_figure(study.figure(lines), output / study.picture)
    except (SettingError, OSError) as error:
        print(f"smi-fed: {error}", file=sys.stderr)
        return Outcome(2)
    except KeyboardInterrupt:
        print("smi-fed: interrupted; what was measured is kept", file=sys.stderr)
        return Outcome(130)
    for each in failed:
        print(f"smi-fed: not measured: {each}", file=sys.stderr)
    if study.ledger:
        print(f"artefacts: {output}")
    return Outcome(int(bool(failed)), lines, output)


def parsed(study: Study, words: Sequence[str]) -> Namespace:
    """The options of a command line; overrides may stand anywhere, behind a list of seeds too."""
    parser = ArgumentParser(
        f"simulations.{study.name}", description=study.about, formatter_class=RawDescriptionHelpFormatter
    )
    if study.ledger:
        kept = PROJECT / "runs" / study.name
        parser.add_argument("--output", type=Path, default=kept, help="where lines and picture go")
    parser.add_argument("--seeds", type=int, nargs="+", help="default: the configuration's")
    study.options(parser)
    parser.add_argument("overrides", nargs="*", help="Hydra overrides, such as distillation.steps=100")
    apart: tuple[list[str], list[str]] = ([], [])
    for before, word in pairwise(["", *words]):
        apart["=" in word and word[0] != "-" and before != "--output"].append(word)
    options = parser.parse_args(apart[0])
    options.overrides += apart[1]
    return options


def planned(study: Study, options: Namespace, output: Path, code: object) -> list[Cell]:
    """Every cell of every seed, each checked.

    Raises:
        SettingError: settings that cannot be.
    """
    twice = options.seeds and any(word.lstrip("+").startswith("seed=") for word in options.overrides)
    require(not twice, "seed", options.overrides, "--seeds or seed=, not both")
    composed: dict[tuple[str, ...], Any] = {}
    found: dict[str, Cell] = {}
    cells = in_turn(study.cells(options), study.in_turn)
    for seed in options.seeds or [None]:
        for cell in cells:
            words = (*study.words, *cell.defaults, *options.overrides, *cell.overrides)
            if words not in composed:  # the slow part
                composed[words] = study.compose(words)
            settings = composed[words] if seed is None else replace(composed[words], seed=seed)
            device, reason = choose_device(study.place(settings)[0])
            if not found:
                log.info("device: %s (%s)", device, reason)
            key = ledger.digest(settings, sorted(cell.factors.items()), str(device), torch.__version__, code)
            words = (*words, f"seed={settings.seed}")
            found[key] = replace(cell, key=key, settings=settings, words=words, device=device, output=output)
            study.check(settings, found[key])
    return list(found.values())


def in_turn(cells: Sequence[Cell], factor: str) -> list[Cell]:
    """The same cells, those of each value of `factor` in their order, the values alternating."""
    groups: dict[object, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(cell.factors.get(factor), []).append(cell)
    return [cell for cell in chain(*zip_longest(*groups.values())) if cell is not None]


def _measure_missing(
    study: Study, cells: Sequence[Cell], path: Path, shared: Line
) -> tuple[dict[str, Line], list[str]]:
    """All lines by key, and the cells that failed."""
    known, failed = ledger.read_lines(path) if study.ledger else {}, []
    missing = [cell for cell in cells if cell.key not in known]
    for number, cell in enumerate(missing, 1):
        log.info("%d of %d: %s", number, len(missing), cell)
        try:
            found = (_apart if study.own_process else _measured)(study.measure, cell, study.place(cell.settings)[1])
        except Exception as error:  # whatever a cell raises, the others have lines of their own
            log.warning("%s: failed", cell, exc_info=True)
            failed.append(f"{cell}: {type(error).__name__}: {error}")
            continue
        known[cell.key] = {"key": cell.key, "seed": cell.settings.seed, **cell.factors, **shared, **found}
        if study.ledger:
            ledger.append_line(path, known[cell.key])
    return known, failed


def _measured(measure: Callable[[Any, Cell], Line], cell: Cell, threads: int) -> Line:
    if threads:
        torch.set_num_threads(threads)
    return {**measure(cell.settings, cell), "environment": ledger.environment(cell.device)}


def _apart(*work: Any) -> Line:
    """As `_measured`, in a process of its own, which is ended with this one."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), show_log) as alone:
        try:
            return alone.submit(_measured, *work).result()
        except BaseException:
            for process in multiprocessing.active_children():
                process.terminate()
            raise
