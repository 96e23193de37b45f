"""A federated run on disk, so that a killed server goes on where it was."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from torch import Tensor

from smi_fed.distillation import DistillationRecord
from smi_fed.files import FileFormatError, load_tensors, save_tensors, writable_directory, write_json
from smi_fed.inversion import FeatureStatistics, SparseImages
from smi_fed.models import ModelSpec, build_model
from smi_fed.pipeline import InversionRecord, TrainedTeacher
from smi_fed.strategies.admission import Verdict
from smi_fed.strategies.round_record import RoundRecord, Weights
from smi_fed.strategies.wrapping import layers

VERSION = 1
TEACHER, GLOBAL = "smi-fed.teacher", "smi-fed.global"


class RunState:
    """What a run has done, in a directory of its own.

    A round leaves, in this order: its verdicts with the admitted models, one file of images
    per teacher (and a checkpoint of the inversion in hand), the global model with the inner
    strategy's memory, and last its line in `rounds.json`, which alone says that it is over.

    Args:
        directory: made if needed.
        identity: what the run's result is a function of, by name.

    Raises:
        FileFormatError: what stands there is damaged or of another run; what differs is named.
    """

    def __init__(self, directory: str | os.PathLike[str], identity: Mapping[str, str]) -> None:
        self.directory = writable_directory(directory)
        self.identity = {name: hashlib.sha256(text.encode()).hexdigest()[:16] for name, text in identity.items()}
        self.lines: list[dict[str, Any]] = []
        path = self.directory / "rounds.json"
        if not path.exists():
            write_json(path, self._content())
            return
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            theirs, self.lines = content["identity"], content["rounds"]
        except (ValueError, KeyError, TypeError) as error:
            raise FileFormatError(f"{path}: truncated or not of a run ({error})") from error
        if content.get("version") != VERSION:
            raise FileFormatError(f"{path}: version is {content.get('version')!r}, this smi-fed reads {VERSION}")
        differing = sorted(name for name in self.identity if theirs.get(name) != self.identity[name])
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

    def save_verdicts(self, server_round: int, verdicts: list[Verdict]) -> None:
        """Write who was admitted and what they sent; the last file makes it count."""
        numbers = []
        for verdict in verdicts:
            number = None
            if verdict.teacher is not None:
                number = sum(each is not None for each in numbers)
                _save_teacher(self._path(server_round, f"model{number}.safetensors"), verdict.teacher)
            numbers.append(number)
        write_json(self._path(server_round, "verdicts.json"), [
            {"node": str(v.node), "architecture": v.architecture, "num_examples": v.num_examples,
             "train_loss": v.train_loss, "metrics": dict(v.metrics), "reason": v.reason, "teacher": number}
            for v, number in zip(verdicts, numbers, strict=True)
        ])  # fmt: skip

    def has_verdicts(self, server_round: int) -> bool:
        """Whether the replies of a round were judged."""
        return self._path(server_round, "verdicts.json").exists()

    def verdicts(self, server_round: int) -> list[Verdict]:
        """The verdicts of a round with their teachers, on the CPU."""
        found = []
        for line in json.loads(self._path(server_round, "verdicts.json").read_text(encoding="utf-8")):
            number = line.pop("teacher")
            model = None if number is None else self._path(server_round, f"model{number}.safetensors")
            teacher = None if model is None else _load_teacher(model)
            found.append(Verdict(**{**line, "node": int(line["node"])}, teacher=teacher))
        return found

    def inversion(self, server_round: int, number: int) -> InversionRecord | None:
        """What the inversion of one teacher took, if its images are written; else None."""
        path = self._path(server_round, f"inversion{number}.json")
        return InversionRecord(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None

    def save_inversion(self, server_round: int, number: int, record: InversionRecord) -> None:
        """One teacher's images are written; its checkpoint is not needed any more."""
        write_json(self._path(server_round, f"inversion{number}.json"), asdict(record))
        shutil.rmtree(self.checkpoint(server_round, number), ignore_errors=True)

    def checkpoint(self, server_round: int, number: int) -> Path:
        """The directory of one teacher's inversion."""
        return self._path(server_round, f"inversion{number}")

    def close(self, record: RoundRecord, clients: list[str], weights: Weights, strategy: Any) -> None:
        """Write the global model and the inner strategy's memory; then the round is over.

        Args:
            clients: what the pool calls them.
        """
        tensors = {f"global.{key}": weight for key, weight in weights.items()}
        memory, numbers = remember(strategy)
        tensors |= {f"memory.{key}": torch.from_numpy(np.array(value)) for key, value in memory.items()}
        told = {"numbers": json.dumps(numbers), "order": json.dumps(list(weights))}
        save_tensors(self._global(record.round), tensors, GLOBAL, VERSION, **told)
        self.lines.append({
            "round": record.round,
            "clients": clients,
            "classes": [teacher.classes for teacher in record.teachers],
            "inversions": [asdict(each) for each in record.inversions],
            "distillation": asdict(record.distillation),
            "reused": record.reused,
            "refined": record.refined,
            "seconds": record.seconds,
        })  # fmt: skip
        write_json(self.directory / "rounds.json", self._content())
        self._global(record.round - 1).unlink(missing_ok=True)
        for path in self.directory.glob(f"round{record.round - 1}-*.safetensors"):
            path.unlink()

    def resume(self, strategy: Any) -> ArrayRecord | None:
        """The global model after the last round, with the inner strategy's memory put back; None before any."""
        if not self.lines:
            return None
        tensors, metadata = load_tensors(self._global(self.completed), GLOBAL, VERSION)
        memory = {k.removeprefix("memory."): t.numpy() for k, t in tensors.items() if k.startswith("memory.")}
        recall(strategy, memory, json.loads(metadata["numbers"]))
        weights = {k.removeprefix("global."): t for k, t in tensors.items() if k.startswith("global.")}
        # In the order of the model: safetensors sorts its keys, strategies go by position.
        return ArrayRecord({key: Array(weights[key].numpy()) for key in json.loads(metadata["order"])})

    def records(self, images: Path) -> list[RoundRecord]:
        """The rounds that are over; the last one with its verdicts and images, from the directory `images`."""
        found = []
        for line in self.lines:
            record = RoundRecord(
                line["round"],
                inversions=[InversionRecord(**each) for each in line["inversions"]],
                distillation=DistillationRecord(**line["distillation"]),
                reused=line["reused"],
                refined=line["refined"],
                seconds=line["seconds"],
            )
            if line["round"] == self.completed:
                record.verdicts = self.verdicts(line["round"])
            record.images = [
                SparseImages.load(image_path(images, line["round"], i)) for i in range(len(line["clients"]))
            ]
            found.append(record)
        return found

    def _path(self, server_round: int, name: str) -> Path:
        return self.directory / f"round{server_round}-{name}"

    def _global(self, server_round: int) -> Path:
        return self.directory / f"global{server_round}.safetensors"


