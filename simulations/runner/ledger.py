"""Measured cells, one JSON line each, so that a study that was stopped goes on; and which code measured, and where."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

PROJECT = Path(__file__).resolve().parents[2]
SOURCES, STUDIES = ("smi_fed", "clients", "server", "conf"), "simulations"
LEDGER = "pieces.jsonl"

Line = dict[str, Any]
"""One measured cell."""

Lines = Sequence[Line]


def digest(*parts: object) -> str:
    """A short name for settings: the same settings, the same name."""
    text = json.dumps([repr(part) for part in parts])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def append_line(path: Path, line: Line) -> None:
    """Add one measured cell; a last line that was cut off by a crash is ended first."""
    before = path.read_bytes()[-1:] if path.exists() else b""
    with path.open("ab") as file:
        file.write(b"\n" * (before not in (b"", b"\n")) + json.dumps(line).encode() + b"\n")


def read_lines(path: Path) -> dict[str, Line]:
    """Lines by key; what was cut off is left out."""
    found = {}
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
            found[line["key"]] = line
        except (ValueError, KeyError, TypeError):
            continue
    return found


def newest(lines: Lines, apart: str = "") -> list[Line]:
    """Those of the last one's code, overrides, device and torch; only such are compared with each other.

    Args:
        apart: a factor whose values have last lines of their own, since they are never compared.
    """
    last = {line.get(apart): _setup(line) for line in lines}
    return [line for line in lines if _setup(line) == last[line.get(apart)]]


def _setup(line: Line) -> object:
    where = line.get("environment", {})
    return line.get("code"), line.get("changes"), where.get("device"), where.get("versions", {}).get("torch")


def code_version() -> dict[str, str | None]:
    """The last commit that touched the library or the studies (None without git), and a digest of the library.

    The digest sees changes that are in no commit yet.
    """
    command = ["git", "log", "-1", "--format=%H", "--", *SOURCES, STUDIES]
    try:
        said = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        said = ""
    return {"commit": said or None, "sources": sources_digest()}


def sources_digest() -> str:
    """SHA-256 over paths and contents of the library's sources and configuration."""
    found = hashlib.sha256()
    files = (path for name in SOURCES for path in (PROJECT / name).rglob("*") if path.suffix in (".py", ".yaml"))
    for path in sorted(files):
        found.update(f"{path.relative_to(PROJECT).as_posix()}\0{path.stat().st_size}\0".encode())
        found.update(path.read_bytes())
    return found.hexdigest()


def environment(device: torch.device) -> Line:
    """Where a measurement was made."""
    info = Path("/proc/cpuinfo")
    cpus = [line for line in info.read_text("utf-8").splitlines() if line[:10] == "model name"] if info.exists() else []
    cpu = cpus[0].partition(":")[2].strip() if cpus else platform.processor() or platform.machine()
    return {
        "versions": {package: version(package) for package in ("torch", "timm", "numpy")},
        "python": platform.python_version(),
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
