"""A federation over separate processes: `python -m simulations.deployment [--output DIR] [OVERRIDE ...]`.

What docs/machines.md says, on loopback: a SuperLink and three SuperNodes with TLS and node
keys, each SuperNode with its own directory of images and its own architecture, and a server
without data. A SuperNode with a key that nobody registered and one without TLS have to be
refused first. Exits with 1 when they are not, or when the run failed.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from deploy.credentials import make_node_key
from simulations.demo import checked, concluded
from simulations.digit_folders import write_digits
from simulations.processes import LaunchError
from simulations.superlink import PROJECT, SuperLink, superlink
from simulations.supernode import start_supernode, supernode, with_key
from smi_fed.config import join_overrides

NO_CONNECTION = "Failed to initialize the connection to the SuperLink."
"""What a SuperNode's log says when the SuperLink does not let it in, before the reason."""


@dataclass(frozen=True)
class Owner:
    """Who has images and a model.

    Attributes:
        name: of the node.
        classes: digits of which there are images.
        count: images of each.
        arch: a name under `model.clients`.
    """

    name: str
    classes: str
    count: int
    arch: str


OWNERS = (
    Owner("St Mary", "01234", 120, "vit_p4_w64_d2"),
    Owner("Hôpital Nord", "3456", 150, "vit_p8_w96_d3"),
    Owner("Charité", "567890", 100, "vit_p8_w64_d4"),
)


def main(arguments: list[str] | None = None) -> int:
    """Run the federation; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=PROJECT / "runs" / "deploy-demo", help="artefact directory")
    parser.add_argument("overrides", nargs="*", help="Hydra overrides, such as seed=1 inversion=dense")
    options = parser.parse_args(arguments)
    output = options.output.expanduser().absolute()
    overrides = join_overrides(["experiment=deployment", *options.overrides])
    return checked(overrides, output, len(OWNERS)) or concluded(lambda: federate(overrides, output), output)


def federate(overrides: str, output: Path) -> str:
    """Refuse strangers, then run with the owners' nodes; returns the run's final status.

    Node logs are `logs/NODE.log` in the artefact directory.

    Raises:
        LaunchError: a stranger is let in, or an owner is not.
    """
    with (
        tempfile.TemporaryDirectory(prefix="smi-fed-images-") as images,
        superlink(simulation=False, logs=output / "logs") as link,
    ):
        nodes = {}
        for number, owner in enumerate(OWNERS):
            data = write_digits(Path(images) / f"site-{number}", owner.classes, owner.count)
            config = {"data": str(data), "name": owner.name, "arch": owner.arch}
            nodes[owner.name] = supernode(link, f"supernode{number}", config)
        refuse_strangers(link)
        for name, node in nodes.items():
            if not node.admitted():
                raise LaunchError(f"the SuperNode of {name} was refused: {node.log}")
            print(f"let in: {name}, log {node.log}", flush=True)
        return link.run(overrides, output)


def refuse_strangers(link: SuperLink) -> None:
    """Start a SuperNode with a key that nobody registered and one without TLS, and see both refused.

    Raises:
        LaunchError: one is let in, or ends for another reason.
    """
    assert link.certificates is not None
    unknown = with_key(link.certificates, make_node_key(link.home / "unregistered"))
    strangers = {"unregistered": unknown, "without-tls": ["--insecure"]}
    nodes = {
        name: start_supernode(link, name, {"name": name}, [*access, "--max-retries", "1"])
        for name, access in strangers.items()
    }
    for name, node in nodes.items():
        if node.admitted():
            raise LaunchError(f"the SuperNode '{name}' was let in: {node.log}")
        reason = re.search(f"{re.escape(NO_CONNECTION)}\n(.*)", node.said())
        if not reason:
            raise LaunchError(f"the SuperNode '{name}' was not refused but failed: {node.log}")
        print(f"refused, as it has to be: SuperNode '{name}' ({reason[1]})", flush=True)


if __name__ == "__main__":
    sys.exit(main())
