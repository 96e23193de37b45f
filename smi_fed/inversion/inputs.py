"""What `invert` is given, checked before any work."""

from __future__ import annotations

import torch
from torch import Tensor

from smi_fed.inversion.batch_norm import batch_norms
from smi_fed.inversion.config import InversionConfig
from smi_fed.inversion.losses import FeatureStatistics, check_statistics
from smi_fed.inversion.teacher import Teacher
from smi_fed.sparse_images import SparseImages


def check_targets(targets: Tensor, classes: int) -> Tensor:
    """Targets as int64 (b,) or float (b, classes).

    Raises:
        ValueError: empty, of the wrong kind or shape, or out of the model's range.
    """
    what = f"targets: got {targets.dtype} of shape {tuple(targets.shape)}"
    if targets.numel() == 0:
        raise ValueError(f"{what}, allowed: at least one target")
    if targets.ndim == 2 and targets.is_floating_point() and targets.shape[1] == classes:
        if not bool(((targets >= 0) & (targets <= 1)).all()):
            raise ValueError(f"{what} with values outside [0, 1], allowed: labels in [0, 1]")
        return targets
    if targets.ndim != 1 or targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise ValueError(f"{what}, allowed: integers (b,), or floats (b, {classes}) for multi-label models")
    if classes == 1:
        raise ValueError(
            f"{what} for a model of one class, of which softmax always says 1; allowed: floats (b, 1) in [0, 1], 1 "
            "for the class and 0 for none"
        )
    low, high = int(targets.min()), int(targets.max())
    if low < 0 or high >= classes:
        raise ValueError(f"targets: got classes from {low} to {high}, allowed: 0 to {classes - 1}")
    return targets.long()


def check_warm(teacher: Teacher, warm: SparseImages | None, count: int) -> None:
    """Refuse images that cannot be where this inversion starts.

    Raises:
        ValueError: of another size, or of ids that the inversion does not have.
    """
    if warm is None:
        return
    expected = (teacher.channels, *(side * patch for side, patch in zip(teacher.grid, teacher.patch_size, strict=True)))
    shape = tuple(warm.images.shape[1:])
    if shape != expected:
        raise ValueError(f"warm: got images of {shape}, allowed: {expected}")
    ids = warm.ids.tolist()
    if len(set(ids)) != len(ids) or any(not 0 <= each < count for each in ids):
        raise ValueError(f"warm: got ids {sorted(ids)[:3]}..., allowed: different ones from 0 to {count - 1}")


def check_prior(teacher: Teacher, config: InversionConfig, statistics: FeatureStatistics | None) -> None:
    """Refuse statistics, or their absence, where they do not fit teacher and settings.

    Raises:
        ValueError: saying what was got and what is allowed.
    """
    if config.batchnorm and not batch_norms(teacher.backbone):
        raise ValueError(
            f"batchnorm: got weight {config.batchnorm} for a model without BatchNorm that keeps running statistics, "
            "allowed: 0 there"
        )
    if config.statistics == 0:
        return
    if teacher.prefix_tokens < 0:
        raise ValueError(
            f"statistics: got weight {config.statistics} for a model without patch tokens, allowed: 0 there"
        )
    if statistics is None:
        raise ValueError(f"statistics: got weight {config.statistics} but no statistics to compare with")
    if config.jitter >= min(teacher.patch_size):
        raise ValueError(
            f"jitter: got {config.jitter}, allowed: below the patch size {min(teacher.patch_size)} where statistics "
            "> 0, since the prior compares positions"
        )
    check_statistics(teacher, statistics)
