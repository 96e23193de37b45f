"""How an image is written down while it is optimised."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from smi_fed import tokens
from smi_fed.checks import Allowed, Count, NonNegative, checked, require
from smi_fed.inversion import randomness
from smi_fed.inversion.state import Tensors
from smi_fed.inversion.teacher import Teacher


class Parametrisation(Protocol):
    """Turns parameters into normalised pixels."""

    def start(self, key: int, ids: Tensor) -> Tensors:
        """Initial parameters of images `ids` (b,), a function of key and id alone."""
        ...

    def encode(self, images: Tensor) -> Tensors:
        """Tensors that show `images` (b, c, h, w) in [0, 1], as nearly as the parametrisation can."""
        ...

    def patches(self, parameters: Tensors, kept: Tensor) -> Tensor:
        """Normalised pixels (b, k, c, ph, pw) of the patches `kept` (b, k)."""
        ...

    def drop(self, parameters: Tensors, remaining: Tensor) -> Tensors:
        """Tensors, or their moments, of `remaining` (b, k') out of the patches kept so far."""
        ...

    def project(self, parameters: Tensors) -> None:
        """Move the parameters back, in place, to where pixels lie in [0, 1]."""
        ...


@checked
class PixelsConfig:
    """Every pixel on its own (the paper's), see `FreePixels`."""

    kind: Literal["pixels"] = field(default="pixels", kw_only=True)

    def build(self, teacher: Teacher) -> Parametrisation:
        """For the images that `teacher` takes."""
        return FreePixels(teacher)


class FreePixels:
    """Every pixel on its own, in the teacher's normalised space (the paper's, section 3).

    Tensors are the kept patches alone, so what stopped has no optimiser state either.
    """

    def __init__(self, teacher: Teacher) -> None:
        self.teacher = teacher
        self.low = (0 - teacher.mean) / teacher.std
        self.high = (1 - teacher.mean) / teacher.std

    def start(self, key: int, ids: Tensor) -> Tensors:
        (gh, gw), (ph, pw), c = self.teacher.grid, self.teacher.patch_size, self.teacher.channels
        noise = randomness.normal(key, ids, 0, randomness.START, c * gh * ph * gw * pw)
        images = noise.to(self.low.dtype).view(-1, c, gh * ph, gw * pw)
        return {"pixels": tokens.to_patches(images, (ph, pw))}

    def encode(self, images: Tensor) -> Tensors:
        pixels = (images.to(self.low) - self.teacher.mean) / self.teacher.std
        return {"pixels": tokens.to_patches(pixels, self.teacher.patch_size)}

    def patches(self, parameters: Tensors, kept: Tensor) -> Tensor:
        return parameters["pixels"]

    def drop(self, parameters: Tensors, remaining: Tensor) -> Tensors:
        return {"pixels": tokens.take(parameters["pixels"], remaining)}

    def project(self, parameters: Tensors) -> None:
        torch.clamp(parameters["pixels"], self.low, self.high, out=parameters["pixels"])


@checked
class PyramidConfig:
    """Images of low frequency, see `Pyramid`.

    Args:
        levels: side lengths of the grids in coefficients, different ints >= 1.
        start_scale: standard deviation of the start's coefficients, >= 0.
    """

    kind: Literal["pyramid"] = field(default="pyramid", kw_only=True)
    levels: Annotated[tuple[Count, ...], Allowed("different ints >= 1")] = (4, 8)
    start_scale: NonNegative = 0.1

    def __post_init__(self) -> None:
        good = 0 < len(self.levels) == len(set(self.levels))
        require(good, "levels", self.levels, "different ints >= 1")

    def build(self, teacher: Teacher) -> Parametrisation:
        """For the images that `teacher` takes."""
        return Pyramid(teacher, self.levels, self.start_scale)


class Pyramid:
    """A sum of coarse grids, upsampled and squashed: images of low frequency.

    A step moves whole regions, so the optimiser cannot hide an adversarial pattern in
    single pixels. Bilinear upsampling; 0.5 + 0.5 tanh maps to [0, 1].

    Args:
        levels: side lengths of the grids in coefficients.
        scale: standard deviation of the start's coefficients.
    """

    def __init__(self, teacher: Teacher, levels: tuple[int, ...], scale: float) -> None:
        self.teacher, self.levels, self.scale = teacher, levels, scale

    def start(self, key: int, ids: Tensor) -> Tensors:
        c, dtype = self.teacher.channels, self.teacher.mean.dtype
        counts = [c * level * level for level in self.levels]
        noise = self.scale * randomness.normal(key, ids, 0, randomness.START, sum(counts))
        parts = noise.to(dtype).split(counts, dim=1)
        return {
            f"level{level}": part.reshape(-1, c, level, level) for level, part in zip(self.levels, parts, strict=True)
        }

    def encode(self, images: Tensor) -> Tensors:
        """Each grid in turn takes what the others leave, three times over; 0 and 1 would need infinite coefficients."""
        left = torch.atanh((2 * images.to(self.teacher.mean) - 1).clamp(-0.99, 0.99))
        grids = {level: left.new_zeros(*left.shape[:2], level, level) for level in self.levels}
        for level in sorted(self.levels) * 3:
            more = F.interpolate(left, (level, level), mode="area")
            left = left - F.interpolate(more, left.shape[2:], mode="bilinear", align_corners=False)
            grids[level] = grids[level] + more
        return {f"level{level}": grid for level, grid in grids.items()}

    def patches(self, parameters: Tensors, kept: Tensor) -> Tensor:
        (gh, gw), (ph, pw) = self.teacher.grid, self.teacher.patch_size
        size = (gh * ph, gw * pw)
        layers = [F.interpolate(grid, size, mode="bilinear", align_corners=False) for grid in parameters.values()]
        images = 0.5 + 0.5 * torch.stack(layers).sum(0).tanh()
        patches = tokens.to_patches((images - self.teacher.mean) / self.teacher.std, (ph, pw))
        return patches if kept.shape[1] == gh * gw else tokens.take(patches, kept)

    def drop(self, parameters: Tensors, remaining: Tensor) -> Tensors:
        return parameters

    def project(self, parameters: Tensors) -> None:
        """Nothing to do: every coefficient gives a pixel in [0, 1]."""
