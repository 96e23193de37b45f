"""The main job in one command: `python -m simulations.demo [--output DIR] [OVERRIDE ...]`.

A federation of different Vision Transformers on Flower's simulation engine, distilled into
one student. Exits with 1 when the run failed; `flwr run` itself does not.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from server.checks import check_models
from simulations.processes import LaunchError
from simulations.superlink import PROJECT, superlink
from smi_fed.checks import SettingError, require
from smi_fed.config import join_overrides, load_settings
from smi_fed.files import writable_directory
from smi_fed.report import print_summary, read_report


def main(arguments: list[str] | None = None) -> int:
    """Run the federation; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=PROJECT / "runs" / "demo", help="artefact directory")
    parser.add_argument("--clients", type=int, default=4, help="number of simulated clients")
    parser.add_argument("overrides", nargs="*", help="Hydra overrides, such as seed=1 inversion=dense")
    options = parser.parse_args(arguments)
    output, clients = options.output.expanduser().absolute(), options.clients
    overrides = join_overrides([f"strategy.min_nodes={clients}", *options.overrides])

    def run() -> str:
        with superlink() as link:
            return link.run(overrides, output, supernodes=clients)

    return checked(overrides, output, clients) or concluded(run, output)


def checked(overrides: str, output: Path, clients: int) -> int:
    """Tell what is wrong before anything is started; returns the exit status, 0 where nothing is."""
    try:
        settings = load_settings(PROJECT / "conf", overrides)
        places = settings.data.nodes
        require(len(places) in (0, clients), "data.nodes", list(places), f"{clients}, one for each client")
        check_models(settings)
        writable_directory(output)
    except (SettingError, OSError) as error:
        print(f"smi-fed: {error}", file=sys.stderr)
        return 2
    return 0


def concluded(run: Callable[[], str], output: Path) -> int:
    """Let a run end, be interrupted or fail, and tell how it was; returns the exit status.

    Args:
        run: returns the run's final status, and leaves nothing running however it ends.
    """
    (output / "report.json").unlink(missing_ok=True)
    # Both stop the SuperLink on their way out; a shell's background job would inherit SIGINT as ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        status = run()
    except LaunchError as error:
        print(f"smi-fed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("smi-fed: interrupted; the SuperLink has been stopped", file=sys.stderr)
        return 130
    return conclude(status, output)


def conclude(status: str, output: Path) -> int:
    """Print the closing table, or why there is none; returns the exit status."""
    try:
        report = read_report(output / "report.json")
    except (OSError, ValueError) as error:
        print(f"smi-fed: the run ended as {status} and left no report ({error})", file=sys.stderr)
        return 1
    if status != "finished:completed" or report["status"] != "completed":
        print(f"smi-fed: the run ended as {status}: {report.get('reason', 'see the log above')}", file=sys.stderr)
        return 1
    print_summary(report)
    print(f"artefacts: {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
