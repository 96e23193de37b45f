"""Sequences that do not fit memory at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Generic, TypeVar

Source = TypeVar("Source")
Item = TypeVar("Item")
Seen = TypeVar("Seen")


class Lazily(Sequence[Item], Generic[Source, Item]):
    """`make(source)` of every source, made each time it is asked for and held by nobody here.

    A loop's variable, `zip` and `enumerate` hold an item while the next one is made: `one_by_one`
    and an index with `del` do not.

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


def one_by_one(items: Sequence[Item], look: Callable[[Item], Seen]) -> list[Seen]:
    """What `look` sees in each item; none is held while the next one is made."""
    return [look(items[i]) for i in range(len(items))]
