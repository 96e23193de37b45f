"""A SuperLink of one's own: private home, free port, an empty directory, and gone at the end."""

from __future__ import annotations

import json
import math
import os
import re
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch

from deploy.credentials import Certificates, make_certificates
from simulations.processes import LaunchError, free_port, stop_family, tool

PROJECT = Path(__file__).resolve().parent.parent
STARTUP_SECONDS = 90
POLL_SECONDS = 2.0
CONNECTION = "smi-fed"

QUIET = {
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",  # else each run installs torch into an environment of its own
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # Ray's new default, said aloud: otherwise it warns
    "HF_HUB_OFFLINE": "1",
}


@dataclass(frozen=True)
class SuperLink:
    """A running SuperLink.

    Attributes:
        port: of its HTTP API on 127.0.0.1.
        home: its private FLWR_HOME.
        logs: where it and SuperNodes log.
        env: environment for `flwr` commands against it.
        certificates: by which SuperNodes and `flwr` know it; None without TLS.
    """

    port: int
    home: Path
    logs: Path
    env: Mapping[str, str]
    certificates: Certificates | None

    def run(self, overrides: str, output: Path, supernodes: int | None = None) -> str:
        """`flwr run` of this project, its log on our standard output; returns the run's final status.

        Args:
            overrides: Hydra overrides.
            output: absolute artefact directory.
            supernodes: of a simulation; None for separate SuperNodes.
        """
        command = [tool("flwr"), "run", str(PROJECT), CONNECTION, "--stream"]
        config = f"overrides={toml(overrides)} output={toml(output)}"
        if supernodes is not None:  # simulated clients live on this machine, and outlive a killed run here
            config += f" client-state={toml(output / 'unfinished' / 'clients')}"
        command += ["--run-config", config]
        if supernodes is not None:
            resources = f"client-resources-num-cpus=1 client-resources-num-gpus={gpus_of_client(supernodes)}"
            command += ["--federation-config", f"num-supernodes={supernodes} {resources}"]
        process = subprocess.Popen(command, env=dict(self.env), cwd=PROJECT)
        try:
            process.wait()
        finally:
            process.terminate()
            process.wait()
        return self.final_status()

    def final_status(self) -> str:
        """Status of the newest run once it has ended: `flwr run` may leave before it, and exits 0 whatever came."""
        while not (status := self.status()).startswith(("finished", "never")):
            time.sleep(POLL_SECONDS)
        return status

    def status(self) -> str:
        """Status of the newest run now, such as finished:completed."""
        runs = self.ask("runs", "ls", CONNECTION)
        return str(runs[0]["status"]) if runs else "never started"

    def ask(self, key: str, *command: str) -> Any:
        """What a `flwr` command answers under one key of its JSON.

        Raises:
            LaunchError: it answers something else.
        """
        words = [tool("flwr"), *command, "--format", "json"]
        found = subprocess.run(words, env=dict(self.env), capture_output=True, text=True, check=False)
        try:
            return json.loads(found.stdout[found.stdout.index("{") :])[key]
        except (ValueError, KeyError) as error:
            raise LaunchError(f"flwr {' '.join(command)} said: {found.stdout}{found.stderr}") from error


def gpus_of_client(clients: int) -> float:
    """Share of a GPU that each of so many simulated clients has, so that all have one at once; 0 without CUDA.

    Ray hides the GPUs from a client without a share.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return min(1.0, math.floor(1000 * gpus / clients) / 1000)


def toml(text: object) -> str:
    """A TOML string of any text, without the signs at which Flower splits a run config before it reads TOML."""
    return '"' + re.sub(r'[\x00-\x1f\x7f"\\]', lambda sign: f"\\u{ord(sign[0]):04x}", str(text)) + '"'


@contextmanager
def superlink(
    simulation: bool = True,
    extra_env: Mapping[str, str] | None = None,
    insecure: bool = False,
    logs: Path | None = None,
) -> Iterator[SuperLink]:
    """Start a SuperLink on a free loopback port; stop it, its runs and its SuperNodes at the end, whatever happens.

    Args:
        simulation: its SuperNodes are simulated, without TLS and keys.
        extra_env: for its processes, beyond our own environment.
        insecure: separate SuperNodes come without TLS and keys.
        logs: directory for logs; None loses them at the end.

    Raises:
        LaunchError: it does not answer in time.
    """
    with tempfile.TemporaryDirectory(prefix="smi-fed-", ignore_cleanup_errors=True) as scratch:
        home, empty = Path(scratch) / "home", Path(scratch) / "empty"
        home.mkdir()
        empty.mkdir()  # a foreign `server` package in its directory would win over ours
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
        env = {**os.environ, **QUIET, "FLWR_HOME": str(home), "PATH": path, **(extra_env or {})}
        certificates = None if simulation or insecure else make_certificates(home / "credentials", [])
        link = SuperLink(free_port(), home, logs or home, env, certificates)
        link.logs.mkdir(exist_ok=True)
        _write_config(link)
        command = [tool("flower-superlink"), "--host", "127.0.0.1", "--port", str(link.port), *_access(certificates)]
        command += ["--simulation"] if simulation else []
        with (link.logs / "superlink.log").open("w") as log:
            process = subprocess.Popen(
                command, cwd=empty, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                _wait_until_healthy(process, link)
                yield link
            finally:
                stop_family(process, home)


def _access(certificates: Certificates | None) -> list[str]:
    """Arguments of a SuperLink that lets in registered keys over TLS, or anybody without it."""
    if certificates is None:
        return ["--insecure"]
    files = {"--ssl-ca-certfile": certificates.authority, "--ssl-certfile": certificates.certificate}
    named = [str(word) for pair in {**files, "--ssl-keyfile": certificates.key}.items() for word in pair]
    return [*named, "--enable-supernode-auth"]


def _write_config(link: SuperLink) -> None:
    files = link.certificates
    access = f"root-certificates = {toml(files.authority)}" if files else "insecure = true"
    (link.home / "config.toml").write_text(
        f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\n'
        f'address = "127.0.0.1:{link.port}"\n{access}\n',
        encoding="utf-8",
    )


def _wait_until_healthy(process: subprocess.Popen[bytes], link: SuperLink) -> None:
    files, deadline = link.certificates, time.monotonic() + STARTUP_SECONDS
    trust = ssl.create_default_context(cafile=files.authority) if files else True
    url = f"{'https' if files else 'http'}://127.0.0.1:{link.port}/health"
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(url, timeout=1, verify=trust).is_success:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.2)
    log = (link.logs / "superlink.log").read_text(encoding="utf-8")
    raise LaunchError(f"the SuperLink did not start; its log ends:\n{log[-2000:]}")
