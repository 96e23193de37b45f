"""Inversions in processes of their own, started afresh: a fork would take over the threads of gRPC."""

from __future__ import annotations

import logging
import multiprocessing
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from smi_fed.devices import usable_cores
from smi_fed.executors import worker
from smi_fed.executors.base import Closing, WorkerDiedError
from smi_fed.executors.job import InversionJob, Show
from smi_fed.inversion import InversionProgress
from smi_fed.pipeline import InversionRecord

log = logging.getLogger("smi_fed")

SPAWN = multiprocessing.get_context("spawn")

TRIES = 2
"""How often a job is done whose worker dies."""

GRACE = 10.0
"""Seconds that a process gets to end by itself."""


@dataclass(eq=False)
class _Task:
    """A job on its way."""

    job: InversionJob
    show: Show
    future: Future[InversionRecord] = field(default_factory=Future)
    tries: int = 0


@dataclass(eq=False)
class _Child:
    """One process, and after its death the next one in its place; `room` is 0 until it is ready."""

    arguments: tuple[Any, ...]
    process: BaseProcess = None  # type: ignore[assignment]
    connection: Connection = None  # type: ignore[assignment]
    listener: threading.Thread = None  # type: ignore[assignment]
    room: int = 0
    in_hand: dict[int, _Task] = field(default_factory=dict)
    ready: Future[int] = field(default_factory=Future)


class Processes(Closing):
    """An executor over processes, each of which takes as many jobs at a time as it says when it is ready.

    Whose process dies is done once more, from its checkpoint, by the next one. What a process says is heard by a
    thread of its own, so nobody has to ask.

    Args:
        work: what a process does, see `worker`.
        arguments: of `work` in each process.
    """

    def __init__(self, work: Callable[..., None], arguments: Sequence[tuple[Any, ...]]) -> None:
        self._work, self._lock, self._closed = work, threading.RLock(), False
        self._waiting: deque[_Task] = deque()
        self._numbers = 0
        self._children = [_Child(each) for each in arguments]
        for child in self._children:
            self._start(child)

    def submit(self, job: InversionJob, show: Show) -> Future[InversionRecord]:
        """See `Executor`."""
        task = _Task(job, show)
        with self._lock:
            if self._closed:
                raise RuntimeError("an executor that is closed takes no jobs")
            self._waiting.append(task)
            self._hand_out()
        return task.future

    def wait_ready(self, seconds: float) -> None:
        """Until every process can work.

        Raises:
            TimeoutError: not in time.
            Exception: what a process that cannot says of it.
        """
        for child in list(self._children):
            child.ready.result(seconds)

    def close(self) -> None:
        """See `Executor`."""
        with self._lock:
            self._closed = True
            for task in [*self._waiting, *(task for child in self._children for task in child.in_hand.values())]:
                task.future.cancel()
            self._waiting.clear()
        for child in self._children:
            if child.room or not child.ready.done():  # who refused ends by itself
                child.process.terminate()
        for child in self._children:
            child.process.join(GRACE)
            child.process.kill()
            child.process.join()
            child.listener.join()
            child.connection.close()

    def _start(self, child: _Child) -> None:
        child.connection, theirs = SPAWN.Pipe()
        child.process = SPAWN.Process(
            target=worker.main, args=(self._work, theirs, *child.arguments), name="smi-fed-inversion", daemon=True
        )
        child.process.start()
        theirs.close()  # so that the connection ends with the process
        child.listener = threading.Thread(target=self._listen, args=(child, child.connection), daemon=True)
        child.listener.start()

    def _hand_out(self) -> None:
        for child in self._children:
            while self._waiting and len(child.in_hand) < child.room:
                task, self._numbers = self._waiting.popleft(), self._numbers + 1
                child.in_hand[self._numbers] = task
                with suppress(OSError):  # it died: the listener hears of it
                    child.connection.send((self._numbers, task.job))
        if not self._children:
            while self._waiting:
                self._waiting.popleft().future.set_exception(WorkerDiedError("no process is left that can invert"))

    def _listen(self, child: _Child, connection: Connection) -> None:
        with suppress(EOFError, OSError):
            while True:
                self._hear(child, *connection.recv())
        child.process.join()
        with self._lock, suppress(InvalidStateError):
            if not self._closed:
                self._bury(child)

    def _hear(self, child: _Child, kind: str, number: int, value: Any) -> None:
        if kind == "log":
            if log.isEnabledFor(value.levelno):
                log.handle(value)
        elif kind == "refused":
            child.ready.set_exception(value)
        elif kind == "progress":
            _show(child.in_hand[number], value)
        else:
            with self._lock, suppress(InvalidStateError):  # cancelled by `close`
                if kind == "ready":
                    child.room = value
                    if not child.ready.done():
                        child.ready.set_result(value)
                else:
                    future = child.in_hand.pop(number).future
                    future.set_result(value) if kind == "done" else future.set_exception(value)
                self._hand_out()

    def _bury(self, child: _Child) -> None:
        """A process died: what it had in hand is done once more, by the one that takes its place."""
        how = _how(child.process.exitcode)
        for task in child.in_hand.values():
            task.tries += 1
            name = task.job.teacher.name
            if task.tries < TRIES:
                log.warning("the inversion of %s is tried once more: its process %s", name, how)
                self._waiting.appendleft(task)
            else:
                task.future.set_exception(WorkerDiedError(f"its inversion failed twice: the process {how}"))
        child.in_hand.clear()
        if child.room:
            child.room = 0
            self._start(child)
        else:
            self._children.remove(child)
            child.connection.close()
            if not child.ready.done() or child.ready.exception() is None:  # it did not say why
                log.warning("a process %s before it could work: its place stays empty", how)
            if not child.ready.done():
                child.ready.set_exception(WorkerDiedError(f"the process {how} before it could work"))
        self._hand_out()


def _show(task: _Task, now: InversionProgress) -> None:
    try:
        task.show(now)
    except Exception:  # who listens to a process must not end for a bar
        log.warning("the progress of %s cannot be shown", task.job.teacher.name, exc_info=True)


def _how(status: int | None) -> str:
    """How a process ended, in words."""
    if status is None or status >= 0:
        return f"ended with status {status}"
    return f"was killed by signal {-status}" + (", as when memory runs out" if status == -9 else "")


def process_pool(device: torch.device, workers: int, threads: int) -> Processes:
    """Processes on this machine, each with its own device and `threads` threads of torch.

    Args:
        device: `cuda` is every GPU in turn; one with a number, or the CPU, is shared.
        workers: how many; 0 is one a GPU, or one for every `threads` cores.
    """
    devices = devices_of(device)
    count = workers or default_workers(device, threads)
    sharing = -(-count // len(devices))
    return Processes(worker.work_alone, [(devices[place % len(devices)], threads, sharing) for place in range(count)])


def devices_of(device: torch.device) -> list[torch.device]:
    """What `device` means for several processes."""
    every = device.type == "cuda" and device.index is None
    return [torch.device("cuda", place) for place in range(torch.cuda.device_count())] if every else [device]


def default_workers(device: torch.device, threads: int) -> int:
    """One a GPU, or one for every `threads` cores that this process may use, at least 1."""
    if device.type == "cuda":
        return len(devices_of(device))
    return max(1, usable_cores() // threads)
