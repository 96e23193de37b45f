"""Sequences that do not fit memory at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Generic, TypeVar

Source = TypeVar("Source")
Item = TypeVar("Item")


class Lazily(Sequence[Item], Generic[Source, Item]):
    """`make(source)` of every source, made each time it is asked for and held by nobody here.

    Args:
        sources: what the items are made from.
        make: gives the item of a source.
    """

    def __init__(self, sources: Sequence[Source], make: Callable[[Source], Item]) -> None:
        self.sources, self.make = sources, make

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, index: int) -> Item:  # type: ignore[override]  # no slices
        return self.make(self.sources[index])

    def __iter__(self) -> Iterator[Item]:
        return map(self.make, self.sources)
