"""Doors of files: damaged ones, and hostile ones whose checksums are right."""

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from random import Random

import numpy as np
import safetensors.torch
import torch
from flwr.app import Message
from flwr.serverapp.strategy import FedAvg

from simulations.local_grid import InProcessGrid
from smi_fed.checks import SettingError
from smi_fed.distillation import DistillationConfig
from smi_fed.files import FileFormatError, load_tensors, save_tensors
from smi_fed.inversion import InversionConfig, invert
from smi_fed.inversion.checkpoint import FORMAT, VERSION, Checkpoint
from smi_fed.models import build_seeded
from smi_fed.pipeline import PipelineConfig
from smi_fed.report import SCHEMA_VERSION, STUDENT_FORMAT, STUDENT_VERSION, load_student, read_report, save_student
from smi_fed.sparse_images import FORMAT as IMAGES_FORMAT
from smi_fed.sparse_images import VERSION as IMAGES_VERSION
from smi_fed.sparse_images import SparseImages
from smi_fed.strategies import DataFreeDistillation
from smi_fed.strategies.run_state import RunState
from smi_fed.weights import load_weights
from tests.fuzz import mutations, payloads
from tests.fuzz.door import MEBIBYTE, Case, Door
from tests.fuzz.replies import spec_text
from tests.fuzz.server import CPU, SPEC, good, model, room
from tests.test_report_page import full
from tests.test_sparse_images import sparse

FILE = (FileFormatError, FileNotFoundError)


def path_of(name: str, data: bytes) -> Path:
    path = room() / name
    path.write_bytes(data)
    return path


@cache
def written(kind: str) -> bytes:
    """A good file of each kind."""
    path = room() / f"good-{kind}.safetensors"
    if kind == "images":
        sparse(3).save(path)
    else:
        save_student(path, build_seeded(SPEC, 1))
    return path.read_bytes()


def hostile(rng: Random, kind: str, form: str, version: int) -> Path:
    """A file with other bytes, another header, or other tensors under checksums that are right."""
    data, path = written(kind), room() / f"{kind}.safetensors"
    if rng.random() < 0.5:
        return path_of(path.name, payloads.safetensors_file(rng, data))
    good_path = path_of(f"plain-{path.name}", data)
    tensors, metadata = load_tensors(good_path, form, version)
    for key in rng.sample(sorted(tensors), rng.randrange(1, 4)):
        change = rng.randrange(4)
        if change == 0:
            del tensors[key]
        elif change == 1:
            tensors[rng.choice(("x", "model.x", "images", "mask"))] = tensors[key]
        else:
            tensors[key] = other_values(rng, tensors[key])
    if "spec" in metadata and rng.random() < 0.5:
        metadata["spec"] = spec_text(rng).encode(errors="replace").decode()
    metadata = {key: value for key, value in metadata.items() if key not in ("format", "version")}
    save_tensors(path, tensors, form, version, **metadata)
    return path


def other_values(rng: Random, tensor: torch.Tensor) -> torch.Tensor:
    kind = rng.randrange(6)
    if kind == 0:
        return tensor.to(rng.choice((torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool)))
    if kind == 1:
        return tensor.flatten()[: rng.randrange(3)]
    if kind == 2:
        return tensor[None].expand(rng.choice((1, 2, 7)), *tensor.shape).clone()
    if kind == 3:
        return tensor.new_zeros(rng.choice(((), (0,), (0, 3, 5), (4, 0, 2, 2), (1,) * 9)))
    found = tensor.clone().flatten().numpy()
    if found.size:
        with np.errstate(all="ignore"):
            found[rng.randrange(found.size)] = np.float64(mutations.number(rng)).astype(found.dtype)
    return torch.from_numpy(found).view(tensor.shape)


def images(rng: Random) -> Case:
    path = hostile(rng, "images", IMAGES_FORMAT, IMAGES_VERSION)

    def enter() -> None:
        found = SparseImages.load(path)
        assert bool(((found.images >= 0) & (found.images <= 1)).all())
        assert found.soft_labels is None or bool(found.soft_labels.isfinite().all())
        assert bool(found.targets.isfinite().all())
        found.masked(0.5)
        assert len(SparseImages.concat([found, found])) == 2 * len(found)

    return Case(path.stat().st_size, enter)


def student(rng: Random) -> Case:
    path = hostile(rng, "student", STUDENT_FORMAT, STUDENT_VERSION)
    return Case(path.stat().st_size, lambda: load_student(path))


@cache
def full_report() -> dict:
    return {"schema": SCHEMA_VERSION, **full()}


def report(rng: Random) -> Case:
    text = mutations.as_json(rng, mutations.tree(rng, full_report(), ("schema", "rounds"))).encode(errors="replace")
    data = mutations.scrambled(rng, text) if rng.random() < 0.4 else text
    path = path_of("report.json", data)

    def enter() -> None:
        assert read_report(path)["schema"] == 1

    return Case(len(data), enter)


@cache
def weight_files() -> tuple[tuple[str, bytes], ...]:
    state, found = dict(model().backbone.state_dict()), []
    for suffix, save in (
        (".safetensors", lambda path: safetensors.torch.save_file(state, path)),
        (".pth", lambda path: torch.save({"model": state, "epoch": 3}, path)),
        (".old.pth", lambda path: torch.save(state, path, _use_new_zipfile_serialization=False)),
    ):
        save(room() / f"weights{suffix}")
        found.append((suffix, (room() / f"weights{suffix}").read_bytes()))
    return tuple(found)


def weights(rng: Random) -> Case:
    """A file that its owner names: of a stranger's making all the same."""
    suffix, data = weight_files()[0]
    return loading(suffix, payloads.safetensors_file(rng, data))


