"""Synthetic images that know which of their patches were finished."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from torch import Tensor

from smi_fed.checks import is_integer
from smi_fed.files import load_tensors, reading, save_tensors

FORMAT = "smi-fed.sparse-images"
VERSION = 1


@dataclass(frozen=True, eq=False)
class SparseImages:
    """Images from inversion, one teacher grid for all of them.

    Attributes:
        images: (b, c, h, w) float32 in [0, 1].
        mask: (b, gh, gw) bool; True where a patch was optimised to the end.
        targets: (b,) int64, or (b, classes) float for multi-label losses.
        patch_size: (ph, pw) pixels.
        ids: (b,) int64, unique within one inversion; several images of one trajectory
            may share one.
        teachers: (b,) int64, which teacher each image came from.
        stopped_at: (b, gh, gw) int64, the iteration at which a patch stopped; -1 where it did not.
        soft_labels: (b, classes) float32 probabilities, or None.

    Raises:
        ValueError: shapes or dtypes that do not fit each other, or pixels outside [0, 1].
    """

    images: Tensor
    mask: Tensor
    targets: Tensor
    patch_size: tuple[int, int]
    ids: Tensor
    teachers: Tensor
    stopped_at: Tensor
    soft_labels: Tensor | None = None

    def __post_init__(self) -> None:
        problem = _problem(self)
        if problem:
            raise ValueError(f"not a set of sparse images: {problem}")

    def __len__(self) -> int:
        return len(self.images)

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of patches."""
        return self.mask.shape[1], self.mask.shape[2]

    @property
    def kept(self) -> Tensor:
        """(b, k) int64 ascending indices of the kept patches.

        Raises:
            ValueError: the images keep different numbers of patches.
        """
        counts = self.mask.flatten(1).sum(1)
        if len(counts) and not bool((counts == counts[0]).all()):
            raise ValueError(
                f"images keep between {int(counts.min())} and {int(counts.max())} patches; `kept` needs one "
                "number, use `mask`"
            )
        return self.mask.flatten(1).nonzero()[:, 1].view(len(self), int(counts[0]) if len(counts) else 0)

    @property
    def kept_fraction(self) -> float:
        """Share of patches that were optimised to the end."""
        return float(self.mask.float().mean())

    def masked(self, fill: float = 0.0) -> Tensor:
        """The images (b, c, h, w) with stopped patches painted in `fill`."""
        ph, pw = self.patch_size
        pixels = self.mask.repeat_interleave(ph, 1).repeat_interleave(pw, 2)[:, None]
        return self.images.where(pixels, torch.full((), fill, dtype=self.images.dtype))

    def select(self, indices: Tensor | slice) -> SparseImages:
        """The images at `indices`, in that order."""
        rows = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "patch_size"}
        return replace(self, **{name: None if rows is None else rows[indices] for name, rows in rows.items()})

    @classmethod
    def concat(cls, parts: Sequence[SparseImages]) -> SparseImages:
        """All images of `parts` in order.

        Raises:
            ValueError: no parts, or parts of different patch or image size or of different
                kinds of targets.
        """
        if not parts:
            raise ValueError("nothing to concatenate: got no sparse images")
        names = [f.name for f in fields(cls) if f.name != "patch_size"]
        if any(part.soft_labels is None for part in parts):
            names.remove("soft_labels")
        kinds = {(p.patch_size, *(tuple(getattr(p, name).shape[1:]) for name in names)) for p in parts}
        if len(kinds) > 1:
            raise ValueError(
                "sparse images of different patch or image size or targets cannot be one set: got patch_size, "
                f"{', '.join(names)} of {sorted(kinds)}"
            )
        rows = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
        return cls(patch_size=parts[0].patch_size, **rows)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write as safetensors, atomically. The mask is stored, never guessed from pixels."""
        tensors = {
            f.name: getattr(self, f.name)
            for f in fields(self)
            if f.name != "patch_size" and getattr(self, f.name) is not None
        }
        save_tensors(path, tensors | {"patch_size": torch.tensor(self.patch_size)}, FORMAT, VERSION)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SparseImages:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError, FileFormatError: naming the file and what is wrong with it.
        """
        tensors, _ = load_tensors(path, FORMAT, VERSION)
        with reading(path):
            ph, pw = tensors.pop("patch_size").tolist()
            return cls(patch_size=(ph, pw), **tensors)


@dataclass(frozen=True)
class StoredImages:
    """Sparse images in a file, read each time they are asked for.

    Attributes:
        path: what `SparseImages.save` wrote.
        count: images in it.
    """

    path: Path
    count: int

    def __len__(self) -> int:
        return self.count

    def load(self) -> SparseImages:
        """The images; raises as `SparseImages.load`."""
        return SparseImages.load(self.path)


def _problem(found: SparseImages) -> str | None:
    """What is wrong with the tensors, or None."""
    images, mask = found.images, found.mask
    if images.ndim != 4 or images.dtype != torch.float32:
        return f"images are {images.dtype} {tuple(images.shape)}, expected float32 (b, c, h, w)"
    if not bool(((images >= 0) & (images <= 1)).all()):
        return "pixels outside [0, 1] or not finite"
    b, _, h, w = images.shape
    ph, pw = found.patch_size
    if not all(is_integer(p) and p > 0 and side % p == 0 for p, side in ((ph, h), (pw, w))):
        return f"patch_size is {found.patch_size}, expected two ints that divide the image size {(h, w)}"
    grid = (b, h // ph, w // pw)
    if mask.dtype != torch.bool or tuple(mask.shape) != grid:
        return f"mask is {mask.dtype} {tuple(mask.shape)}, expected bool {grid}"
    if found.stopped_at.dtype != torch.int64 or tuple(found.stopped_at.shape) != grid:
        return f"stopped_at is {found.stopped_at.dtype} {tuple(found.stopped_at.shape)}, expected int64 {grid}"
    if not bool(((found.stopped_at < 0) == mask).all()):
        return "stopped_at does not agree with the mask"
    targets, soft = found.targets, found.soft_labels
    good = {
        "targets": targets.dtype == torch.int64 if targets.ndim == 1 else _is_rows_of_finite(targets),
        "ids": found.ids.dtype == torch.int64 and found.ids.ndim == 1,
        "teachers": found.teachers.dtype == torch.int64 and found.teachers.ndim == 1,
        "soft_labels": soft is None or _is_rows_of_finite(soft),
    }
    rows = {name: value for name in good if (value := getattr(found, name)) is not None}
    wrong = {
        name: f"{value.dtype} {tuple(value.shape)}" for name, value in rows.items() if not good[name] or len(value) != b
    }
    return f"{b} images but {wrong}" if wrong else None


def _is_rows_of_finite(values: Tensor) -> bool:
    return values.ndim == 2 and values.is_floating_point() and bool(values.isfinite().all())


def classes_of(images: SparseImages) -> Tensor:
    """(n,) what each image was made for; of several labels the strongest."""
    return images.targets.argmax(1) if images.targets.ndim == 2 else images.targets
