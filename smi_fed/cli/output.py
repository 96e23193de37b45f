"""What a command says when it is done."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table


def tell(found: Mapping[str, Any], as_json: bool) -> None:
    """On stdout, one JSON object or a table of two columns; progress and warnings are on stderr."""
    if as_json:
        print(json.dumps(found))
        return
    table = Table(show_header=False)
    for key, value in found.items():
        if value is not None:
            table.add_row(key.replace("_", " "), _words(value))
    Console().print(table)


def _words(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return "\n".join(f"{key}: {_words(each)}" for key, each in value.items())
    return ", ".join(map(_words, value)) if isinstance(value, list | tuple) else str(value)
