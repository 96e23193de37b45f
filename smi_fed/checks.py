"""One way to refuse a value: the key, what was got and what is allowed."""

from __future__ import annotations

from typing import Any


class SettingError(ValueError):
    """A setting that cannot be used; the message names key, value and what is allowed."""

    def __init__(self, key: str, got: Any, allowed: str) -> None:
        super().__init__(f"{key}: got {got!r}, allowed: {allowed}")
        self.key, self.got, self.allowed = key, got, allowed

    def under(self, prefix: str) -> SettingError:
        """The same error with `prefix.` before its key."""
        return SettingError(f"{prefix}.{self.key}", self.got, self.allowed)


def require(ok: bool, key: str, got: Any, allowed: str) -> None:
    """Raise `SettingError` unless `ok`."""
    if not ok:
        raise SettingError(key, got, allowed)


def require_choice(key: str, got: Any, choices: Any) -> None:
    """Raise `SettingError` unless `got` is one of `choices`."""
    names = sorted(str(choice) for choice in choices)
    require(got in choices, key, got, " | ".join(names))


def is_number(value: Any) -> bool:
    """True for a finite int or float; False for bool, NaN and infinities."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")


def is_integer(value: Any) -> bool:
    """True for an int that is not a bool."""
    return isinstance(value, int) and not isinstance(value, bool)
