"""How much a model makes of an image, seen without memory for it."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from smi_fed.checks import is_integer
from smi_fed.models import Classifier

log = logging.getLogger("smi_fed")


def grid_of(model: Classifier) -> int:
    """Patches that a model cuts an image into; 0 where it has no patch size."""
    asked: Any = model.spec.kwargs.get("patch_size")
    patch: Any = getattr(getattr(model.backbone, "patch_embed", None), "patch_size", asked)
    pair = (patch, patch) if is_integer(patch) else patch
    return 0 if pair is None else math.prod(side // p for side, p in zip(model.image_size, pair, strict=True))


class _Sizes(TorchFunctionMode):
    """Keeps the most numbers that a function of torch gave as one tensor."""

    largest = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        self.largest = max(self.largest, found.numel() if isinstance(found, Tensor) else 0)
        return found


@torch.no_grad()
def largest_tensor(shape: Classifier) -> int:
    """Numbers of the largest tensor that a model on torch's meta device makes of one image.

    Of one that does not run there it is the largest until it stopped.
    """
    sizes = _Sizes()
    try:
        with sizes:
            shape.eval()(shape.mean.new_empty(1, len(shape.mean), *shape.image_size))
    except Exception:  # `check_output` tells what a model does not take
        log.debug("%s does not run on the meta device", shape.spec.name, exc_info=True)
    return sizes.largest
