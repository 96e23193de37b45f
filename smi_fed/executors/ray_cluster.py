"""Inversions on a Ray cluster: one of this run's own, or one that is there, which may be many machines.

Ray lives in a process of its own, since the one of a simulation's server has that simulation's cluster, whose actors
hold every core. On a cluster that is there no file is shared: the teacher's bytes go to the worker and those of the
images come back, and so does this package's code.
"""

from __future__ import annotations

import os
import platform
import signal
import socket
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import torch

from smi_fed.checks import SettingError, require
from smi_fed.executors import worker
from smi_fed.executors.base import WorkerDiedError
from smi_fed.executors.job import InversionJob
from smi_fed.executors.processes import Processes, default_workers, devices_of
from smi_fed.files import replacing

START = 180.0
"""Seconds until a cluster has to be there."""

KNOCK = 10.0
"""Seconds until whoever listens at an address has to take the connection."""

PATIENCE = 3.0
"""Seconds that the processes of an own cluster have to end by themselves; less than an executor waits for this one."""

LOOK = 0.2
"""Seconds between two looks at what is done."""

STORE = 100 * 2**20
"""Bytes of the object store of an own cluster, through which only small things go."""

LIBRARIES = ("torch", "timm")
"""Whose versions decide the images, beside Python's and Ray's, which Ray compares."""


def ray_cluster(device: torch.device | None, workers: int, threads: int, address: str = "") -> Processes:
    """An executor over Ray.

    Args:
        device: of a cluster of its own as in `process_pool`; elsewhere only its kind counts, a worker with a GPU gets a
            whole one, and None is a GPU where the cluster has any.
        workers: side by side; 0 is as many as there are GPUs, or groups of `threads` cores.
        address: `host:port` where this machine belongs to the cluster, `ray://host:port` where it does not; empty
            starts one on this machine, which ends with the executor.

    Raises:
        SettingError: Ray is not installed, or no cluster is there in time that has the same libraries.
    """
    require(find_spec("ray") is not None, "server.executor", "ray", "here | pool, or install ray")
    if address:
        _knock(address)
    executor = Processes(drive, [(device, workers, threads, address)])
    try:
        executor.wait_ready(START)
    except BaseException as error:
        executor.close()
        if not isinstance(error, TimeoutError | WorkerDiedError):
            raise
        why = f"it did not within {START:.0f} s" if isinstance(error, TimeoutError) else str(error)
        raise _refusal(address, why) from error
    return executor


