"""What the student is shown in a step: synthetic images, drawn, shifted and mixed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from smi_fed.alignment import resize
from smi_fed.distillation.asking import Asking
from smi_fed.distillation.config import DistillationConfig
from smi_fed.sparse_images import SparseImages
from smi_fed.tokens import roll_images
from smi_fed.training import draw_shift

Partners = tuple[Tensor, Tensor]
"""For each image of a batch its own share (b,) in [1/2, 1] and who has the rest (b,)."""


def draw_partners(count: int, alpha: float, generator: torch.Generator) -> Partners | None:
    """Whom each of `count` images is mixed with; None, without a draw, where `alpha` is 0."""
    if not alpha:
        return None
    # Beta(a, a) from two gamma draws, which take a generator; only a = 1 is uniform.
    if alpha == 1:
        share = torch.rand(count, generator=generator)
    else:
        gammas = torch._standard_gamma(torch.full((2, count), float(alpha)), generator=generator)
        share = gammas[0] / gammas.sum(0)
    return torch.maximum(share, 1 - share), torch.randperm(count, generator=generator)


def blend(values: Tensor, partners: Partners | None) -> Tensor:
    """Each row of `values` (b, ...) mixed with its partner's; as they are for None."""
    if partners is None:
        return values
    share = partners[0].to(values).view(-1, *[1] * (values.ndim - 1))
    return share * values + (1 - share) * values[partners[1].to(values.device)]


def mix(images: Tensor, alpha: float, generator: torch.Generator) -> Tensor:
    """Each image (b, c, h, w) mixed with another of the batch (Zhang et al., 2018); the larger share stays its own."""
    return blend(images, draw_partners(len(images), alpha, generator))


@dataclass(frozen=True)
class Draw:
    """What one step shows: rows (b,) of all images, a shift (b, 2) and partners, and whether all tokens.

    Who is asked of them is in `asked` (teachers, b), see `Asking.draw`; None is every teacher.
    """

    rows: Tensor
    shift: Tensor | None = None
    partners: Partners | None = None
    everything: bool = True
    asked: Tensor | None = None


def draw(
    config: DistillationConfig,
    images: int,
    shares: Tensor | None,
    generator: torch.Generator,
    asking: Asking | None = None,
) -> Draw:
    """One step's draw among `images`, evenly or in the proportions of `shares` (images,)."""
    count = config.batch_size
    if shares is None:
        rows = torch.randint(images, (count,), generator=generator)
    else:
        rows = torch.multinomial(shares, count, replacement=True, generator=generator)
    shift = draw_shift(count, config.jitter, generator)
    partners = draw_partners(count, config.mixup, generator)
    mixed = config.tokens == "mixed"
    everything = bool(torch.rand((), generator=generator) < 0.5) if mixed else config.tokens == "all"
    asked = asking and asking.draw(rows, partners and partners[1], generator)
    return Draw(rows, shift, partners, everything, asked)


def unchanged(rows: Tensor, generator: torch.Generator, asking: Asking | None = None) -> Draw:
    """Images as they are."""
    return Draw(rows, asked=asking and asking.draw(rows, None, generator))


def show(
    sets: Sequence[SparseImages],
    draws: Sequence[Draw],
    size: tuple[int, int],
    device: torch.device,
) -> list[Tensor]:
    """The images (b, c, h, w) of each draw at `size`, shifted and mixed; each set is read once."""
    rows = torch.cat([each.rows for each in draws])
    pixels, begin = torch.empty(0), 0
    for i in range(len(sets)):
        found = sets[i]
        here = (rows >= begin) & (rows < begin + len(found))
        chosen = resize(found.images[rows[here] - begin], size)
        pixels = pixels if begin else chosen.new_empty(len(rows), *chosen.shape[1:])
        pixels[here] = chosen
        begin += len(found)
        del found, chosen  # before the next set is read
    batches = pixels.split([len(each.rows) for each in draws])
    return [_view(batch.to(device), each) for batch, each in zip(batches, draws, strict=True)]


def _view(batch: Tensor, drawn: Draw) -> Tensor:
    shifted = batch if drawn.shift is None else roll_images(batch, drawn.shift.to(batch.device))
    return blend(shifted, drawn.partners)
