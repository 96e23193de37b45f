"""Tables for people, kept lines, and the pages that are made from them."""

from __future__ import annotations

import io
import json
import logging
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import rich.table
from rich.console import Console

from simulations.runner.ledger import LEDGER, Line, newest, read_lines
from simulations.runner.study import Study, Table
from smi_fed.files import replacing

log = logging.getLogger("smi_fed")


def show(tables: Sequence[Table], console: Console) -> None:
    """Print tables."""
    for each in tables:
        if each.rows:
            shown = rich.table.Table(*each.rows[0], title=each.title or None)
            for row in each.rows[1:]:
                shown.add_row(*row)
            console.print(shown)
        for note in each.notes:
            console.print(note)


def markdown(table: Table) -> str:
    """A table in Markdown, without its title."""
    heading, *others = (f"| {' | '.join(row)} |\n" for row in table.rows)
    notes = "".join(f"\n{note}\n" for note in table.notes)
    return heading + f"|{' --- |' * len(table.rows[0])}\n" + "".join(others) + notes


def as_printed(tables: Sequence[Table]) -> str:
    """Tables as a command prints them, for a page."""
    file = io.StringIO()
    show(tables, Console(file=file, width=110))
    return "```text\n" + "\n".join(line.rstrip() for line in file.getvalue().splitlines()) + "\n```\n"


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure of matplotlib."""
    with replacing(path) as part:
        figure.savefig(part, dpi=120)


def keep(study: Study, directories: Sequence[Path], project: Path) -> None:
    """Copy what was measured to benchmarks/results/, and draw it for docs/.

    Lines of other code, overrides or devices than the last one's are left out, and a log line says how many.

    Raises:
        ValueError: nothing is there.
    """
    found = [line for each in directories for line in read_lines(each / LEDGER).values()]
    if not found:
        raise ValueError(f"no measured lines in {', '.join(map(str, directories))}")
    lines = newest(found, study.apart)
    if left_out := len(found) - len(lines):
        log.warning("%d of %d lines are of other code, overrides or devices: left out", left_out, len(found))
    path = project / "benchmarks" / "results" / f"{study.name}.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    path.with_suffix(".json").unlink(missing_ok=True)
    if study.figure is not None:
        save_figure(study.figure(lines), project / "docs" / study.picture)


def is_kept(name: str, results: Path) -> bool:
    """Whether there are lines for `kept`."""
    return any((results / f"{name}{ending}").exists() for ending in (".jsonl", ".json"))


def kept(name: str, results: Path) -> tuple[Path, list[Line]]:
    """The kept file of a study, and its lines.

    One JSON document with a list in it stands for lines that share what is beside the list.
    """
    path = results / f"{name}.jsonl"
    if path.exists():
        return path, [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]
    path = path.with_suffix(".json")
    document = json.loads(path.read_text(encoding="utf-8"))
    (rows,) = (document.pop(key) for key in ("runs", "rows", "teachers") if key in document)
    return path, [document | row for row in rows]


def section(study: Study, results: Path) -> str:
    """What a study's page shows, from the kept lines; there may be none yet."""
    assert study.page is not None
    if not is_kept(study.name, results):
        return "Not measured yet.\n"
    path, lines = kept(study.name, results)
    tables = study.table(lines)
    if study.page.markdown:
        titles = [f"**{each.title}**\n\n" if each.title and len(tables) > 1 else "" for each in tables]
        body = "".join(title + markdown(each) + "\n" for title, each in zip(titles, tables, strict=True))
    else:
        body = as_printed(tables)
    command = f"python -m simulations.{study.name} {study.page.arguments(lines)}"
    note = study.page.note(lines) + places(lines, study.apart)
    return f"{body}`{command}`{note} [{study.page.raw}](benchmarks/results/{path.name}).\n"


def places(lines: Sequence[Line], apart: str) -> str:
    """Device and overrides of the last line of each value of a factor; nothing where all are the same."""
    parts = sorted(lines, key=lambda line: apart not in line)
    last = {f"*{line[apart]}*" if apart in line else "the rest": _place(line) for line in parts}
    found: dict[str, list[str]] = {}
    for value, place in last.items():
        found.setdefault(place, []).append(value)
    told = [f"{', '.join(values)} on {place}" for place, values in found.items()]
    return f" Measured: {'; '.join(told)}." if len(told) > 1 else ""


def _place(line: Line) -> str:
    device = line.get("environment", {}).get("device_name", "an unnamed device")
    changes = shlex.join(line.get("changes", []))
    return device + (f" with `{changes}`" if changes else "")


def filled(text: str, file: str, sections: Mapping[str, tuple[str, Callable[[], str]]]) -> str:
    """A page with its sections as they are now.

    Args:
        text: of the page.
        file: its path from the project's root.
        sections: by name: the page's path, and what writes the section.

    Raises:
        ValueError: a section's markers are not there.
    """
    up = "../" * file.count("/")
    for name, (place, render) in sections.items():
        if place == file:
            before, start, rest = text.partition(f"<!-- {name}:start -->\n")
            _, end, after = rest.partition(f"<!-- {name}:end -->")
            if not end:
                raise ValueError(f"{file}: no markers <!-- {name}:start --> and <!-- {name}:end -->")
            text = before + start + render().replace("](benchmarks/", f"]({up}benchmarks/") + end + after
    return text
