"""Flower's processes on this machine: their commands and ports, and their end with all that they started."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil


class LaunchError(RuntimeError):
    """A Flower process did not do what it should; the message says where its log is."""


def tool(name: str) -> str:
    """The command of this environment, not one of another on the path."""
    return str(Path(sys.executable).parent / name)


def free_port() -> int:
    """A TCP port on loopback that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def stop_family(process: subprocess.Popen[bytes], home: Path, patience: float = 10) -> None:
    """End a process that we started and all that it started, politely at first.

    Flower starts the ServerApp and Ray in sessions of their own, and some of them outlive
    their parent; but each has a private FLWR_HOME, `home` or one inside it, in its environment.
    Some of Ray's write their title over it: they are known as children as long as they have their parent.
    """
    members: set[psutil.Process] = set()
    for ask in (psutil.Process.terminate, psutil.Process.kill):
        members |= _family(process, home)
        for member in members:
            with suppress(psutil.NoSuchProcess):
                ask(member)
        psutil.wait_procs(members, timeout=patience)
    process.wait()


def _family(process: subprocess.Popen[bytes], home: Path) -> set[psutil.Process]:
    heads = []
    with suppress(psutil.NoSuchProcess):
        heads.append(psutil.Process(process.pid))
    for each in psutil.process_iter():
        with suppress(psutil.Error):
            theirs = each.environ().get("FLWR_HOME")
            if each.pid != os.getpid() and theirs and Path(theirs).is_relative_to(home):
                heads.append(each)
    members = set(heads)
    for head in heads:
        with suppress(psutil.NoSuchProcess):
            members.update(head.children(recursive=True))
    return members
