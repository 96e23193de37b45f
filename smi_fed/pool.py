"""Synthetic images of earlier rounds, kept to be used again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from smi_fed.checks import Allowed, Flag, Natural, checked
from smi_fed.sparse_images import SparseImages


@checked
class PoolConfig:
    """How images of earlier rounds are used again.

    Args:
        images: most images that are kept from earlier rounds; the oldest go first; 0 is off.
        decay: how much less often an image is drawn for each round of age, in (0, 1].
        warm: start a client's inversion from its own last images.

    Raises:
        SettingError: naming what cannot be.
    """

    images: Natural = 0
    decay: Annotated[float, Field(strict=True, gt=0, le=1), Allowed("a number in (0, 1]")] = 0.5
    warm: Flag = False


@dataclass(frozen=True, eq=False)
class Entry:
    """One client's images of one round.

    Attributes:
        client: whatever tells clients apart.
        images: targets in the client's own classes.
        classes: for each of them its index among the student's; None where they are the same.
    """

    round: int
    client: str
    images: SparseImages
    classes: Sequence[int] | None = None


@dataclass
class Pool:
    """Images of earlier rounds, newest first, at most `config.images` of them; and each client's last ones."""

    config: PoolConfig
    entries: list[Entry] = field(default_factory=list)
    last: dict[str, SparseImages] = field(default_factory=dict)

    def add(
        self,
        server_round: int,
        clients: Sequence[str],
        images: Sequence[SparseImages],
        classes: Sequence[Sequence[int] | None] | None = None,
    ) -> None:
        """Take in a round; what is beyond the bound is dropped, oldest first. `classes` of each client: see `Entry`."""
        rows = zip(clients, images, classes or [None] * len(images), strict=True)
        fresh = [Entry(server_round, *row) for row in rows]
        if self.config.warm:
            self.last.update({entry.client: entry.images for entry in fresh})
        room, kept = self.config.images, []
        for entry in [*fresh, *self.entries]:
            if room > 0:
                part = entry.images if len(entry.images) <= room else entry.images.select(slice(room))
                kept.append(replace(entry, images=part))
                room -= len(part)
        self.entries = kept

    def of(self, client: str | None = None) -> list[Entry]:
        """All entries, or one client's."""
        return [entry for entry in self.entries if client in (None, entry.client)]

    def shares(self, server_round: int, fresh: int, client: str | None = None) -> Tensor:
        """How often each image is drawn in `server_round`, not normalised: `fresh` ones of this round, then `of`'s."""
        old = [torch.full((len(e.images),), self.config.decay ** (server_round - e.round)) for e in self.of(client)]
        return torch.cat([torch.ones(fresh), *old]).double()


def start_from(last: SparseImages, targets: Tensor) -> SparseImages | None:
    """`last` as a start for `targets` (b,): each image for a target of its own class, none twice; None if none fits."""
    if last.targets.ndim != 1:
        return None
    waiting: dict[int, list[int]] = {}
    for place, target in enumerate(targets.tolist()):
        waiting.setdefault(target, []).append(place)
    pairs = [(row, waiting[t].pop(0)) for row, t in enumerate(last.targets.tolist()) if waiting.get(t)]
    if not pairs:
        return None
    rows, places = (torch.tensor(each) for each in zip(*pairs, strict=True))
    return replace(last.select(rows), ids=places)
