"""What a study is."""

from __future__ import annotations

import shlex
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from simulations.runner.ledger import PROJECT, Line, Lines
from smi_fed.config import load_settings


@dataclass(frozen=True)
class Cell:
    """One thing to measure."""

    factors: Mapping[str, Any]  # what tells it from the study's other cells; they stand in its line
    overrides: Sequence[str] = ()  # of the configuration, after those of the command line
    defaults: Sequence[str] = ()  # before those, which may change them

    # What the runner knows of it.
    key: str = ""
    settings: Any = None
    words: Sequence[str] = ()  # all overrides, the seed's too
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    output: Path = Path()  # the study's directory

    def __getitem__(self, factor: str) -> Any:
        return self.factors[factor]

    def __str__(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in {"seed": self.settings.seed, **self.factors}.items())


@dataclass(frozen=True)
class Table:
    """Rows, the first one of headings, under a title and above notes; there may be notes alone."""

    title: str = ""
    rows: Sequence[Sequence[str]] = ()
    notes: Sequence[str] = ()


def seeds_of(lines: Lines) -> list[int]:
    """All seeds that occur."""
    return sorted({line["seed"] for line in lines})


def groups(lines: Lines, *factors: str) -> dict[tuple[str, ...], list[Line]]:
    """Lines by their values of some factors, in order of first appearance."""
    found: dict[tuple[str, ...], list[Line]] = {}
    for line in lines:
        found.setdefault(tuple(line[factor] for factor in factors), []).append(line)
    return found


def asked(lines: Lines) -> str:
    """Seeds and overrides, as a command line has them."""
    return shlex.join(["--seeds", *map(str, seeds_of(lines)), *shared_changes(lines)])


def shared_changes(lines: Lines) -> list[str]:
    """The command line's overrides of all lines; none where they differ."""
    (first, *others) = [line.get("changes", []) for line in lines]
    return [] if any(each != first for each in others) else first


@dataclass(frozen=True)
class Page:
    """Where a study's table is published: between the markers `<!-- NAME:start -->` and `<!-- NAME:end -->`."""

    file: str  # from the project's root
    raw: str = "Raw pieces"  # what the link to the kept lines is called
    note: Callable[[Lines], str] = lambda _: "."  # what stands behind the command
    markdown: bool = False  # a table of the page, not as the command prints it
    arguments: Callable[[Lines], str] = asked


@dataclass(frozen=True, kw_only=True)
class Study:
    """Everything that tells one study from another."""

    name: str  # of its module, its directory in runs/, its kept file and its section of a page
    about: str | None  # what --help says
    cells: Callable[[Namespace], Sequence[Cell]]  # in any order, from the options of the command line
    measure: Callable[[Any, Cell], Line]  # settings and a cell to what its line will tell
    table: Callable[[Lines], Sequence[Table]]  # some lines may be missing
    figure: Callable[[Lines], Any] | None = None  # of matplotlib
    picture: str = ""  # its file
    page: Page | None = None
    words: Sequence[str] = ()  # overrides of every cell, such as the experiment
    options: Callable[[ArgumentParser], object] = lambda _: None  # adds to the command line
    compose: Callable[[Sequence[str]], Any] = lambda words: load_settings(PROJECT / "conf", words)
    check: Callable[[Any, Cell], object] = lambda _settings, _cell: None  # SettingError before anything is measured
    place: Callable[[Any], tuple[str, int]] = lambda settings: (settings.server.device, settings.server.threads or 1)
    in_turn: str = "method"  # values of this factor alternate, so that a change of the machine's speed meets all
    apart: str = ""  # values of this factor are never compared, and may be of other code and overrides
    own_process: bool = False  # of each cell; `measure` is then a function of a module
    ledger: bool = True  # measured cells are kept, and not measured again
