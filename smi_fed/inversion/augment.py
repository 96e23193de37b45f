"""Random views of a batch, exact on what is still optimised."""

from __future__ import annotations

import torch
from torch import Tensor

from smi_fed.inversion import randomness
from smi_fed.inversion.config import InversionConfig
from smi_fed.inversion.teacher import Teacher, View
from smi_fed.tokens import roll_images, take, to_images, to_patches


def clean_view(patches: Tensor, kept: Tensor, canvas: Tensor, teacher: Teacher) -> View:
    """The batch as it is."""
    return View(patches, kept, canvas if teacher.needs_canvas else None)


def random_view(
    patches: Tensor,
    kept: Tensor,
    canvas: Tensor,
    teacher: Teacher,
    config: InversionConfig,
    key: int,
    ids: Tensor,
    age: Tensor,
) -> View:
    """The batch shifted cyclically and mirrored, each image by its own draws.

    While all patches are kept shifts are in pixels. Afterwards they are in whole patches
    and a mirror image turns patches and positions alike, so that every kept token still
    holds exactly its own pixels (a shift in pixels would mix in stopped neighbours).
    """
    view = clean_view(patches, kept, canvas, teacher)
    rows, columns = teacher.grid
    if config.jitter:
        dense = kept.shape[1] == rows * columns
        if dense:
            shift = randomness.integers(key, ids, age, randomness.JITTER, 2, config.jitter)
            view = _shift_pixels(view, shift, teacher)
        elif config.jitter >= min(teacher.patch_size):
            whole = config.jitter // min(teacher.patch_size)
            shift = randomness.integers(key, ids, age, randomness.JITTER, 2, whole)
            view = _shift_patches(view, shift, teacher)
    if config.flip:
        mirrored = randomness.uniform(key, ids, age, randomness.FLIP, 1)[:, 0] < 0.5
        view = _mirror(view, mirrored, teacher)
    return view


def _shift_pixels(view: View, shift: Tensor, teacher: Teacher) -> View:
    images = to_images(view.patches, teacher.grid)
    return View(to_patches(roll_images(images, shift), teacher.patch_size), view.positions, view.canvas)


def _shift_patches(view: View, shift: Tensor, teacher: Teacher) -> View:
    rows, columns = teacher.grid

    def move(positions: Tensor, by: Tensor) -> Tensor:
        row = (positions // columns + by[:, :1]) % rows
        return row * columns + (positions % columns + by[:, 1:]) % columns

    canvas = view.canvas
    if canvas is not None:
        canvas = take(canvas, move(torch.arange(rows * columns, device=shift.device).expand(len(shift), -1), -shift))
    return View(view.patches, move(view.positions, shift), canvas)


def _mirror(view: View, mirrored: Tensor, teacher: Teacher) -> View:
    _, columns = teacher.grid

    def turn(positions: Tensor) -> Tensor:
        return positions + columns - 1 - 2 * (positions % columns)

    def where(first: Tensor, second: Tensor) -> Tensor:
        return first.where(mirrored.view((-1,) + (1,) * (first.ndim - 1)), second)

    canvas = view.canvas
    if canvas is not None:
        every = torch.arange(canvas.shape[1], device=mirrored.device).expand(len(mirrored), -1)
        canvas = where(take(canvas, turn(every)).flip(-1), canvas)
    return View(where(view.patches.flip(-1), view.patches), where(turn(view.positions), view.positions), canvas)
