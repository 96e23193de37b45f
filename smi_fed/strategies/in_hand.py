"""An inversion that was handed over, until it is taken in."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial

from smi_fed.inversion import InversionProgress
from smi_fed.pipeline import InversionRecord
from smi_fed.progress import Bar, show_inversion
from smi_fed.teachers import StoredTeacher


class Shown:
    """The bar of an inversion, and what is told of it; from its first iteration on, since it may have to wait.

    Args:
        name: of the teacher.
        total: iterations.
        tell: called with what happened, and values by name.
    """

    def __init__(self, name: str, total: int, tell: Callable[..., None]) -> None:
        self.name, self.total, self.tell = name, total, tell
        self.bar: Bar | None = None

    def __call__(self, now: InversionProgress) -> None:
        """See `Executor.submit`."""
        show_inversion(self.begin(), now)

    def begin(self) -> Bar:
        """The bar, which is there from the first call on."""
        if self.bar is None:
            self.tell("started")
            self.bar = Bar(f"inversion of {self.name}", self.total, tell=partial(self.tell, "progress"))
        return self.bar

    def end(self, name: str, **values: float | str) -> None:
        """Tell how it ended."""
        self.begin().close()
        self.tell(name, **values)


@dataclass(frozen=True, eq=False)
class Inverting:
    """An inversion that is not taken in yet."""

    teacher: StoredTeacher
    node: int
    shown: Shown
    future: Future[InversionRecord]
