"""One inversion as a piece of work that another process or machine can do."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from smi_fed.files import FileFormatError
from smi_fed.inversion import InversionProgress
from smi_fed.pipeline import InversionRecord, PipelineConfig, invert_teacher, seeded
from smi_fed.sparse_images import SparseImages, StoredImages
from smi_fed.teachers import StoredTeacher

log = logging.getLogger("smi_fed")

Show = Callable[[InversionProgress], None]


@dataclass(frozen=True)
class InversionJob:
    """All that the images of one teacher are made from; can be pickled.

    Attributes:
        teacher: the model, on the device of whoever does the job.
        teacher_id: stored with the images.
        pipeline: settings.
        draws: numbers of its generator, see `seeded`.
        images: the file that they go to.
        checkpoint: directory that a killed inversion goes on from.
        last: this client's images of an earlier round, to start from.
    """

    teacher: StoredTeacher
    teacher_id: int
    pipeline: PipelineConfig
    draws: tuple[int, ...]
    images: Path
    checkpoint: Path
    last: StoredImages | None = None


def invert_stored(job: InversionJob, show: Show | None = None) -> InversionRecord:
    """Do a job, in this process: the images are in `job.images`.

    A checkpoint that cannot be gone on with is removed, and the inversion begins anew.

    Args:
        show: called with the progress; None draws a bar.

    Raises:
        DivergedError: the teacher's gradients overflow.
        FileNotFoundError, FileFormatError: of the teacher or of `job.last`.
    """
    for left in job.images.parent.glob(f".{job.images.name}.*"):  # half-written by a killed process
        left.unlink()
    try:
        images, record = _attempt(job, show)
    except FileFormatError as error:
        log.warning("the inversion of %s begins anew: %s", job.teacher.name, error)
        shutil.rmtree(job.checkpoint, ignore_errors=True)
        images, record = _attempt(job, show)
    images.save(job.images)
    return record


def _attempt(job: InversionJob, show: Show | None) -> tuple[SparseImages, InversionRecord]:
    return invert_teacher(
        job.teacher.load(), job.teacher_id, job.pipeline, seeded(*job.draws),
        last=None if job.last is None else job.last.load(), checkpoint=job.checkpoint, show=show,
    )  # fmt: skip
