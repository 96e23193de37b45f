"""A federated run on disk: what does not have to be in memory, and what a killed server goes on from."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
import tempfile
import zlib
from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord

from smi_fed.distillation import DistillationRecord, Opinion
from smi_fed.files import (
    FileFormatError,
    load_tensors,
    read_json,
    reading,
    save_tensors,
    writable_directory,
    write_json,
)
from smi_fed.pipeline import InversionRecord
from smi_fed.sparse_images import StoredImages
from smi_fed.strategies.memory import recall, remember
from smi_fed.strategies.round_record import RoundRecord, Verdict, Weights
from smi_fed.teachers import StoredTeacher, TrainedTeacher, facts_of, store, stored_from

log = logging.getLogger("smi_fed")

VERSION = 2
GLOBAL = "smi-fed.global"
MODEL, INVERSION, CHECKPOINT = ".model.safetensors", ".inversion.json", ".checkpoint"


class RunState:
    """What a run has done, in a directory of its own.

    A round leaves, in this order: each admitted model as it arrives, each teacher's images (and a
    checkpoint of the inversion in hand), its verdicts once all replies are judged, the global model
    with the inner strategy's memory, and last its line in `rounds.json`, which alone says that it is
    over. Files are named by the client, so that another order of replies, or one client less,
    changes nothing.

    Args:
        directory: made if needed; None is a temporary one, which ends with this object.
        images: where images go; None is within `directory`.
        identity: what the run's result is a function of, by name.
        device: where teachers are loaded to.

    Raises:
        FileFormatError: what stands there is damaged or of another run; what differs is named.
    """

    def __init__(
        self, directory: Path | None, images: Path | None, identity: Mapping[str, str], device: torch.device
    ) -> None:
        self._temporary = tempfile.TemporaryDirectory(prefix="smi-fed-") if directory is None else None
        self.directory = writable_directory(directory or Path(self._temporary.name))  # type: ignore[union-attr]
        self.images = writable_directory(images or self.directory / "images")
        self.device = device
        self.identity = {name: hashlib.sha256(text.encode()).hexdigest()[:16] for name, text in identity.items()}
        self.lines: list[dict[str, Any]] = []
        path = self.directory / "rounds.json"
        if not path.exists():
            write_json(path, self._content())
            return
        with reading(path):
            content = read_json(path)
            theirs, self.lines, version = content["identity"], list(content["rounds"]), content["version"]
            names = theirs.keys() | self.identity.keys()
        if version != VERSION:
            raise FileFormatError(f"{path}: version is {version!r}, this smi-fed reads {VERSION}")
        differing = sorted(name for name in names if theirs.get(name) != self.identity.get(name))
        if differing:
            raise FileFormatError(
                f"{path}: of another, unfinished run, which differs in {', '.join(differing)}; run that one to its "
                "end, or delete the directory to begin anew"
            )

    def _content(self) -> dict[str, Any]:
        return {"version": VERSION, "identity": self.identity, "rounds": self.lines}

    @property
    def completed(self) -> int:
        """Rounds that are over."""
        return len(self.lines)

    def keep_teacher(self, server_round: int, teacher: TrainedTeacher, key: str) -> StoredTeacher:
        """Write an admitted model under `key`; what was made of another model of that key in this round goes."""
        stored = store(teacher, self._path(server_round, f"{key}{MODEL}"))
        record = _beside(stored, INVERSION)
        with reading(record):
            others = record.exists() and read_json(record)["teacher"] != stored.digest
        if others:
            self.forget_images(stored)
        return stored

    def forget_images(self, teacher: StoredTeacher) -> None:
        """Remove what was made of a model."""
        shutil.rmtree(self.checkpoint(teacher), ignore_errors=True)
        _beside(teacher, INVERSION).unlink(missing_ok=True)
        self.image_path(teacher).unlink(missing_ok=True)

    def inverted(self, teacher: StoredTeacher) -> tuple[StoredImages, InversionRecord] | None:
        """A teacher's images and what they took, if they are written and whole; else None."""
        path = _beside(teacher, INVERSION)
        if not path.exists():
            return None
        with reading(path):
            record = InversionRecord(**read_json(path)["inversion"])
        images = StoredImages(self.image_path(teacher), record.images)
        return (images, record) if self.has_images(images) else None

    def has_images(self, images: StoredImages) -> bool:
        """Whether stored images can be read; a line of log says why not."""
        try:
            return len(images.load()) == images.count
        except (FileNotFoundError, FileFormatError) as error:
            log.warning("images are made again: %s", error)
            return False

    def keep_images(self, teacher: StoredTeacher, record: InversionRecord) -> StoredImages:
        """Write what a teacher's images, which are there, took; then its checkpoint is not needed any more."""
        write_json(_beside(teacher, INVERSION), {"teacher": teacher.digest, "inversion": asdict(record)})
        shutil.rmtree(self.checkpoint(teacher), ignore_errors=True)
        return StoredImages(self.image_path(teacher), record.images)

    def image_path(self, teacher: StoredTeacher) -> Path:
        """Where a teacher's images stand."""
        return self.images / _beside(teacher, ".safetensors").name

    def checkpoint(self, teacher: StoredTeacher) -> Path:
        """The directory of a teacher's inversion."""
        return _beside(teacher, CHECKPOINT)

    def keep_verdicts(self, server_round: int, verdicts: list[Verdict]) -> None:
        """Write what became of every node that was asked: from now on nobody is asked again in this round."""
        write_json(self._path(server_round, "verdicts.json"), [_line(verdict) for verdict in verdicts])

    def forget_verdicts(self, server_round: int) -> None:
        """All are to be asked again."""
        self._path(server_round, "verdicts.json").unlink(missing_ok=True)

    def verdicts(self, server_round: int) -> list[Verdict]:
        """The verdicts of a round; empty where not all replies were judged."""
        path = self._path(server_round, "verdicts.json")
        with reading(path):
            return [self._verdict(line) for line in read_json(path)] if path.exists() else []

    def _verdict(self, line: dict[str, Any]) -> Verdict:
        teacher, images, inversion, opinion = (
            line.pop(key, None) for key in ("teacher", "images", "inversion", "opinion")
        )
        return Verdict(
            **{**line, "node": int(line["node"])},
            teacher=None if teacher is None else stored_from(teacher, self.directory, self.device),
            images=None if images is None else StoredImages(self.images / images["file"], images["count"]),
            inversion=None if inversion is None else InversionRecord(**inversion),
            opinion=Opinion(**(opinion or {})),
        )

    def close(self, record: RoundRecord, clients: list[str], weights: Weights, strategy: Any) -> None:
        """Write the global model and the inner strategy's memory; then the round is over.

        Args:
            clients: what the pool calls them.
        """
        tensors = {f"global.{key}": weight for key, weight in weights.items()}
        memory, numbers = remember(strategy)
        tensors |= {f"memory.{key}": torch.from_numpy(np.array(value)) for key, value in memory.items()}
        metadata = {"numbers": json.dumps(numbers), "order": json.dumps(list(weights))}
        save_tensors(self._global(record.round), tensors, GLOBAL, VERSION, **metadata)
        self.keep_verdicts(record.round, record.verdicts)
        self.lines.append({
            "round": record.round,
            "clients": clients,
            "distillation": asdict(record.distillation),
            "reused": record.reused,
            "refined": record.refined,
            "seconds": record.seconds,
        })  # fmt: skip
        write_json(self.directory / "rounds.json", self._content())
        self._global(record.round - 1).unlink(missing_ok=True)
        for path in set(self.directory.glob(f"round*{MODEL}")).difference(each.path for each in record.teachers):
            path.unlink()
        for path in self.directory.glob(f"round{record.round}-*{CHECKPOINT}"):
            shutil.rmtree(path, ignore_errors=True)  # of inversions that diverged

    def forget_images_but(self, needed: Collection[Path]) -> None:
        """Images that nobody asked to keep go when no later round needs them."""
        if self._temporary is not None and self.images.parent == self.directory:
            for path in set(self.images.glob("*.safetensors")).difference(needed):
                path.unlink()

    def resume(self, strategy: Any) -> ArrayRecord | None:
        """The global model after the last round, with the inner strategy's memory put back; None before any."""
        if not self.lines:
            return None
        with reading(self._global(self.completed)):
            return self._global_model(strategy)

    def _global_model(self, strategy: Any) -> ArrayRecord:
        tensors, metadata = load_tensors(self._global(self.completed), GLOBAL, VERSION)
        memory = {k.removeprefix("memory."): t.numpy() for k, t in tensors.items() if k.startswith("memory.")}
        recall(strategy, memory, json.loads(metadata["numbers"]))
        weights = {k.removeprefix("global."): t for k, t in tensors.items() if k.startswith("global.")}
        # In the order of the model: safetensors sorts its keys, strategies go by position.
        return ArrayRecord({key: Array(weights[key].numpy()) for key in json.loads(metadata["order"])})

    def records(self) -> list[RoundRecord]:
        """The rounds that are over."""
        with reading(self.directory / "rounds.json"):
            return [self._record(line) for line in self.lines]

    def _record(self, line: dict[str, Any]) -> RoundRecord:
        return RoundRecord(
            line["round"],
            self.verdicts(line["round"]),
            distillation=DistillationRecord(**line["distillation"]),
            **{key: line[key] for key in ("reused", "refined", "seconds")},
        )

    def _path(self, server_round: int, name: str) -> Path:
        return self.directory / f"round{server_round}-{name}"

    def _global(self, server_round: int) -> Path:
        return self.directory / f"global{server_round}.safetensors"


