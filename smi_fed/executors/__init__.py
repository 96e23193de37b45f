"""Where inversions are done: in this process, in processes of their own, or on a Ray cluster; to the same images."""

from __future__ import annotations

import torch

from smi_fed.executors.base import Executor, Here, WorkerDiedError
from smi_fed.executors.job import InversionJob, invert_stored

__all__ = ["Executor", "Here", "InversionJob", "WorkerDiedError", "invert_stored", "open_executor"]


def open_executor(
    kind: str,
    device: torch.device,
    *,
    asked: bool = True,
    workers: int = 0,
    threads: int = 1,
    ray_address: str = "",
) -> Executor:
    """The executor of that kind; close it, which ends its processes.

    Args:
        kind: here | pool | ray.
        device: see `process_pool` and `ray_cluster`.
        asked: whether somebody asked for `device`; if not, a cluster that is there uses the GPUs that it has.
        workers: inversions side by side; 0 is one a GPU, or one for every `threads` cores.
        threads: of torch in each process, the same everywhere; 0 is the number that this process has.
        ray_address: of a cluster that is there; empty starts one.

    Raises:
        SettingError: Ray is not installed, or the cluster does not answer or has other libraries.
    """
    threads = threads or torch.get_num_threads()
    if kind == "pool":
        from smi_fed.executors.processes import process_pool

        return process_pool(device, workers, threads)
    if kind == "ray":
        from smi_fed.executors.ray_cluster import ray_cluster

        return ray_cluster(device if asked or not ray_address else None, workers, threads, ray_address)
    return Here()
