"""Coloured objects on textured backgrounds, drawn: a data set with fine detail and true masks.

Lengths are in half image sides, so a scene is the same at every size; at 32 pixels 1/16 is one pixel.
Disc, gear and striped disc differ in fine detail alone, and so do the plain and the textured
square and triangle: the mean of a texture is the plain object's colour.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from smi_fed.checks import is_integer, require

CLASS_NAMES = (
    "disc", "gear", "striped disc", "ring", "square", "checkered square", "frame", "triangle", "dotted triangle",
    "star",
)  # fmt: skip
PERIOD = 0.25
"""Of the objects' textures: four pixels of 32, so images of 8 pixels do not show them."""

SAMPLES = 3
"""Per pixel and axis, for antialiasing."""

Field = Callable[[Tensor, Tensor], Tensor]
"""Values of a function of the plane at the points x and y."""


@dataclass(frozen=True)
class Objects:
    """What is drawn on n backgrounds.

    Attributes:
        labels: (n,) int64, places in `CLASS_NAMES`.
        colours: (n, 3) in [0, 1], the mean over the object.
        contrasts: (n, 3), half the difference of a texture's two colours.
        centres: (n, 2), x to the right and y downwards, 0 in the middle and 1 at the border.
        radii: (n,) of the circle around the object.
        angles: (n,) in radians.
    """

    labels: Tensor
    colours: Tensor
    contrasts: Tensor
    centres: Tensor
    radii: Tensor
    angles: Tensor


