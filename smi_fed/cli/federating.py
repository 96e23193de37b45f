"""`smi-fed demo` and `smi-fed federate`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from smi_fed.checks import require
from smi_fed.config import CONF

APP = CONF.parent
"""Where the Flower app and its launcher lie."""

TEMPLATE = next((path for path in (APP / "deploy" / "app.toml",) if path.exists()), APP / "pyproject.toml")
"""What an app of one's own is called and made of; installed, it is the launcher's own."""


def demo(
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")] = None,
    output: Annotated[Path, typer.Option(help="where report, student and pictures go")] = Path("smi-fed-demo"),
    clients: Annotated[int, typer.Option(min=2, help="simulated clients")] = 4,
) -> None:
    """Run a whole federation of different Vision Transformers on digits, on Flower's simulation engine.

    Example: smi-fed demo --output my-demo seed=1
    """
    command = [sys.executable, "-m", "simulations.demo", "--output", str(output.absolute()), "--clients", str(clients)]
    path = os.pathsep.join(filter(None, [str(APP), os.environ.get("PYTHONPATH", "")]))
    process = subprocess.Popen([*command, *(overrides or [])], cwd=APP, env={**os.environ, "PYTHONPATH": path})
    while True:
        try:
            raise typer.Exit(process.wait())
        except KeyboardInterrupt:  # it has got the same signal, and stops what it started
            continue


def federate(
    directory: Annotated[Path, typer.Argument(metavar="DIRECTORY")],
) -> None:
    """Write a Flower app of one's own: server, clients and settings, to be changed and to be run by `flwr run`.

    DIRECTORY must not be there, or be empty.

    Example: smi-fed federate my-federation
    """
    there = directory.exists() and (not directory.is_dir() or any(directory.iterdir()))
    require(not there, "directory", str(directory), "a path where nothing is")
    for name in ("server", "clients", "conf"):
        shutil.copytree(APP / name, directory / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(TEMPLATE, directory / "pyproject.toml")
    print(
        f"{directory}: a Flower app. Its settings are in conf/config.yaml; run it by\n  flwr run {directory} --stream"
    )
