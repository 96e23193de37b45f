"""A real Ray cluster of several nodes on this machine, as one starts it on machines of their own."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from simulations.processes import LaunchError, free_port, stop_family, tool

PATIENCE = 60.0
"""Seconds until a node has to be there."""

HEAD = "127.0.0.1"


class Addresses(NamedTuple):
    """Where a cluster is found: from one of its machines, and from elsewhere."""

    inside: str
    outside: str


@contextmanager
def ray_nodes(count: int = 1, cores: int = 1) -> Iterator[Addresses]:
    """A cluster of `count` nodes with so many cores each, every one at a loopback address of its own.

    Raises:
        LaunchError: a node is not there in time.
    """
    port, client = free_port(), free_port()
    with ExitStack() as stack:
        place = tempfile.mkdtemp(prefix="ray")  # sockets need a short path
        stack.callback(shutil.rmtree, place, ignore_errors=True)
        shared = [f"--num-cpus={cores}", "--object-store-memory=100000000", "--disable-usage-stats"]
        head = ["--head", f"--port={port}", f"--ray-client-server-port={client}", f"--temp-dir={place}"]
        head += [f"--node-ip-address={HEAD}", "--include-dashboard=false"]
        stack.enter_context(_node([*head, *shared], place))
        for each in (port, client):
            _until(lambda at=each: not socket.socket().connect_ex((HEAD, at)), "the head does not listen")
        for number in range(2, count + 1):
            other = [f"--address={HEAD}:{port}", f"--node-ip-address=127.0.0.{number}"]
            stack.enter_context(_node([*other, *shared], place))
        _until(lambda: _alive(f"{HEAD}:{port}", place) == count, f"there are not {count} nodes")
        yield Addresses(f"{HEAD}:{port}", f"ray://{HEAD}:{client}")


@contextmanager
def _node(words: list[str], place: str) -> Iterator[None]:
    command, home = [tool("ray"), "start", "--block", *words], Path(tempfile.mkdtemp(dir=place))
    env = {**os.environ, "FLWR_HOME": str(home)}  # by which `stop_family` knows what it started
    with (home / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=home, env=env, start_new_session=True)
    try:
        yield
    finally:
        stop_family(process, home)


def _alive(address: str, place: str) -> int:
    words = [tool("ray"), "status", f"--address={address}"]
    said = subprocess.run(words, capture_output=True, text=True, cwd=place, check=False).stdout
    return said.partition("Pending")[0].count(" node_")


def _until(happened: Callable[[], bool], why: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not happened():
        if time.monotonic() > deadline:
            raise LaunchError(f"a Ray cluster did not start in {PATIENCE:.0f} s: {why}")
        time.sleep(0.2)
