"""The side of the process that works: what it sends to the one that asked, and how it ends with it.

A message is (kind, number of the job, value): ready (how many jobs at a time), refused (why it cannot work),
progress, log, done, failed.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from logging.handlers import QueueHandler
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from queue import SimpleQueue
from typing import Any

import torch

from smi_fed.executors.job import InversionJob, invert_stored
from smi_fed.inversion import InversionProgress, memory

log = logging.getLogger("smi_fed")

Message = tuple[str, int, Any]
Send = Callable[[Message], None]

INTERVAL = 0.5
"""Seconds between two messages of one inversion's progress."""


def main(work: Callable[..., None], connection: Connection, *arguments: Any) -> None:
    """A process that does `work`, and ends when the one that started it does, however that ended."""
    os.setsid()  # Ctrl-C of a terminal is for the one that asked; and many a scheduler is fair to sessions
    threading.Thread(target=_end_with_parent, daemon=True).start()
    work(connection, *arguments)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)  # at once, unless the work has something to put away


def work_alone(connection: Connection, device: torch.device, threads: int, sharing: int) -> None:
    """Do one job at a time on `device`, until the connection ends."""
    prepare(connection.send, threads, sharing)
    connection.send(("ready", 0, 1))
    while True:
        try:
            number, job = connection.recv()
        except EOFError:
            return
        connection.send(outcome(number, on_device(job, device), connection.send))


def prepare(send: Send, threads: int, sharing: int) -> None:
    """Settings of a process that works: torch's threads, how many share its memory, and where its log goes."""
    torch.set_num_threads(threads)
    memory.PROCESSES = sharing
    log.handlers[:], log.propagate = [_Sending(send)], False
    log.setLevel(logging.INFO)


class _Sending(QueueHandler):
    """Sends what is logged."""

    def __init__(self, send: Send) -> None:
        super().__init__(SimpleQueue())
        self.send = send

    def enqueue(self, record: logging.LogRecord) -> None:
        """Not to a queue."""
        self.send(("log", 0, record))


def on_device(job: InversionJob, device: torch.device) -> InversionJob:
    """The job with its teacher on this process's device."""
    return replace(job, teacher=replace(job.teacher, device=device))


def outcome(number: int, job: InversionJob, send: Send) -> Message:
    """Do a job; the message that tells what became of it."""
    try:
        return "done", number, invert_stored(job, _NowAndThen(number, send))
    except Exception as error:
        return "failed", number, travelling(error)


class _NowAndThen:
    """Sends progress at each tenth and every `INTERVAL` seconds, with numbers in place of tensors."""

    def __init__(self, number: int, send: Send) -> None:
        self.number, self.send = number, send
        self.tenth, self.sent = -1, 0.0

    def __call__(self, now: InversionProgress) -> None:
        tenth, since = 10 * now.done // max(1, now.total), time.monotonic() - self.sent
        if tenth > self.tenth or since >= INTERVAL:
            self.tenth, self.sent = tenth, time.monotonic()
            self.send(("progress", self.number, replace(now, loss=float(now.loss), spent={})))


def travelling(error: Exception) -> Exception:
    """The error as the other side can read it, with the traceback of this side as a note."""
    error.add_note(f"in a worker:\n{traceback.format_exc()}")
    try:
        ForkingPickler.loads(ForkingPickler.dumps(error))  # type: ignore[attr-defined]
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}\n{traceback.format_exc()}")
    return error
