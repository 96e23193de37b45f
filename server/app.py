"""The ServerApp: load the configuration, build the strategy, start it, report."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from server.run import FederatedRun
from smi_fed.checks import SettingError, require
from smi_fed.config import load_settings
from smi_fed.devices import own_threads
from smi_fed.files import FileFormatError
from smi_fed.progress import show_log
from smi_fed.strategies import TooFewTeachersError, UnsoundStudentError

CONF = Path(__file__).resolve().parent.parent / "conf"

log = logging.getLogger("smi_fed")

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """One federated run. Anything that cannot be is refused before a client is asked."""
    show_log()
    try:
        settings = load_settings(CONF, str(context.run_config.get("overrides", "")))
        torch.set_num_threads(settings.server.threads or own_threads())
        FederatedRun(settings, output_directory(context)).execute(grid)
    except (SettingError, FileFormatError, OSError, TooFewTeachersError, UnsoundStudentError) as error:
        # Flower prints the traceback of what ends a ServerApp; the reason should stand by itself too.
        log.error("the run ends: %s", error)
        raise


def output_directory(context: Context) -> Path:
    """Where artefacts go.

    Raises:
        SettingError: a relative path, which would mean the SuperLink's directory and not the user's.
    """
    asked = str(context.run_config.get("output", ""))
    require(not asked or Path(asked).expanduser().is_absolute(), "output", asked, "an absolute path")
    return Path(asked) if asked else Path.home() / "smi-fed-runs" / str(context.run_id)
