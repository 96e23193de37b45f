"""The ServerApp: load the configuration, build the strategy, start it, report."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import torch
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from server.run import FederatedRun
from smi_fed.config import load_settings

CONF = Path(__file__).resolve().parent.parent / "conf"

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """One federated run. Anything that cannot be is refused before a client is asked."""
    show_log()
    settings = load_settings(CONF, str(context.run_config.get("overrides", "")))
    output = str(context.run_config.get("output", "")) or str(Path.home() / "smi-fed-runs" / str(context.run_id))
    run = FederatedRun(settings, Path(output))
    if settings.server.threads:
        torch.set_num_threads(settings.server.threads)
    run.execute(grid)


def show_log() -> None:
    """Let smi_fed's own log through to where Flower's goes."""
    log = logging.getLogger("smi_fed")
    log.setLevel(logging.INFO)
    log.propagate = False
    if not log.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("smi-fed: %(message)s"))
        log.addHandler(handler)
