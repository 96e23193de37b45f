"""Where to compute."""

from __future__ import annotations

import torch

from smi_fed.checks import require


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