def _knock(address: str) -> None:
    """Somebody has to listen there: Ray itself tries for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=KNOCK).close()
    except (OSError, OverflowError) as error:
        raise _refusal(address, str(error)) from error


def _refusal(address: str, why: str) -> SettingError:
    key = "server.ray_address" if address else "server.executor"
    return SettingError(key, address or "ray", f"a Ray cluster that answers ({why})")


@dataclass(frozen=True)
class _Place:
    """Where and how a task works."""

    device: torch.device
    threads: int
    sharing: int


class _Cluster:
    """A connected cluster, what a task asks of it, and how many tasks it takes at a time."""

    def __init__(self, device: torch.device | None, workers: int, threads: int, address: str) -> None:
        import ray
        from ray.util.queue import Queue

        self.ray, self.address = ray, address
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
        if address:
            ray.init(address, runtime_env={"py_modules": [str(Path(__file__).parents[1])]}, **quiet)
            self._join(device, workers, threads)
        else:
            assert device is not None
            self.room = workers or default_workers(device, threads)
            gpus = len(devices_of(device)) if device.type == "cuda" else 0
            ray.init(
                "local", num_cpus=self.room * threads, num_gpus=gpus, include_dashboard=False,
                object_store_memory=STORE, **quiet,
            )  # fmt: skip
            self._ask_for(device.type, threads, min(1.0, gpus / self.room))
        self.queue = Queue(actor_options={"num_cpus": 0})

    def _join(self, device: torch.device | None, workers: int, threads: int) -> None:
        """How a cluster that is there is used.

        Raises:
            SettingError: it has no room, or other libraries.
        """
        resources = self.ray.cluster_resources()
        kind = ("cuda" if resources.get("GPU") else "cpu") if device is None else device.type
        self.room = workers or int(resources.get("GPU", 0) if kind == "cuda" else resources.get("CPU", 0) // threads)
        allowed = f"a cluster with {'a GPU' if kind == 'cuda' else f'{threads} cores'}"
        require(self.room > 0, "server.ray_address", self.address, allowed)
        self._ask_for(kind, threads, 1.0 if kind == "cuda" else 0.0)
        theirs, own = self.ray.get(self.begin(_versions)), _versions()
        differing = [f"{name} {own[name]} and not {theirs[name]}" for name in own if theirs[name] != own[name]]
        require(not differing, "server.ray_address", self.address, f"a cluster with {', '.join(differing)}")

    def _ask_for(self, kind: str, threads: int, gpus: float) -> None:
        """What a task gets. Ray shows it no GPU but its own."""
        nodes = sum(node["Alive"] for node in self.ray.nodes())
        sharing = -(-1 // gpus) if gpus else -(-self.room // nodes)
        self.place = _Place(torch.device(kind), threads, int(sharing))
        self.options = {"num_cpus": threads, "num_gpus": gpus, "max_retries": 1}

    def begin(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """A task that begins when there is room for it."""
        return self.ray.remote(**self.options)(function).remote(*arguments)

    def submit(self, number: int, job: InversionJob) -> Any:
        """The task of a job."""
        return self.begin(_invert, number, job, self.place, self.queue, _files(job) if self.address else None)

    def told(self) -> list[worker.Message]:
        """What tasks sent since the last look; progress may get lost with a machine."""
        with suppress(self.ray.exceptions.RayError):
            return self.queue.get_nowait_batch(self.queue.qsize())
        return []

    def done(self, references: list[Any]) -> list[Any]:
        """Those that are done."""
        return self.ray.wait(references, num_returns=len(references), timeout=0)[0]

    def result(self, reference: Any, number: int, job: InversionJob) -> worker.Message:
        """What became of a job that is done; its images are on disk."""
        try:
            kind, number, value = self.ray.get(reference)
        except self.ray.exceptions.RayTaskError as error:
            return "failed", number, RuntimeError(str(error))
        except self.ray.exceptions.RayError as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            return "failed", number, WorkerDiedError(f"its inversion failed twice: {lines[0]}")
        if kind == "done" and self.address:
            value, images = value
            try:
                with replacing(job.images) as part:
                    part.write_bytes(images)
            except OSError as error:
                return "failed", number, worker.travelling(error)
        return kind, number, value


def drive(connection: Connection, device: torch.device | None, workers: int, threads: int, address: str) -> None:
    """The process that Ray lives in: hands jobs on to a cluster until the connection ends."""
    os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))  # an own cluster's workers import from there
    try:
        cluster = _Cluster(device, workers, threads, address)
    except SettingError as error:
        connection.send(("refused", 0, error))
        return
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        connection.send(("refused", 0, _refusal(address, first)))
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # Ray's own prints a stack
    connection.send(("ready", 0, cluster.room))
    try:
        _hand_on(connection, cluster)
    finally:
        started = psutil.Process().children(recursive=True)  # of a cluster of its own; some stay when it ends
        cluster.ray.shutdown()
        for each in psutil.wait_procs(started, timeout=PATIENCE)[1]:
            with suppress(psutil.NoSuchProcess):
                each.kill()


def _hand_on(connection: Connection, cluster: _Cluster) -> None:
    in_hand: dict[Any, tuple[int, InversionJob]] = {}
    with suppress(EOFError, BrokenPipeError):
        while True:
            while connection.poll(LOOK if in_hand else None):
                number, job = connection.recv()
                try:
                    in_hand[cluster.submit(number, job)] = number, job
                except OSError as error:  # a file of the job's
                    connection.send(("failed", number, worker.travelling(error)))
            done = cluster.done(list(in_hand))  # before the look at what they sent, which they did before
            at_work = {number for number, _ in in_hand.values()}
            for message in cluster.told():
                if message[0] != "progress" or message[1] in at_work:
                    connection.send(message)
            for reference in done:
                connection.send(cluster.result(reference, *in_hand.pop(reference)))


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}}


def _files(job: InversionJob) -> tuple[bytes, bytes | None]:
    return job.teacher.path.read_bytes(), None if job.last is None else job.last.path.read_bytes()


def _invert(
    number: int, job: InversionJob, place: _Place, queue: Any, files: tuple[bytes, bytes | None] | None
) -> worker.Message:
    """What a Ray worker does: the job as it is where its files are here, else among files of its own."""

    def send(message: worker.Message) -> None:
        with suppress(Exception):  # nobody's inversion ends for want of a listener
            queue.put_nowait(message)

    worker.prepare(send, place.threads, place.sharing)
    job = worker.on_device(job, place.device)
    if files is None:
        return worker.outcome(number, job, send)
    with tempfile.TemporaryDirectory(prefix="smi-fed-") as directory:
        moved = _unpacked(job, files, Path(directory))
        kind, _, value = worker.outcome(number, moved, send)
        return kind, number, (value, moved.images.read_bytes()) if kind == "done" else value


def _unpacked(job: InversionJob, files: tuple[bytes, bytes | None], directory: Path) -> InversionJob:
    """The job with its files in `directory`."""
    teacher, last = files
    (directory / "teacher").write_bytes(teacher)
    if last is not None:
        (directory / "last").write_bytes(last)
    return replace(
        job, teacher=replace(job.teacher, path=directory / "teacher"), images=directory / "images.safetensors",
        checkpoint=directory / "checkpoint", last=job.last and replace(job.last, path=directory / "last"),
    )  # fmt: skip