def draw_shapes(labels: Tensor, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """One image of each label.

    What is drawn from `generator` depends neither on the labels nor on the size: other labels
    are other objects of the same place and colour on the same backgrounds.

    Args:
        labels: (n,) int64, places in `CLASS_NAMES`.
        size: pixels per side, at least 8.

    Returns:
        Images (n, 3, size, size) float32 in [0, 1] and masks (n, size, size) bool, see `paint`.

    Raises:
        SettingError: a size or labels that cannot be.
    """
    require(is_integer(size) and size >= 8, "size", size, "an int >= 8")
    known = bool(((labels >= 0) & (labels < len(CLASS_NAMES))).all())
    require(known, "labels", labels.unique().tolist(), f"0 to {len(CLASS_NAMES) - 1}")
    uniform = _Uniform(len(labels), generator)
    base = uniform(0.1, 0.9, 3)
    backgrounds = (base[:, :, None, None] + _texture(uniform, size)).clamp(0, 1)
    colours = uniform(0.3, 0.7, 16, 3)
    best = (colours - base[:, None]).norm(dim=2).argmax(1)
    radii = uniform(0.65, 0.8)
    objects = Objects(
        labels,
        colours[torch.arange(len(labels)), best],
        0.25 * uniform(-1, 1).sign()[:, None].expand(-1, 3),
        uniform(-1, 1, 2) * (0.95 - radii)[:, None],
        radii,
        uniform(-0.3, 0.3),
    )
    return paint(backgrounds, objects)


class _Uniform:
    """Draws per image, on the CPU."""

    def __init__(self, count: int, generator: torch.Generator) -> None:
        self.count, self.generator = count, generator

    def __call__(self, low: float, high: float, *shape: int) -> Tensor:
        """(n, *shape) in [low, high)."""
        return low + (high - low) * torch.rand(self.count, *shape, generator=self.generator)


def paint(backgrounds: Tensor, objects: Objects) -> tuple[Tensor, Tensor]:
    """The objects over their backgrounds (n, 3, h, h).

    Returns:
        Images (n, 3, h, h), and masks (n, h, h) bool of every pixel that an object touches:
        outside them an image is its background, bit for bit.
    """
    size = backgrounds.shape[-1]
    images, masks = backgrounds.clone(), torch.zeros(len(backgrounds), size, size, dtype=torch.bool)
    for label, (outline, texture) in enumerate(_CLASSES):
        rows = (objects.labels == label).nonzero()[:, 0]
        if not len(rows):
            continue
        inside, tone = _sampled(outline, texture, objects, rows, size)
        colour = inside[:, None] * objects.colours[rows][:, :, None, None]
        colour = colour + tone[:, None] * objects.contrasts[rows][:, :, None, None]
        images[rows] = images[rows] * (1 - inside[:, None]) + colour
        masks[rows] = inside > 0
    return images.clamp(0, 1), masks


def _sampled(outline: Field, texture: Field, objects: Objects, rows: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Share of each pixel that is inside, and the mean over the pixel of the texture there; (n, h, h)."""
    x, y = _grid(size * SAMPLES)
    x, y = (axis - centre[:, None, None] for axis, centre in zip((x, y), objects.centres[rows].unbind(1), strict=True))
    cos, sin = (turn(objects.angles[rows])[:, None, None] for turn in (torch.cos, torch.sin))
    x, y = cos * x + sin * y, cos * y - sin * x
    radius = objects.radii[rows][:, None, None]
    inside = (outline(x / radius, y / radius) < 0).float()
    tone = inside * texture(x, y)
    return F.avg_pool2d(inside, SAMPLES), F.avg_pool2d(tone, SAMPLES)


def _grid(size: int) -> tuple[Tensor, Tensor]:
    """x and y (size, size) of the pixels' middles."""
    middles = (torch.arange(size) + 0.5) * 2 / size - 1
    x, y = torch.meshgrid(middles, middles, indexing="xy")
    return x, y


def _texture(uniform: _Uniform, size: int) -> Tensor:
    """Of each background one of a grating, smooth noise and speckle, in a colour; (n, 3, h, h) around 0."""
    x, y = _grid(size)
    angle, frequency, phase = (
        uniform(low, high)[:, None, None] for low, high in ((0, math.pi), (3, 12), (0, 2 * math.pi))
    )
    grating = torch.sin(frequency * math.pi * (torch.cos(angle) * x + torch.sin(angle) * y) + phase)
    smooth, speckle = (
        F.interpolate(uniform(-1, 1, 1, cells, cells), (size, size), mode="bicubic", antialias=True)[:, 0]
        for cells in (6, 32)
    )
    kind = uniform(0, 3).long()
    values = torch.stack([grating, smooth, speckle], 1)[torch.arange(len(kind)), kind]
    return values[:, None] * uniform(-0.12, 0.12, 3, 1, 1)


# Outlines: below 0 inside; the object in the unit circle.


def _disc(x: Tensor, y: Tensor) -> Tensor:
    return torch.hypot(x, y) - 0.9


def _gear(x: Tensor, y: Tensor) -> Tensor:
    return torch.hypot(x, y) - 0.88 - 0.12 * torch.cos(10 * torch.atan2(y, x)).sign()


def _ring(x: Tensor, y: Tensor) -> Tensor:
    return (torch.hypot(x, y) - 0.7).abs() - 0.2


def _square(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(x.abs(), y.abs()) - 0.7


def _frame(x: Tensor, y: Tensor) -> Tensor:
    return (torch.maximum(x.abs(), y.abs()) - 0.53).abs() - 0.17


def _triangle(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(x.abs() * math.sqrt(3) / 2 - y / 2, y) - 0.5


def _star(x: Tensor, y: Tensor) -> Tensor:
    """Five points: every sector is the same half-plane between an outer and an inner corner."""
    turn = 2 * math.pi / 5
    angle = (torch.remainder(torch.atan2(y, x), turn) - turn / 2).abs()  # 0 at an inner corner, turn / 2 at a point
    radius = torch.hypot(x, y)
    inner, outer = 0.38, (math.cos(turn / 2), math.sin(turn / 2))
    across, along = radius * torch.cos(angle) - inner, radius * torch.sin(angle)
    return across * outer[1] - along * (outer[0] - inner)


# Textures: -1 to 1, of mean 0.


def _plain(x: Tensor, y: Tensor) -> Tensor:
    return torch.zeros_like(x)


def _stripes(x: Tensor, y: Tensor) -> Tensor:
    return torch.sin(2 * math.pi / PERIOD * x).sign()


def _checks(x: Tensor, y: Tensor) -> Tensor:
    return _stripes(x, y) * _stripes(y, x)


def _dots(x: Tensor, y: Tensor) -> Tensor:
    x, y = (torch.remainder(axis, PERIOD) / PERIOD - 0.5 for axis in (x, y))
    return (0.5 / math.pi - x.square() - y.square()).sign()  # discs on half of the area


_CLASSES: tuple[tuple[Field, Field], ...] = (
    (_disc, _plain), (_gear, _plain), (_disc, _stripes), (_ring, _plain), (_square, _plain), (_square, _checks),
    (_frame, _plain), (_triangle, _plain), (_triangle, _dots), (_star, _plain),
)  # fmt: skip
