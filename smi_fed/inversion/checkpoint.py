"""An inversion on disk, so that a killed one goes on where it was."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor, nn

from smi_fed.files import FileFormatError, checksums, load_tensors, reading, save_tensors, writable_directory
from smi_fed.inversion.batch_queue import BatchQueue
from smi_fed.inversion.config import InversionConfig
from smi_fed.inversion.losses import FeatureStatistics
from smi_fed.inversion.schedule import StopSchedule
from smi_fed.inversion.state import State
from smi_fed.sparse_images import SparseImages

FORMAT, VERSION = "smi-fed.inversion", 3

LARGEST_SHARE = 0.02
"""Of the time: a checkpoint waits until the last one's writing is at most this share."""


WORK_FILE = "work.safetensors"


class Checkpoint:
    """A directory with one file of images per finished batch, and one with the batches in queue.

    A finished batch is written once; only the batches in work are written again, every
    `interval` seconds, and then at most `LARGEST_SHARE` of the time goes into writing. For
    64 images at 224 px that file has 154 MB while dense and 74 MB under the paper's last
    stop (pixels, two moments, stopped pixels).

    Args:
        directory: made if needed; belongs to one inversion.
        identity: what the images are a function of, by name, as text.
        interval: least seconds between two writings of the batches in queue.
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

    def load(self, like: Tensor) -> BatchQueue | None:
        """What was done and begun, on the device of `like`; None where nothing was written yet.

        Raises:
            FileFormatError: a file is truncated, changed, of another version or of another
                inversion; which, and what differs.
        """
        if not self.path.exists():
            return None
        with reading(self.path):
            return self._queue(like)

    def _queue(self, like: Tensor) -> BatchQueue:
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
        return BatchQueue(
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

    def save_if_due(self, queue: BatchQueue) -> None:
        """Write the batches in work if the interval has passed."""
        since = time.monotonic() - self.written
        if since >= self.interval and self.cost <= LARGEST_SHARE * since:
            self.save(queue)

    def save(self, queue: BatchQueue) -> None:
        """Write what is finished and not yet written, then the batches in queue."""
        started = time.monotonic()
        for images in queue.finished[len(self.parts) :]:
            name = f"images-{int(images.ids[0]):08d}.safetensors"
            images.save(self.directory / name)
            self.parts[name] = digest_of([images.images, images.stopped_at, images.ids])
        tensors = {f"{i}/{name}": t for i, state in enumerate(queue.begun) for name, t in state.tensors().items()}
        metadata = {
            "identity": json.dumps(self.identity), "parts": json.dumps(self.parts), "spent": json.dumps(queue.spent),
            "schedule": str(queue.schedule),
        }  # fmt: skip
        save_tensors(
            self.path, tensors, FORMAT, VERSION, **metadata, size=str(queue.size), following=str(queue.following)
        )
        self.written = time.monotonic()
        self.cost = self.written - started


def stored_key(directory: str | os.PathLike[str]) -> int | None:
    """The integer that the inversion in `directory` draws by; None where there is none.

    Raises:
        FileFormatError: as `Checkpoint.load`.
    """
    metadata = _metadata(directory)
    with reading(Path(directory) / WORK_FILE):
        return int(json.loads(metadata["identity"])["generator"]) if metadata else None


def stored_spent(directory: str | os.PathLike[str]) -> dict[int, int]:
    """Iterations of single images that the inversion in `directory` took, by the patches they kept; empty where none.

    Raises:
        FileFormatError: as `Checkpoint.load`.
    """
    metadata = _metadata(directory)
    with reading(Path(directory) / WORK_FILE):
        return _spent(metadata) if metadata else {}


def _metadata(directory: str | os.PathLike[str]) -> dict[str, str]:
    """What the file of the inversion in `directory` says of it; empty where there is none."""
    path = Path(directory) / WORK_FILE
    return load_tensors(path, FORMAT, VERSION)[1] if path.exists() else {}


def _spent(metadata: dict[str, str]) -> dict[int, int]:
    return {int(kept): count for kept, count in json.loads(metadata["spent"]).items()}


def identity_of(
    model: nn.Module,
    targets: Tensor,
    config: InversionConfig,
    key: int,
    statistics: FeatureStatistics | None,
    warm: SparseImages | None,
    teacher_id: int,
) -> dict[str, str]:
    """All that decides the images of an inversion; long things by their SHA-256."""
    known = statistics if config.statistics > 0 else None
    return {
        "model": digest_of(model.state_dict().values()),
        "targets": digest_of([targets]),
        "config": repr(config),
        "generator": str(key),
        "statistics": digest_of(() if known is None else (*known.mean, *known.std)),
        "warm": digest_of(() if warm is None else (warm.images, warm.ids)),
        "teacher_id": str(teacher_id),
    }


def digest_of(tensors: Iterable[Tensor]) -> str:
    """SHA-256 of tensors in their order."""
    sums = checksums({str(i): tensor.detach().cpu() for i, tensor in enumerate(tensors)}, {})
    return hashlib.sha256(json.dumps(sums).encode()).hexdigest()
