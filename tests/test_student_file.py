"""A student on disk: what comes back, and what is no student."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open

from smi_fed.checks import SettingError
from smi_fed.files import FileFormatError, save_tensors
from smi_fed.models import ModelSpec, build_model
from smi_fed.report import (
    STUDENT_FORMAT,
    STUDENT_VERSION,
    load_student,
    save_student,
)
from tests.models import TINY, masked_model, randomised, small_spec, small_vit
from tests.test_sparse_images import sparse


def saved(tmp_path, student=None):
    path = tmp_path / "student.safetensors"
    save_student(path, student or small_vit())
    return path


@pytest.mark.parametrize("kind", ["vit", "resnet", "one channel"])
def test_a_student_comes_back(tmp_path, kind):
    if kind == "resnet":
        student = masked_model("resnet")
        student.train()(torch.rand(4, 3, 32, 32))  # running statistics of their own
    else:
        spec = replace(small_spec(in_chans=1 if kind == "one channel" else 3), class_names=tuple("abcde"))
        student = randomised(build_model(replace(spec, std=(0.3,) * (1 if kind == "one channel" else 3))))
    loaded = load_student(saved(tmp_path, student))
    assert loaded.spec == ModelSpec.from_json(student.spec.to_json())
    assert not any(module.training for module in loaded.modules())
    images = torch.rand(2, len(student.mean), *student.image_size)
    assert torch.equal(loaded(images), student.eval()(images))
    assert [path.name for path in tmp_path.iterdir()] == ["student.safetensors"]


def test_a_student_that_began_as_a_checkpoint_no_longer_needs_it(tmp_path):
    checkpoint = tmp_path / "theirs.pth"
    torch.save(small_vit().backbone.state_dict(), checkpoint)
    student = build_model(ModelSpec("vit_tiny_patch16_224", 5, kwargs={**TINY, "checkpoint_path": str(checkpoint)}))
    path = saved(tmp_path, randomised(student, seed=1))
    checkpoint.unlink()
    loaded = load_student(path)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), student.parameters(), strict=True))


def test_the_spec_stands_in_the_metadata(tmp_path):
    with safe_open(saved(tmp_path), framework="pt") as file:
        assert ModelSpec.from_json(file.metadata()["spec"]) == small_spec()
        assert file.metadata()["format"] == "smi-fed.student"


def store(path, weights=None, version=STUDENT_VERSION, kind=STUDENT_FORMAT, **metadata):
    save_tensors(path, small_vit().state_dict() if weights is None else weights, kind, version, **metadata)


SPEC = small_spec().to_json()


@pytest.mark.parametrize(
    ("write", "says"),
    [
        (lambda path: sparse().save(path), "format is 'smi-fed.sparse-images', expected 'smi-fed.student'"),
        (lambda path: path.write_bytes(b"PK" + bytes(99)), "not a safetensors file"),
        (lambda path: store(path, version=99, spec=SPEC), "version is '99'.*version '1'"),
        (lambda path: store(path), "spec"),
        (lambda path: store(path, spec="{}"), "spec.schema"),
        (lambda path: store(path, spec=json.dumps({**json.loads(SPEC), "name": "vit_tinny"})), "vit_tinny"),
        (lambda path: store(path, spec=json.dumps({**json.loads(SPEC), "name": "hf-hub:a/b"})), "a hub or a directory"),
        (lambda path: store(path, {}, spec=SPEC), "Missing key"),
        (lambda path: store(path, small_vit(embed_dim=12).state_dict(), spec=SPEC), "size mismatch"),
        (lambda path: store(path, {**small_vit().state_dict(), "x": torch.ones(1)}, spec=SPEC), "Unexpected key"),
    ],
    ids=[
        "images",
        "zip",
        "version",
        "no spec",
        "no schema",
        "no such model",
        "hub",
        "no weights",
        "other weights",
        "more",
    ],
)
def test_a_file_that_is_no_student(tmp_path, write, says):
    path = tmp_path / "student.safetensors"
    write(path)
    with pytest.raises(FileFormatError, match=f"(?s){says}") as error:
        load_student(path)
    assert str(path) in str(error.value)
    assert not isinstance(error.value, SettingError)


def test_a_students_spec_takes_no_memory_that_its_weights_do_not(tmp_path):
    giant = small_spec(embed_dim=2**20, depth=1)  # a thousand gigabytes
    path = tmp_path / "student.safetensors"
    store(path, spec=giant.to_json())
    with pytest.raises(FileFormatError, match="size mismatch"):
        load_student(path)


def test_a_student_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"student\.safetensors"):
        load_student(tmp_path / "student.safetensors")
