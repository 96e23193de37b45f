"""Which Flower strategies can stand inside data-free distillation, and what privacy asks of it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.serverapp.strategy import FedXgbBagging, FedXgbCyclic
from flwr.supercore.differential_privacy import (
    KEY_NORM_BIT,
    compute_adaptive_clip_model_update,
    compute_clip_model_update,
)
from numpy.typing import NDArray

from smi_fed.checks import SettingError, require_choice
from smi_fed.starts import FROM_CLIENTS
from smi_fed.strategies.round_record import RoundRecord, Verdict, common_metrics
from smi_fed.waiting import WaitingConfig

PROJECTIONS = ("ensemble", "per_teacher")


def layers(strategy: Any) -> Iterator[Any]:
    """The strategy, what it wraps, and so on."""
    while strategy is not None:
        yield strategy
        strategy = getattr(strategy, "strategy", None)


def check_inner(strategy: Any, kind: type, wrapper: type, projection: str, refine: bool, start: str = "own") -> None:
    """Refuse what cannot be wrapped.

    Args:
        strategy: to be wrapped; `kind`: the class that it has to be of.
        wrapper: the class that wraps.
        projection: ensemble | per_teacher; `refine`: distill into what was aggregated.
        start: where the student starts, see `Options`.

    Raises:
        SettingError: with the reason.
    """
    require_choice("projection", projection, PROJECTIONS)
    for layer in layers(strategy):
        name = type(layer).__name__
        if not isinstance(layer, kind):
            raise SettingError("strategy", name, f"a {kind.__module__.rpartition('.')[0]}.{kind.__name__}")
        if isinstance(layer, wrapper):
            raise SettingError("strategy", name, "a strategy that aggregates; data-free distillation wraps once")
        if "FedXgb" in name or isinstance(layer, FedXgbBagging | FedXgbCyclic):
            raise SettingError(
                "strategy", name, "a strategy that aggregates arrays: boosted trees have no student to distill into"
            )
        if is_private(layer) and (projection == "ensemble" or refine):
            key, got = ("refine", refine) if refine else ("projection", projection)
            raise SettingError(
                key, got, f"{'false' if refine else 'per_teacher'} inside {name}: one student of all clients' images "
                "has no per-client sensitivity, so that no clipping bounds what a client can do to it",
            )  # fmt: skip
        if is_private(layer) and start in FROM_CLIENTS:
            raise SettingError(
                "start", start, f"own | random | pretrained inside {name}: a start out of all clients' replies has no "
                "noise, and reaches every projected student",
            )  # fmt: skip


def check_waiting(waiting: WaitingConfig, strategy: Any) -> None:
    """Refuse to leave out late clients where noise is measured for all that were asked.

    Raises:
        SettingError: with the reason.
    """
    for layer in layers(strategy):
        if is_private(layer) and waiting.quorum is not None:
            allowed = f"None inside {type(layer).__name__}, whose noise is for the updates of all that were asked"
            raise SettingError("quorum", waiting.quorum, allowed)


def is_private(strategy: Any) -> bool:
    """Whether this layer promises differential privacy, in either of Flower's strategy APIs; subclasses do too."""
    return any(kind.__name__.startswith(("DifferentialPrivacy", "DPFedAvg")) for kind in type(strategy).__mro__)


def refuse_privacy_outside(strategy: Any) -> None:
    """Refuse to be driven by a differential privacy strategy around `strategy`; called where clients are chosen.

    Outside it would clip and noise the distilled student as if that were one client's update,
    and promise a privacy that is not there. A strategy cannot ask what is around it, but who
    drives it stands further up the stack of this thread: in its own `configure_train`
    (`configure_fit`), or in `start` where a layer in between makes its messages later.

    Raises:
        SettingError: naming both and the order that is right.
    """
    frame = sys._getframe(1)
    methods = (frame.f_code.co_name, "start")
    while (frame := frame.f_back) is not None:
        outer = frame.f_locals.get("self") if frame.f_code.co_name in methods else None
        if is_private(outer) and any(layer is strategy for layer in layers(outer)):
            own, name = type(strategy).__name__, type(outer).__name__
            raise SettingError(
                "strategy", own, f"the other way round, {own}({name}(...)): from outside it would clip and noise the "
                "distilled student, not what a client sent",
            )  # fmt: skip


def clipped(
    arrays: list[NDArray[Any]], sent: list[NDArray[Any]], strategy: Any
) -> tuple[list[NDArray[Any]], dict[str, int | float]]:
    """A projected student as a client-side clipping strategy expects it, and the metrics that go with it.

    Clients clip updates of their own model; what the noise is measured for, though, is the
    update in the student's space, which first exists here. Flower's own functions clip it
    against what was sent, to the norm of this round.

    Args:
        arrays: of the projected student.
        sent: of the global student, in the same order.
        strategy: the inner strategy, whichever it is.
    """
    for layer in layers(strategy):
        kinds = " ".join(kind.__name__ for kind in type(layer).__mro__)
        if "DifferentialPrivacyClientSide" in kinds:
            adaptive = "ClientSideAdaptive" in kinds
            if all(np.array_equal(new, old) for new, old in zip(arrays, sent, strict=True)):
                return arrays, {KEY_NORM_BIT: 0} if adaptive else {}  # no norm to divide by
            own = [np.array(array, copy=True) for array in arrays]
            if adaptive:
                bit = compute_adaptive_clip_model_update(own, sent, layer.clipping_norm)
                return own, {KEY_NORM_BIT: int(bit)}
            compute_clip_model_update(own, sent, layer.clipping_norm)
            return own, {}
    return arrays, {}


@dataclass(frozen=True, eq=False)
class Projected:
    """One admitted client in the student's space, as the inner strategy gets it; Flower's APIs differ only in shape."""

    verdict: Verdict
    arrays: dict[str, NDArray[Any]]
    num_examples: int
    metrics: dict[str, int | float]


def projected(record: RoundRecord, sent: list[NDArray[Any]], strategy: Any) -> Iterator[Projected]:
    """What the inner strategy gets of each admitted client.

    Under differential privacy all weigh the same: noise is measured for an update's norm
    over the number of clients, not for what a client claims to have.

    Args:
        sent: arrays of the global student, in its order.
        strategy: the inner one.
    """
    private = any(is_private(layer) for layer in layers(strategy))
    rows = zip(record.admitted, record.projections, common_metrics(record.verdicts), strict=True)
    weights, arrays = None, dict[str, NDArray[Any]]()
    for verdict, now, metrics in rows:
        assert verdict.teacher is not None
        if now is not weights:  # where all have the ensemble's student it is in memory once
            weights, arrays = now, {key: weight.numpy() for key, weight in now.items()}
        own, more = clipped(list(arrays.values()), sent, strategy)
        same = all(a is b for a, b in zip(own, arrays.values(), strict=True))
        examples = 1 if private else max(1, round(verdict.teacher.num_examples * verdict.teacher.factor))
        yield Projected(verdict, arrays if same else dict(zip(arrays, own, strict=True)), examples, {**metrics, **more})
