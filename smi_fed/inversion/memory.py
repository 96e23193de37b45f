"""How many images fit on a device at once."""

from __future__ import annotations

import torch
from torch import Tensor

from smi_fed.inversion.loop import objective, start
from smi_fed.inversion.losses import neighbours
from smi_fed.inversion.problem import Problem

SHARE = 0.8
"""Of the free memory that `auto` plans with; halving a batch that does not fit costs more than a smaller batch."""

PROCESSES = 1
"""That share the memory of a device, each with a part of what is free: those beside this one, and itself."""

LARGEST = {"cpu": 32, "cuda": 512}
"""Past this a larger batch makes no image cheaper: on CPU the caches, on a GPU the multiprocessors are full."""

TEMPORARY = 1.5
"""Peak over what is saved for the backward pass: gradients and workspace of the layers in hand."""


def free_bytes(device: torch.device) -> int:
    """Memory that this process can still take on `device`; on a GPU with what torch holds but does not use."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    import psutil

    return psutil.virtual_memory().available


def fitting_batch(problem: Problem, targets: Tensor) -> int:
    """Images to optimise together: as many as fit, in batches of equal size."""
    device = problem.teacher.mean.device
    try:
        fitting = int(SHARE * free_bytes(device) / PROCESSES) // bytes_per_image(problem, targets[:1])
    except torch.OutOfMemoryError:  # not even the two images that the count takes
        return 1
    most = max(1, min(fitting, LARGEST.get(device.type, LARGEST["cpu"]), len(targets)))
    return -(-len(targets) // -(-len(targets) // most))


def bytes_per_image(problem: Problem, target: Tensor) -> int:
    """What one more image takes in its most expensive iteration, the dense one.

    Counted, not estimated: the storages that autograd saves for the backward pass, for two
    images less those for one, and the images' own pixels, moments and canvas.

    Args:
        target: of one image, (1,) or (1, classes).
    """
    one, two = (_bytes_of(problem, torch.cat([target] * images)) for images in (1, 2))
    return two - one


def _bytes_of(problem: Problem, targets: Tensor) -> int:
    state = start(problem, torch.arange(len(targets), device=targets.device), targets)
    for parameter in state.parameters.values():
        parameter.requires_grad_()
    storages: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        objective(problem, state, neighbours(state.kept, problem.teacher.grid))
    return round(TEMPORARY * sum(storages.values())) + sum(t.nbytes for t in state.tensors().values())
