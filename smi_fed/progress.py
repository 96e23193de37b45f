"""Progress bars for people and for logs.

On a terminal tqdm draws one live bar; elsewhere (a server's log, `flwr run --stream`) the
same bar is one log line every few seconds.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable

from torch import Tensor
from tqdm import tqdm

from smi_fed.inversion import InversionProgress

log = logging.getLogger("smi_fed")

LOG_INTERVAL = 3.0
"""Seconds between two log lines of one bar, where nothing else is said."""


class Bar:
    """One bar; use as a context manager and call `at` as often as you like.

    Args:
        interval: seconds between two log lines.
        tell: called with `done`, `total` and the notes, `times` times in about equal steps.
    """

    def __init__(
        self, label: str, total: int, unit: str = "it", interval: float = LOG_INTERVAL,
        tell: Callable[..., None] | None = None, times: int = 10,
    ) -> None:  # fmt: skip
        self.label, self.total, self.unit, self.interval = label, total, unit, interval
        self.tell, self.times, self.told = tell, times, 0
        self.started = time.monotonic()
        self.shown = -interval
        self.done, self.note = 0, ""
        self.live = tqdm(desc=label, total=total, unit=unit, leave=True) if sys.stderr.isatty() else None

    def at(self, done: int, **notes: object) -> None:
        """`done` of the total; notes are shown behind the bar. Tensors are read only when shown."""
        self.done = done
        self._tell(notes)
        elapsed = time.monotonic() - self.started
        if elapsed - self.shown < (self.interval if self.live is None else 0.1) and done < self.total:
            return
        self.shown = elapsed
        self.note = ", ".join(f"{name} {_short(_read(value))}" for name, value in notes.items())
        if self.live is None:
            log.info("%s", self.text(elapsed))
        else:
            self.live.n, self.live.total = done, self.total
            self.live.set_postfix_str(self.note)

    def _tell(self, notes: dict[str, object]) -> None:
        share = self.done * self.times // max(1, self.total)
        if self.tell is not None and share > self.told:
            self.told = share
            self.tell(done=self.done, total=self.total, **{name: _read(value) for name, value in notes.items()})

    def text(self, elapsed: float) -> str:
        """The bar as one line, as long as its notes need."""
        return tqdm.format_meter(self.done, self.total, elapsed, prefix=self.label, unit=self.unit, postfix=self.note)

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self.live is not None:
            self.live.close()


def _read(value: object) -> object:
    return float(value) if isinstance(value, Tensor) else value


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def show_inversion(bar: Bar, now: InversionProgress) -> None:
    """Iterations per second, patches kept, loss and time left of an inversion."""
    bar.total = now.total
    bar.at(now.done, patches=f"{now.kept}/{now.patches}", images=now.images, loss=now.loss)


def show_log() -> None:
    """Let smi_fed's own log through to where Flower's goes."""
    log.setLevel(logging.INFO)
    log.propagate = False
    if not log.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("smi-fed: %(message)s"))
        log.addHandler(handler)
