"""SuperNodes on this machine, each with a private home, beside a SuperLink of one's own."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from deploy.credentials import Certificates, make_node_key, public_half
from simulations.processes import LaunchError, free_port, tool
from simulations.superlink import CONNECTION, STARTUP_SECONDS, SuperLink, toml

NodeConfig = Mapping[str, str | int | float]


@dataclass(frozen=True)
class SuperNode:
    """A SuperNode that was started; its SuperLink's end is also its own.

    Attributes:
        process: of `flower-supernode`.
        log: what it and its ClientApps print.
        restart: starts it once more with the same name, key and configuration, as a service manager does.
    """

    process: subprocess.Popen[bytes]
    log: Path
    restart: Callable[[], SuperNode]

    def admitted(self) -> bool:
        """Wait until the SuperLink has let it in, True, or it has given up, False.

        Raises:
            LaunchError: neither in time.
        """
        deadline = time.monotonic() + STARTUP_SECONDS
        while time.monotonic() < deadline:
            ended = self.process.poll() is not None
            if "SuperNode ID: " in self.said():
                return True
            if ended:
                return False
            time.sleep(0.2)
        raise LaunchError(f"a SuperNode is neither let in nor refused; its log ends:\n{self.said()[-2000:]}")

    def said(self) -> str:
        """Its log up to now."""
        return self.log.read_text(encoding="utf-8")


def supernode(link: SuperLink, name: str, config: NodeConfig) -> SuperNode:
    """Start a SuperNode that the SuperLink lets in: with TLS it has a key, which is registered first.

    Args:
        name: of its private home in the link's, and of its log, NAME.log.
        config: its `--node-config`.

    Raises:
        LaunchError: the key cannot be registered.
    """
    access = ["--insecure"]
    if link.certificates is not None:
        key = make_node_key(link.home / name)
        link.ask("node-id", "supernode", "register", str(public_half(key)), CONNECTION)
        access = with_key(link.certificates, key)
    return start_supernode(link, name, config, access)


def with_key(certificates: Certificates, key: Path) -> list[str]:
    """Arguments of a SuperNode that trusts the authority and has a key."""
    return ["--root-certificates", str(certificates.authority), "--auth-supernode-private-key", str(key)]


def start_supernode(link: SuperLink, name: str, config: NodeConfig, access: Sequence[str]) -> SuperNode:
    """Start a SuperNode, whether the SuperLink lets it in or not.

    Args:
        name, config: as in `supernode`.
        access: arguments of `flower-supernode` on TLS and keys.
    """
    words = " ".join(f"{key}={toml(value) if isinstance(value, str) else value}" for key, value in config.items())
    command = [tool("flower-supernode"), "--superlink", f"127.0.0.1:{link.port}", "--port", str(free_port())]
    command += ["--node-config", words, *access]
    home, log = link.home / name, link.logs / f"{name}.log"
    home.mkdir(exist_ok=True)
    env = {**link.env, "FLWR_HOME": str(home)}
    with log.open("a") as file:
        process = subprocess.Popen(
            command, env=env, cwd=home, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
    return SuperNode(process, log, partial(start_supernode, link, name, config, access))
