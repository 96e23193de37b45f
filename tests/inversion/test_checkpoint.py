"""An inversion that was stopped goes on to the same images."""

import json
from dataclasses import replace

import pytest
import torch

from smi_fed.files import FileFormatError, load_tensors, save_tensors
from smi_fed.inversion import InversionConfig, PyramidConfig, feature_statistics, invert
from smi_fed.inversion.batch_queue import BatchQueue
from smi_fed.inversion.checkpoint import FORMAT, VERSION, Checkpoint
from smi_fed.sparse_images import SparseImages
from tests.models import masked_model, small_vit
from tests.same import assert_same

TARGETS = torch.tensor([0, 1, 2, 3, 4])
PIXELS = InversionConfig.paper(iterations=6, schedule="2:0.3,4:0.4", jitter=5, batch_size=2)
PYRAMID = replace(PIXELS, parametrisation=PyramidConfig((2, 4)), flip=False, jitter=0, background="rendered")


class KilledError(BaseException):
    pass


@pytest.fixture(autouse=True)
def _always_due(monkeypatch):
    monkeypatch.setattr("smi_fed.inversion.checkpoint.LARGEST_SHARE", float("inf"))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def killed_at(iteration):
    def progress(now):
        if now.done == iteration:
            raise KilledError

    return progress


def stopped_inversion(directory, model, at=9, config=PIXELS, **arguments):
    with pytest.raises(KilledError):
        invert(model, TARGETS, config, generator=seeded(), checkpoint=directory, checkpoint_interval=0,
               progress=killed_at(at), **arguments)  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "at"),
    [
        *(("pixels", at) for at in (1, 2, 3, 6, 7, 12, 18)), *(("pyramid", at) for at in (1, 3, 7)),
        *(("statistics", at) for at in (2, 12, 18)), *(("masked", at) for at in (3, 7, 18)),
    ],
)  # fmt: skip
def test_the_same_images_wherever_it_was_stopped(tmp_path, kind, at):
    model = masked_model("resnet") if kind == "masked" else small_vit()
    config = {"pixels": PIXELS, "masked": PIXELS, "pyramid": PYRAMID, "statistics": replace(PYRAMID, statistics=1.0)}
    known = feature_statistics(model, [torch.rand(8, 3, 16, 16)]) if kind == "statistics" else None
    whole = invert(model, TARGETS, config[kind], generator=seeded(), statistics=known)
    stopped_inversion(tmp_path, model, at, config[kind], statistics=known)
    seen = []
    found = invert(model, TARGETS, config[kind], generator=seeded(), statistics=known, checkpoint=tmp_path,
                   progress=seen.append)  # fmt: skip
    assert_same(found, whole)
    # The last write was after the iteration before, since progress comes first; batches that ended are written too.
    assert [now.done for now in seen] == list(range(max(1, at), 19))
    assert all(now.total == 18 for now in seen)


def test_a_finished_inversion_is_read_and_not_repeated(tmp_path, vit):
    whole = invert(vit, TARGETS, PIXELS, generator=seeded(), checkpoint=tmp_path)
    again = invert(vit, TARGETS, PIXELS, generator=seeded(), checkpoint=tmp_path, progress=pytest.fail)
    assert_same(again, whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "images-00000000.safetensors", "images-00000002.safetensors", "images-00000004.safetensors",
        "work.safetensors"]  # fmt: skip


def test_without_a_generator_the_checkpoints_own_key_goes_on(tmp_path, vit):
    with pytest.raises(KilledError):
        invert(vit, TARGETS, PIXELS, checkpoint=tmp_path, progress=killed_at(9))
    first = invert(vit, TARGETS, PIXELS, checkpoint=tmp_path)
    assert torch.equal(first.images[:2], SparseImages.load(tmp_path / "images-00000000.safetensors").images)


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        (lambda call: call.update(config=replace(PIXELS, tv=0.5)), "config"),
        (lambda call: call.update(targets=TARGETS.flip(0)), "targets"),
        (lambda call: call.update(model=small_vit(seed=1)), "model"),
        (lambda call: call.update(generator=seeded(1)), "generator"),
        (lambda call: call.update(teacher_id=3), "teacher_id"),
        (lambda call: call.update(teacher_id=3, targets=TARGETS.flip(0)), "targets, teacher_id"),
    ],
    ids=["config", "targets", "model", "generator", "teacher", "two"],
)
def test_the_checkpoint_of_another_inversion(tmp_path, vit, change, differs):
    stopped_inversion(tmp_path, vit)
    call = {"model": vit, "targets": TARGETS, "config": PIXELS, "generator": seeded()}
    change(call)
    with pytest.raises(FileFormatError, match=f"another inversion, which differs in {differs}$") as error:
        invert(**call, checkpoint=tmp_path)
    assert str(tmp_path / "work.safetensors") in str(error.value)


