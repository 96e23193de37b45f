"""What both wrappers of Flower's strategies are configured by."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypedDict

import torch

from smi_fed.events import Events
from smi_fed.executors import Executor
from smi_fed.models import ModelSpec
from smi_fed.pipeline import PipelineConfig
from smi_fed.policy import AdmissionPolicy
from smi_fed.pool import PoolConfig
from smi_fed.strategies.round_record import RoundRecord


class Options(TypedDict, total=False):
    """Keyword arguments of both wrappers; `student` is required.

    Attributes:
        student: spec of the global model; its class names are the federation's label space.
        pipeline: settings of inversion and distillation.
        policy: what a client may claim.
        min_teachers: fewer admitted teachers end the run.
        projection: what the inner strategy aggregates. `ensemble`: one student, taught by all
            teachers on all images; `per_teacher`: a student for each teacher, taught by it
            alone on its own images.
        refine: where all replies have the student's architecture, let the inner strategy
            aggregate them as they are and distill into its result.
        start: where the student starts in round 1: own (as its spec says) | random | pretrained (the same,
            checked) | average (of the admitted models of its architecture, by examples) | statistics (as
            its spec says, with the head of the clients' class statistics, `smi_fed.class_statistics`).
        pool: use of earlier rounds' images.
        seed: of targets, inversion and distillation.
        device: where inversion and distillation run.
        image_directory: where each teacher's images are written as soon as they are done; None
            is within `state_directory`.
        state_directory: where the run keeps models, and what a killed server goes on from; None is a
            temporary directory (`TMPDIR` says where), which holds the models of two rounds.
        identity: what else decides the student, by name as text (data, say, or what clients are told): a
            run that goes on has to agree in it.
        on_round: called with the finished `RoundRecord`.
        known_starts: specs of models, clients' and the student's, whose starts are on this machine. Where there
            are any, clients leave out of their replies what is equal to these, or to the student that was sent.
        events: what is told of rounds, replies, inversions, distillations and aggregations, to watchers.
        executor: who inverts, see `smi_fed.executors.open_executor`; whoever made it closes it. None inverts in
            this process, one teacher after the other.
    """

    student: ModelSpec
    pipeline: PipelineConfig
    policy: AdmissionPolicy
    min_teachers: int
    projection: str
    refine: bool
    start: str
    pool: PoolConfig
    seed: int
    device: torch.device | str
    image_directory: Path | None
    state_directory: Path | None
    identity: Mapping[str, str] | None
    on_round: Callable[[RoundRecord], None] | None
    known_starts: Sequence[ModelSpec]
    events: Events | None
    executor: Executor | None