def torch_weights(rng: Random) -> Case:
    """The same by `torch.save`, whose older format takes memory for what it claims."""
    suffix, data = rng.choice(weight_files()[1:])
    return loading(suffix, rng.choice(payloads.pickled()) if rng.random() < 0.2 else mutations.scrambled(rng, data))


def loading(suffix: str, data: bytes) -> Case:
    path, backbone = path_of(f"hostile{suffix}", data), build_seeded(SPEC, 0).backbone
    return Case(len(data), lambda: load_weights(backbone, str(path)))


class StoppedError(BaseException):
    """Ends an inversion."""


def _stop(now) -> None:
    if now.done == 4:
        raise StoppedError


@cache
def half_done() -> dict[str, bytes]:
    """Files of an inversion that was stopped."""
    directory = room() / "half"
    config = InversionConfig.paper(iterations=6, schedule="2:0.5", batch_size=2)
    with suppress(StoppedError):
        invert(
            model(), torch.tensor([0, 1, 2, 0]), config, generator=torch.Generator().manual_seed(0),
            checkpoint=directory, checkpoint_interval=0, progress=_stop,
        )  # fmt: skip
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def inversion(rng: Random) -> Case:
    files = half_done()
    directory = room() / "inversion"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    for name, data in files.items():
        (directory / name).write_bytes(data)
    hurt = directory / rng.choice(sorted(files))
    hurt.write_bytes(payloads.safetensors_file(rng, hurt.read_bytes()))
    if hurt.name == "work.safetensors" and rng.random() < 0.5:
        remade(rng, files, directory)
    known, like = Checkpoint(directory, {}, 1.0), torch.zeros(1)

    def enter() -> None:
        queue = known.load(like)
        assert queue is not None
        assert all(bool(state.ids.isfinite().all()) for state in queue.begun)

    return Case(sum(map(len, files.values())), enter)


def remade(rng: Random, files: dict[str, bytes], directory: Path) -> None:
    """The work in hand with other tensors or other texts, under checksums that are right."""
    path = path_of("work.safetensors", files["work.safetensors"])
    tensors, metadata = load_tensors(path, FORMAT, VERSION)
    if rng.random() < 0.5:
        key = rng.choice(sorted(tensors))
        tensors[key] = other_values(rng, tensors[key])
        if rng.random() < 0.3:
            tensors[rng.choice(("x", "7/ids", "0/first.x"))] = tensors.pop(key)
    else:
        key = rng.choice(sorted(set(metadata) - {"format", "version"}))
        metadata[key] = mutations.as_json(rng, mutations.plain(rng)).encode(errors="replace").decode()
    metadata = {key: value for key, value in metadata.items() if key not in ("format", "version")}
    save_tensors(directory / "work.safetensors", tensors, FORMAT, VERSION, **metadata)


def _client(message, context):
    return Message(good(1), reply_to=message)


RUN = {
    "student": SPEC,
    "pipeline": PipelineConfig(
        2, InversionConfig.paper(iterations=2, schedule="1:0.5"), DistillationConfig(steps=1, batch_size=2)
    ),
}


@cache
def finished() -> Path:
    """The directory of a run after its first round."""
    directory = room() / "run"
    inner = FedAvg(fraction_evaluate=0.0, min_train_nodes=1, min_available_nodes=1)
    strategy = DataFreeDistillation(inner, min_teachers=1, state_directory=directory, **RUN)
    strategy.start(grid=InProcessGrid(_client, {11: {}}), initial_arrays=strategy.initial_arrays, num_rounds=1)
    return directory


@cache
def identity() -> dict[str, str]:
    """Of that run."""
    inner = FedAvg(fraction_evaluate=0.0, min_train_nodes=1, min_available_nodes=1)
    return DataFreeDistillation(inner, min_teachers=1, **RUN).core._identity()


def run_state(rng: Random) -> Case:
    """Any file of a run, changed. They hold seconds that were measured: another process may change other bytes."""
    directory = room() / "state"
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(finished(), directory)
    hurt = rng.choice(sorted(path for path in directory.rglob("*") if path.is_file()))
    data = hurt.read_bytes()
    if hurt.suffix == ".json" and rng.random() < 0.6:
        value = mutations.tree(rng, mutations.tree(rng, json.loads(data)))
        hurt.write_bytes(mutations.as_json(rng, value).encode(errors="replace"))
    else:
        hurt.write_bytes(mutations.scrambled(rng, data))
    inner = FedAvg(fraction_evaluate=0.0)

    def enter() -> None:
        state = RunState(directory, None, identity(), CPU)
        for record in state.records():
            for verdict in record.verdicts:
                if verdict.teacher is not None:
                    verdict.teacher.load(verify=True)
                    state.inverted(verdict.teacher)
                if verdict.images is not None:
                    state.has_images(verdict.images)
        state.resume(inner)

    return Case(sum(path.stat().st_size for path in directory.rglob("*") if path.is_file()), enter)


def door(name: str, what: str, make: Callable[[Random], Case], share: int, *more: type[Exception]) -> Door:
    return Door(name, what, make, share, (*FILE, *more), memory=64 * MEBIBYTE)


DOORS = (
    door("images", "stored images", images, 150),
    door("student", "a student's file", student, 12),
    door("report.json", "a run's report", report, 200),
    door("inversion", "an inversion that was stopped", inversion, 20),
    # Each verdict's model is loaded, and a changed file may have ten thousand.
    Door("run", "a run that was stopped", run_state, 12, FILE, memory=64 * MEBIBYTE, seconds=60.0),
    door("weights", "a file of weights that its owner names, safetensors", weights, 20, SettingError),
    Door("torch weights", "the same by torch.save", torch_weights, 20, (SettingError,), memory=2**62),
)
