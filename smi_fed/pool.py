"""Synthetic images of earlier rounds, kept to be used again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from smi_fed.checks import Allowed, Flag, Natural, checked
from smi_fed.sparse_images import SparseImages, StoredImages


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


AnyImages = SparseImages | StoredImages


@dataclass(frozen=True, eq=False)
class Entry:
    """One client's images of one round.

    Attributes:
        client: whatever tells clients apart.
        source: the images; their targets are in the client's own classes.
        classes: for each of the client's classes its index among the student's; None where they are the same.
        count: the first of them that are used; None is all.
    """

    round: int
    client: str
    source: AnyImages
    classes: Sequence[int] | None = None
    count: int | None = None

    def __len__(self) -> int:
        return len(self.source) if self.count is None else self.count

    @property
    def images(self) -> SparseImages:
        """The first `count` images, read each time where they are stored."""
        found = at_hand(self.source)
        return found if len(found) == len(self) else found.select(slice(len(self)))


def at_hand(images: AnyImages | Entry) -> SparseImages:
    """The images in memory."""
    if isinstance(images, Entry):
        return images.images
    return images.load() if isinstance(images, StoredImages) else images


@dataclass
class Pool:
    """Images of earlier rounds, newest first, at most `config.images` of them; and each client's last ones."""

    config: PoolConfig
    entries: list[Entry] = field(default_factory=list)
    last: dict[str, AnyImages] = field(default_factory=dict)

    def add(
        self,
        server_round: int,
        clients: Sequence[str],
        images: Sequence[AnyImages],
        classes: Sequence[Sequence[int] | None] | None = None,
    ) -> None:
        """Take in a round; what is beyond the bound is dropped, oldest first. `classes` of each client: see `Entry`."""
        rows = list(zip(clients, images, classes or [None] * len(images), strict=True))
        if self.config.warm:
            self.last.update({client: found for client, found, _ in rows})
        fresh = [Entry(server_round, *row) for row in rows]
        room, kept = self.config.images, []
        for entry in [*fresh, *self.entries]:
            count = min(room, len(entry))
            if count:
                kept.append(replace(entry, count=count))
            room -= count
        self.entries = kept

    def of(self, client: str | None = None) -> list[Entry]:
        """All entries, or one client's."""
        return [entry for entry in self.entries if client in (None, entry.client)]

    def shares(self, server_round: int, fresh: int, client: str | None = None) -> Tensor:
        """How often each image is drawn in `server_round`, not normalised: `fresh` ones of this round, then `of`'s."""
        old = [torch.full((len(e),), self.config.decay ** (server_round - e.round)) for e in self.of(client)]
        return torch.cat([torch.ones(fresh), *old]).double()


def start_from(last: SparseImages, targets: Tensor) -> SparseImages | None:
    """`last` as a start for `targets` (b,): each image for a target of its own class, none twice; None if none fits.

    Of the images of one trajectory (rebirth) the last one is a start: it holds what all became.
    """
    if last.targets.ndim != 1:
        return None
    ends = {trajectory: row for row, trajectory in enumerate(last.ids.tolist())}
    last = last.select(torch.tensor(sorted(ends.values()), dtype=torch.long))
    waiting: dict[int, list[int]] = {}
    for place, target in enumerate(targets.tolist()):
        waiting.setdefault(target, []).append(place)
    pairs = [(row, waiting[t].pop(0)) for row, t in enumerate(last.targets.tolist()) if waiting.get(t)]
    if not pairs:
        return None
    rows, places = (torch.tensor(each) for each in zip(*pairs, strict=True))
    return replace(last.select(rows), ids=places)
