"""Where to compute."""

from __future__ import annotations

import os

import torch

from smi_fed.checks import require


def usable_cores() -> int:
    """Logical cores that this process may use, at least 1."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def own_threads() -> int:
    """How many threads torch is given in a process that was told no number, at least 1.

    OMP_NUM_THREADS where it is a number: Ray sets it to the cores of an actor, and a node's owner can. Else half of
    the usable cores. Two logical cores are mostly one real one; and a server's student takes its steps beside a
    thread that makes the next ones' lessons, each with so many.
    """
    said = os.environ.get("OMP_NUM_THREADS", "")
    return max(1, int(said)) if said.isdecimal() else max(1, usable_cores() // 2)


def choose_device(name: str = "auto", key: str = "device") -> tuple[torch.device, str]:
    """(device, the reason for it in words).

    Args:
        key: of the setting, for messages.

    Raises:
        SettingError: a device that is unknown or not there.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda"), f"CUDA is available ({torch.cuda.get_device_name()})"
        if torch.backends.mps.is_available():
            return torch.device("cpu"), "no CUDA device; Apple's MPS lacks float64, which the random draws need"
        return torch.device("cpu"), "no CUDA device is available"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    require(device is not None and device.type in ("cpu", "cuda"), key, name, "auto | cpu | cuda | cuda:N")
    assert device is not None
    there = device.type == "cpu" or (torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count())
    require(there, key, name, "a device that this machine has (auto chooses one)")
    return device, "asked for by the configuration"
