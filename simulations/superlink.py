"""A SuperLink of one's own: private home, free ports, an empty directory, and gone at the end."""

from __future__ import annotations

import json
import math
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import torch

PROJECT = Path(__file__).resolve().parent.parent
STARTUP_SECONDS = 90
CONNECTION = "smi-fed"

QUIET = {
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",  # else each run installs torch into an environment of its own
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # Ray's new default, said aloud: otherwise it warns
    "HF_HUB_OFFLINE": "1",
}


class LaunchError(RuntimeError):
    """A Flower process did not do what it should; the message says where its log is."""


@dataclass(frozen=True)
class SuperLink:
    """A running SuperLink.

    Attributes:
        port: of its HTTP API on 127.0.0.1.
        home: its private FLWR_HOME, where logs are.
        env: environment for `flwr` commands against it.
    """

    port: int
    home: Path
    env: Mapping[str, str]

    def run(self, overrides: str, output: Path, supernodes: int | None = None) -> str:
        """`flwr run` of this project, its log on our standard output; returns the run's final status.

        Args:
            overrides: Hydra overrides.
            output: absolute artefact directory.
            supernodes: of a simulation; None for separate SuperNodes.
        """
        command = [_tool("flwr"), "run", str(PROJECT), CONNECTION, "--stream"]
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
        return self.status()

    def status(self) -> str:
        """Status of the newest run, such as finished:completed; `flwr run` itself exits 0 either way."""
        command = [_tool("flwr"), "ls", CONNECTION, "--format", "json"]
        found = subprocess.run(command, env=dict(self.env), capture_output=True, text=True, check=False)
        try:
            runs = json.loads(found.stdout[found.stdout.index("{") :])["runs"]
        except (ValueError, KeyError) as error:
            raise LaunchError(f"flwr ls said: {found.stdout}{found.stderr}") from error
        return str(runs[0]["status"]) if runs else "never started"


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
def superlink(simulation: bool = True, extra_env: Mapping[str, str] | None = None) -> Iterator[SuperLink]:
    """Start a SuperLink on free loopback ports; stop it and all it started at the end, whatever happens.

    Raises:
        LaunchError: it does not answer in time.
    """
    with tempfile.TemporaryDirectory(prefix="smi-fed-", ignore_cleanup_errors=True) as scratch:
        home, empty = Path(scratch) / "home", Path(scratch) / "empty"
        home.mkdir()
        empty.mkdir()  # a foreign `server` package in its directory would win over ours
        port = free_port()
        _write_config(home, port)
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
        env = {**os.environ, **QUIET, "FLWR_HOME": str(home), "PATH": path, **(extra_env or {})}
        command = [_tool("flower-superlink"), "--insecure", "--host", "127.0.0.1", "--port", str(port)]
        command += ["--simulation"] if simulation else []
        with (home / "superlink.log").open("w") as log:
            process = subprocess.Popen(
                command, cwd=empty, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                _wait_until_healthy(process, port, home / "superlink.log")
                yield SuperLink(port, home, env)
            finally:
                stop_family(process, home)


def supernode(link: SuperLink, number: int, node_config: Mapping[str, str | int | float]) -> subprocess.Popen[bytes]:
    """Start a SuperNode of any node config on this machine; its log is supernode<number>.log in the link's home."""
    config = " ".join(f"{key}={toml(value) if isinstance(value, str) else value}" for key, value in node_config.items())
    command = [_tool("flower-supernode"), "--insecure", "--superlink", f"127.0.0.1:{link.port}"]
    command += ["--node-config", config, "--port", str(free_port())]
    with (link.home / f"supernode{number}.log").open("w") as log:
        return subprocess.Popen(
            command, env=dict(link.env), cwd=link.home, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )


def _write_config(home: Path, port: int) -> None:
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\n'
        f'address = "127.0.0.1:{port}"\ninsecure = true\n',
        encoding="utf-8",
    )


def _wait_until_healthy(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + STARTUP_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(f"http://127.0.0.1:{port}/health", timeout=1).is_success:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.2)
    raise LaunchError(f"the SuperLink did not start; its log ends:\n{log.read_text()[-2000:]}")


def stop_family(process: subprocess.Popen[bytes], home: Path, patience: float = 10) -> None:
    """End a process that we started and all that it started, politely at first.

    Flower starts the ServerApp and Ray in sessions of their own, and some of them outlive
    their parent; but every one of them has our private FLWR_HOME in its environment.
    """
    for ask in (psutil.Process.terminate, psutil.Process.kill):
        members = _family(process, home)
        for member in members:
            with suppress(psutil.NoSuchProcess):
                ask(member)
        psutil.wait_procs(members, timeout=patience)
    process.wait()


def _family(process: subprocess.Popen[bytes], home: Path) -> list[psutil.Process]:
    members = {}
    with suppress(psutil.NoSuchProcess):
        first = psutil.Process(process.pid)
        members = {each.pid: each for each in (first, *first.children(recursive=True))}
    for each in psutil.process_iter():
        with suppress(psutil.Error):
            if each.pid != os.getpid() and each.environ().get("FLWR_HOME") == str(home):
                members[each.pid] = each
    return list(members.values())


def free_port() -> int:
    """A TCP port on loopback that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _tool(name: str) -> str:
    """The command of this environment, not one of another on the path."""
    return str(Path(sys.executable).parent / name)
