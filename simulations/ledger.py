"""Finished pieces of a study, one JSON line each, so that a study that was stopped goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def append_line(path: Path, entry: dict[str, Any]) -> None:
    """Add one finished piece."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")


def read_lines(path: Path) -> dict[str, dict[str, Any]]:
    """Pieces by key; a last line that was cut off by a crash is left out."""
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        found[entry["key"]] = entry
    return found