def image_path(directory: Path, server_round: int, number: int) -> Path:
    """Where one teacher's images of a round stand."""
    return directory / f"round{server_round}-teacher{number}.safetensors"


def _save_teacher(path: Path, teacher: TrainedTeacher) -> None:
    tensors: dict[str, Tensor] = {f"model.{key}": value for key, value in teacher.model.state_dict().items()}
    known = teacher.statistics
    if known is not None:
        tensors |= {f"mean.{i}": each for i, each in enumerate(known.mean)}
        tensors |= {f"std.{i}": each for i, each in enumerate(known.std)}
    told = {
        "name": teacher.name, "num_examples": teacher.num_examples, "label_counts": teacher.label_counts,
        "classes": teacher.classes, "num_classes": teacher.num_classes,
        "examples": None if known is None else known.examples,
    }  # fmt: skip
    save_tensors(path, tensors, TEACHER, VERSION, spec=teacher.model.spec.to_json(), told=json.dumps(told))


def _load_teacher(path: Path) -> TrainedTeacher:
    tensors, metadata = load_tensors(path, TEACHER, VERSION)
    told = json.loads(metadata["told"])
    model = build_model(ModelSpec.from_json(metadata["spec"]))
    model.load_state_dict({k.removeprefix("model."): t for k, t in tensors.items() if k.startswith("model.")})
    examples, known = told.pop("examples"), None
    if examples is not None:
        means, stds = (
            tuple(tensors[f"{kind}.{i}"] for i in range(sum(k.startswith(f"{kind}.") for k in tensors)))
            for kind in ("mean", "std")
        )
        known = FeatureStatistics(means, stds, examples)
    lists = {key: None if told[key] is None else tuple(told[key]) for key in ("label_counts", "classes")}
    return TrainedTeacher(**{**told, **lists}, model=model.eval(), statistics=known)


def remember(strategy: Any) -> tuple[dict[str, np.ndarray[Any, Any]], dict[str, Any]]:
    """What a strategy and those inside it hold from round to round: arrays by path, and numbers.

    Flower's strategies keep their memory in plain attributes: numbers, arrays, and lists,
    dicts and ArrayRecords of arrays. Whatever else an attribute is was given at construction.
    """
    arrays: dict[str, np.ndarray[Any, Any]] = {}
    numbers: dict[str, Any] = {}
    for depth, layer in enumerate(layers(strategy)):
        for name, value in vars(layer).items():
            path = f"{depth}/{name}"
            if isinstance(value, bool | int | float):
                numbers[path] = value
            elif isinstance(value, np.ndarray):
                arrays[path] = value
            elif isinstance(value, list | tuple) and value and all(isinstance(v, np.ndarray) for v in value):
                arrays |= {f"{path}/list/{i}": v for i, v in enumerate(value)}
            elif isinstance(value, ArrayRecord):
                arrays |= {f"{path}/record/{k}": v.numpy() for k, v in value.items()}
                numbers[f"{path}/order"] = list(value)
            elif isinstance(value, dict) and value and all(isinstance(v, np.ndarray) for v in value.values()):
                arrays |= {f"{path}/dict/{k}": v for k, v in value.items()}
                numbers[f"{path}/order"] = list(value)
    return arrays, numbers


def recall(strategy: Any, arrays: Mapping[str, np.ndarray[Any, Any]], numbers: Mapping[str, Any]) -> None:
    """Put back what `remember` gave."""
    owners = list(layers(strategy))
    grouped: dict[tuple[int, str, str], dict[str, np.ndarray[Any, Any]]] = {}
    for path, value in arrays.items():
        depth, name, *rest = path.split("/", 3)
        if not rest:
            setattr(owners[int(depth)], name, value)
        else:
            grouped.setdefault((int(depth), name, rest[0]), {})[rest[1]] = value
    for (depth, name, kind), values in grouped.items():
        if kind == "list":
            setattr(owners[depth], name, [values[str(i)] for i in range(len(values))])
            continue
        order = numbers[f"{depth}/{name}/order"]
        if kind == "dict":
            setattr(owners[depth], name, {key: values[key] for key in order})
        else:
            setattr(owners[depth], name, ArrayRecord({key: Array(values[key]) for key in order}))
    for path, value in numbers.items():
        depth, name, *rest = path.split("/", 2)
        if not rest:
            setattr(owners[int(depth)], name, value)
