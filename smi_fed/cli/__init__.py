"""`smi-fed`: inversion, distillation and evaluation of models without a federation, and the way into one.

One module a family of commands. Errors of input are one line on stderr and exit status 2.
"""

from __future__ import annotations

import sys

import torch
import typer

from smi_fed.checks import SettingError
from smi_fed.cli.auditing import audit
from smi_fed.cli.federating import demo, federate
from smi_fed.cli.inverting import invert, show
from smi_fed.cli.quantizing import quantize
from smi_fed.cli.teaching import distill, evaluate
from smi_fed.devices import own_threads
from smi_fed.files import FileFormatError
from smi_fed.inversion import DivergedError
from smi_fed.progress import show_log

app = typer.Typer(
    name="smi-fed",
    help="Synthetic images from models, and students from synthetic images. Each command's --help has an example.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


@app.callback()
def prepare() -> None:
    """Before each command: as many threads as suit this machine, and progress on stderr."""
    torch.set_num_threads(own_threads())
    show_log()


for command in (invert, show, distill, quantize, evaluate, audit, demo, federate):
    app.command()(command)


def main() -> None:
    """The command of the package: what a user can mend is one line on stderr, and exit status 2."""
    try:
        app()
    except (SettingError, FileFormatError, DivergedError, ValueError, OSError) as error:
        print(f"smi-fed: {error}", file=sys.stderr)
        sys.exit(2)
