"""An inversion on disk, so that a killed one goes on where it was."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn

from smi_fed.files import FileFormatError, checksums, load_tensors, save_tensors, writable_directory
from smi_fed.inversion.schedule import StopSchedule
from smi_fed.inversion.state import Problem, State
from smi_fed.sparse_images import SparseImages

FORMAT, VERSION = "smi-fed.inversion", 2

LARGEST_SHARE = 0.02
"""Of the time: a checkpoint waits until the last one's writing is at most this share."""


@dataclass
class Work:
    """What an inversion has done and what it is doing.

    Attributes:
        size: images of the next batch.
        schedule: when patches stop; the planned one unless it was adapted to the teacher.
        finished: images, in order of their ids unless early stop finished later ones first.
        begun: batches in work, the current one last; more than one after a batch was halved
            or while a new one is brought past its stops to join another.
        following: id of the first image that was not begun.
        spent: iterations of single images so far, by the number of patches they kept.
    """

    size: int
    schedule: StopSchedule
    finished: list[SparseImages] = field(default_factory=list)
    begun: list[State] = field(default_factory=list)
    following: int = 0
    spent: dict[int, int] = field(default_factory=dict)


WORK_FILE = "work.safetensors"


class Checkpoint:
    """A directory with one file of images per finished batch, and one with the batches in work.

    A finished batch is written once; only the batches in work are written again, every
    `interval` seconds, and then at most `LARGEST_SHARE` of the time goes into writing. For
    64 images at 224 px that file has 154 MB while dense and 74 MB under the paper's last
    stop (pixels, two moments, stopped pixels).

    Args:
        directory: made if needed; belongs to one inversion.
        identity: what the images are a function of, by name, as text.
        interval: least seconds between two writings of the batches in work.
    """

    def __init__(self, directory: str | os.PathLike[str], identity: dict[str, str], interval: float) -> None:
        self.directory = writable_directory(directory)
        self.identity, self.interval = identity, interval
        for left in self.directory.glob(".*.safetensors"):  # half-written by a killed process
            left.unlink()
        self.parts: dict[str, str] = {}
        self.written, self.cost = time.monotonic(), 0.0

    @property
    def path(self) -> Path:
        """The file that says what is done; what it does not name is not there."""
        return self.directory / WORK_FILE

    def load(self, like: Tensor) -> Work | None:
        """What was done and begun, on the device of `like`; None where nothing was written yet.

        Raises:
            FileFormatError: a file is truncated, changed, of another version or of another
                inversion; which, and what differs.
        """
        if not self.path.exists():
            return None
        tensors, metadata = load_tensors(self.path, FORMAT, VERSION)
        theirs = json.loads(metadata["identity"])
        differing = sorted(name for name in self.identity if theirs.get(name) != self.identity[name])
        if differing:
            raise FileFormatError(f"{self.path}: of another inversion, which differs in {', '.join(differing)}")
        self.parts = json.loads(metadata["parts"])
        numbers = sorted({int(name.partition("/")[0]) for name in tensors})
        begun = [
            State.from_tensors({n.partition("/")[2]: t for n, t in tensors.items() if int(n.partition("/")[0]) == i})
            for i in numbers
        ]
        return Work(
            size=int(metadata["size"]),
            schedule=StopSchedule.parse(metadata["schedule"]),
            finished=[self._part(name, digest) for name, digest in self.parts.items()],
            begun=[state.map(lambda tensor: tensor.to(like.device)) for state in begun],
            following=int(metadata["following"]),
            spent=_spent(metadata),
        )

    def _part(self, name: str, digest: str) -> SparseImages:
        path = self.directory / name
        images = SparseImages.load(path)
        if digest_of([images.images, images.stopped_at, images.ids]) != digest:
            raise FileFormatError(f"{path}: of another inversion, its images are not those that {self.path} tells of")
        return images

    def save_if_due(self, work: Work) -> None:
        """Write the batches in work if the interval has passed."""
        since = time.monotonic() - self.written
        if since >= self.interval and self.cost <= LARGEST_SHARE * since:
            self.save(work)

    def save(self, work: Work) -> None:
        """Write what is finished and not yet written, then the batches in work."""
        started = time.monotonic()
        for images in work.finished[len(self.parts) :]:
            name = f"images-{int(images.ids[0]):08d}.safetensors"
            images.save(self.directory / name)
            self.parts[name] = digest_of([images.images, images.stopped_at, images.ids])
        tensors = {f"{i}/{name}": t for i, state in enumerate(work.begun) for name, t in state.tensors().items()}
        metadata = {
            "identity": json.dumps(self.identity), "parts": json.dumps(self.parts), "spent": json.dumps(work.spent),
            "schedule": str(work.schedule),
        }  # fmt: skip
        save_tensors(
            self.path, tensors, FORMAT, VERSION, **metadata, size=str(work.size), following=str(work.following)
        )
        self.written = time.monotonic()
        self.cost = self.written - started


def stored_key(directory: str | os.PathLike[str]) -> int | None:
    """The integer that the inversion in `directory` draws by; None where there is none.

    Raises:
        FileFormatError: as `Checkpoint.load`.
    """
    metadata = _metadata(directory)
    return int(json.loads(metadata["identity"])["generator"]) if metadata else None


def stored_spent(directory: str | os.PathLike[str]) -> dict[int, int]:
    """Iterations of single images that the inversion in `directory` took, by the patches they kept; empty where none.

    Raises:
        FileFormatError: as `Checkpoint.load`.
    """
    metadata = _metadata(directory)
    return _spent(metadata) if metadata else {}


def _metadata(directory: str | os.PathLike[str]) -> dict[str, str]:
    """What the file of the inversion in `directory` says of it; empty where there is none."""
    path = Path(directory) / WORK_FILE
    return load_tensors(path, FORMAT, VERSION)[1] if path.exists() else {}


def _spent(metadata: dict[str, str]) -> dict[int, int]:
    return {int(kept): count for kept, count in json.loads(metadata["spent"]).items()}


def identity_of(model: nn.Module, targets: Tensor, problem: Problem, teacher_id: int) -> dict[str, str]:
    """All that decides the images of an inversion; long things by their SHA-256."""
    statistics, warm = problem.statistics, problem.warm
    return {
        "model": digest_of(model.state_dict().values()),
        "targets": digest_of([targets]),
        "config": repr(problem.config),
        "generator": str(problem.key),
        "statistics": digest_of(() if statistics is None else (*statistics.mean, *statistics.std)),
        "warm": digest_of(() if warm is None else (warm.images, warm.ids)),
        "teacher_id": str(teacher_id),
    }


def digest_of(tensors: Iterable[Tensor]) -> str:
    """SHA-256 of tensors in their order."""
    sums = checksums({str(i): tensor.detach().cpu() for i, tensor in enumerate(tensors)}, {})
    return hashlib.sha256(json.dumps(sums).encode()).hexdigest()