def broken(path, how):
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:-7])
    elif how == "flipped":
        content = bytearray(path.read_bytes())
        content[-3] ^= 4
        path.write_bytes(bytes(content))
    elif how == "foreign":
        save_tensors(path, {"a": torch.zeros(1)}, "other", 1)
    elif how == "texts":
        tensors, metadata = load_tensors(path, FORMAT, VERSION)
        kept = {key: value for key, value in metadata.items() if key not in ("format", "version")}
        save_tensors(path, tensors, FORMAT, VERSION, **{**kept, "parts": "[" * 100_000, "schedule": "soon"})
    elif how == "version":
        tensors, metadata = load_tensors(path, FORMAT, VERSION)
        kept = {key: value for key, value in metadata.items() if key not in ("format", "version")}
        save_tensors(path, tensors, FORMAT, 99, **kept)


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("truncated", "truncated"),
        ("flipped", "checksum"),
        ("foreign", "format is 'other'"),
        ("version", "'99'"),
        ("texts", "not what"),
    ],
)
def test_broken_work_is_refused(tmp_path, vit, how, says):
    stopped_inversion(tmp_path, vit)
    broken(tmp_path / "work.safetensors", how)
    for generator in (seeded(), None):
        with pytest.raises(FileFormatError, match=says) as error:
            invert(vit, TARGETS, PIXELS, generator=generator, checkpoint=tmp_path)
        assert "work.safetensors" in str(error.value)


@pytest.mark.parametrize(
    ("how", "says"), [("truncated", "truncated"), ("flipped", "checksum"), ("foreign", "format is 'other'")]
)
def test_broken_images_are_refused(tmp_path, vit, how, says):
    stopped_inversion(tmp_path, vit)
    broken(tmp_path / "images-00000000.safetensors", how)
    with pytest.raises(FileFormatError, match=says) as error:
        invert(vit, TARGETS, PIXELS, generator=seeded(), checkpoint=tmp_path)
    assert "images-00000000.safetensors" in str(error.value)


def test_images_of_another_inversion_or_none(tmp_path, vit):
    stopped_inversion(tmp_path, vit)
    path = tmp_path / "images-00000000.safetensors"
    invert(vit, TARGETS[:2], PIXELS, generator=seeded(7)).save(path)
    with pytest.raises(FileFormatError, match="of another inversion"):
        invert(vit, TARGETS, PIXELS, generator=seeded(), checkpoint=tmp_path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="images-00000000"):
        invert(vit, TARGETS, PIXELS, generator=seeded(), checkpoint=tmp_path)


def test_writing_waits_for_the_interval_and_for_its_own_cost(tmp_path, monkeypatch):
    clock = iter([100.0, 109.0, 110.0, 120.0, 159.0, 160.0])
    monkeypatch.setattr("smi_fed.inversion.checkpoint.LARGEST_SHARE", 0.02)
    monkeypatch.setattr("smi_fed.inversion.checkpoint.time.monotonic", lambda: next(clock))
    checkpoint = Checkpoint(tmp_path, {}, interval=10)
    written = []
    monkeypatch.setattr(checkpoint, "save", written.append)
    first, second = (BatchQueue(size, PIXELS.schedule) for size in (1, 2))
    for _ in range(2):
        checkpoint.save_if_due(first)
    assert written == [first]
    checkpoint.written, checkpoint.cost = 110.0, 1.0  # a write of a second is due again after fifty
    for _ in range(2):
        checkpoint.save_if_due(first)
    assert written == [first]
    checkpoint.save_if_due(second)
    assert written == [first, second]


def test_a_bad_interval(vit, tmp_path):
    with pytest.raises(ValueError, match="checkpoint_interval: got -1"):
        invert(vit, TARGETS, PIXELS, checkpoint=tmp_path, checkpoint_interval=-1)


def test_the_metadata_says_what_it_is_of(tmp_path, vit):
    stopped_inversion(tmp_path, vit)
    _, metadata = load_tensors(tmp_path / "work.safetensors", FORMAT, VERSION)
    assert "iterations=6" in json.loads(metadata["identity"])["config"]
