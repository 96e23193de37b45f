"""What one case takes: seconds of this process, and bytes beyond those that were there before it.

Bytes are the largest resident size while it ran, which sees numpy, torch and Rust alike, and growth of the address
space, which sees what is asked for and never touched. `exact` lets the allocator give back at once, so that memory
which an earlier case left does not hide what the next one takes.
"""

import ctypes
import os
import sys
import time
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

FORBIDDEN = (
    "pickle.find_class", "socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.system", "os.exec",
    "os.posix_spawn",
)  # fmt: skip
"""What the interpreter tells of, and no case may do: unpickle, reach for a network, start a program."""

PAGE = os.sysconf("SC_PAGE_SIZE")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
SMALLEST = 64 * 1024
ARENA = 128 * 2**20
"""Of the address space, what a new thread's allocator reserves."""


def exact() -> None:
    """Every allocation from 64 KiB on goes back to the system when it is freed; for the rest of this process."""
    libc = ctypes.CDLL(None)
    for name, value in ((M_MMAP_THRESHOLD, SMALLEST), (M_TRIM_THRESHOLD, SMALLEST), (M_ARENA_MAX, 1)):
        if libc.mallopt(name, value) != 1:
            raise OSError("this libc does not take mallopt")


@dataclass
class Taken:
    """Of one case; `done` has what of `FORBIDDEN` it did."""

    seconds: float = 0.0
    memory: int = 0
    done: list[str] = field(default_factory=list)


_watched: list[Taken] = []


def _audit(event: str, arguments: tuple) -> None:
    if _watched and event in FORBIDDEN:
        _watched[-1].done.append(f"{event} {str(arguments)[:100]}")


@cache
def _listen() -> None:
    """Once for a process: the interpreter lets nobody take it back."""
    sys.addaudithook(_audit)


class Meter:
    """Measures the block that it stands around; needs Linux."""

    def __init__(self) -> None:
        _listen()

    def __enter__(self) -> Taken:
        self.taken = Taken()
        Path("/proc/self/clear_refs").write_text("5")  # the largest resident size begins anew
        self.peak = _status()[1]  # of the address space; it stays for the process's whole life
        size, resident = Path("/proc/self/statm").read_text().split()[:2]
        self.size, self.resident = int(size) * PAGE, int(resident) * PAGE
        _watched.append(self.taken)
        self.started = time.process_time()
        return self.taken

    def __exit__(self, *_) -> None:
        self.taken.seconds = time.process_time() - self.started
        _watched.pop()
        resident, size = _status()
        asked = size - self.size - ARENA if size > self.peak else 0
        self.taken.memory = max(0, resident - self.resident, asked)


def _status() -> tuple[int, int]:
    """Largest resident size and largest address space, in bytes."""
    found = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        key, _, value = line.partition(":")
        if key in ("VmHWM", "VmPeak"):
            found[key] = int(value.split()[0]) * 1024
    return found["VmHWM"], found["VmPeak"]
