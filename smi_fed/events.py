"""What happens in a run, told to whoever watches; knows nothing of Flower.

A watcher is any callable that takes an `Event`. `smi_fed.watchers` has some that write.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from threading import RLock
from types import TracebackType
from typing import Protocol

log = logging.getLogger("smi_fed")

Value = float | int | str | bool | None


@dataclass(frozen=True)
class Event:
    """One thing that happened.

    Attributes:
        time: seconds since 1970.
        run: the run's name.
        round: from 1; 0 before the first.
        stage: run | round | reply | inversion | agreement | distillation | aggregation | evaluation.
        name: what happened: started, progress, ended, failed; of a reply arrived, admitted, refused;
            of the agreement with others kept, doubted.
        node: name of the client that it is about, as it was admitted, or `node ID` as long as it was not; empty where
            it is about no client.
        values: what is known of it, numbers and texts by name.
    """

    time: float
    run: str
    round: int
    stage: str
    name: str
    node: str = ""
    values: Mapping[str, Value] = field(default_factory=dict)


class Watcher(Protocol):
    """Whoever is told."""

    def __call__(self, event: Event, /) -> None:
        """Take one event; an error leaves this watcher out from then on, and the run goes on."""


class Events:
    """Tells watchers what happens in one run, one thing at a time, whichever threads tell.

    As a context manager it tells of the run's start and end too.

    Args:
        run: its name.
        watchers: who is told, in this order.
        about: told with the start: settings, say.

    Attributes:
        round: of the events that follow.
    """

    def __init__(
        self, run: str = "", watchers: Sequence[Watcher] = (), about: Mapping[str, Value] | None = None
    ) -> None:
        self.run, self.watchers, self.about, self.round = run, list(watchers), dict(about or {}), 0
        self._lock = RLock()

    def tell(self, stage: str, name: str, node: str = "", /, **values: Value) -> None:
        """Tell every watcher; see `Event`."""
        with self._lock:
            event = Event(time.time(), self.run, self.round, stage, name, node, values)
            for watcher in list(self.watchers):
                try:
                    watcher(event)
                except Exception:  # watching must not end a run of hours
                    log.warning("%s failed and is told no more", type(watcher).__name__, exc_info=True)
                    self.watchers.remove(watcher)

    def __enter__(self) -> Events:
        self.tell("run", "started", **self.about)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is None:
            self.tell("run", "ended")
        else:
            self.tell("run", "failed", reason=f"{type(error).__name__}: {error}")