def _beside(teacher: StoredTeacher, ending: str) -> Path:
    return teacher.path.with_name(teacher.path.name.removesuffix(MODEL) + ending)


def file_name(client: str) -> str:
    """A client's name as part of a file's: plain letters, and a checksum that tells apart what they do not."""
    plain = re.sub(r"[^A-Za-z0-9]+", "-", client).strip("-")[:40]
    return f"{plain}-{client_number(client):08x}"


def client_number(client: str) -> int:
    """A number for a client, the same in every run: of its draws, and stored with its images."""
    return zlib.crc32(client.encode())


def _line(verdict: Verdict) -> dict[str, Any]:
    """A verdict as JSON has it; 64-bit node ids do not survive JSON numbers."""
    names = ("architecture", "num_examples", "train_loss", "reason", "name", "sent", "received", "age")
    plain = {name: getattr(verdict, name) for name in names}
    teacher, images, inversion = verdict.teacher, verdict.images, verdict.inversion
    return plain | {
        "node": str(verdict.node),
        "metrics": dict(verdict.metrics),
        "teacher": None if teacher is None else facts_of(teacher),
        "images": None if images is None else {"file": images.path.name, "count": images.count},
        "inversion": None if inversion is None else asdict(inversion),
        "opinion": asdict(verdict.opinion),
    }
