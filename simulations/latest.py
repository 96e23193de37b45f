"""What cells share while they come one after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

Made = TypeVar("Made")


class Latest(dict[str, Made]):
    """What was made last, by its key, kept in memory while the same is asked for."""

    def of(self, key: str, make: Callable[[], Made]) -> Made:
        """That of `key`; what was there before goes first, since both may not fit."""
        if key not in self:
            self.clear()
            self[key] = make()
        return self[key]
