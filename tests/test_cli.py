"""The command line as a shell calls it: what it writes can be read, and what cannot be is one line."""

import compileall
import json
import sys
import tomllib
from dataclasses import replace

import pytest
import torch
from PIL import Image

from smi_fed.checks import SettingError, read
from smi_fed.cli import main, teaching
from smi_fed.config import CONF, load_settings
from smi_fed.models import ModelSpec, build_model
from smi_fed.report import load_student, save_student
from smi_fed.sparse_images import SparseImages
from tests.models import small_spec, small_vit

SIZE = 32
TINY = {"img_size": SIZE, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "in_chans": 1}
SPEC = {"name": "vit_tiny_patch16_224", "num_classes": 10, "kwargs": TINY, "mean": [0.5], "std": [0.5]}


@pytest.fixture
def place(tmp_path, monkeypatch):
    (tmp_path / "tiny.json").write_text(json.dumps(SPEC))
    (tmp_path / "own.py").write_text(
        "from tests.models import small_vit\nmodel = small_vit\nwhole = lambda: small_vit().backbone\nnothing = dict\n"
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def call(monkeypatch, capsys):
    def run(*words, status=0):
        monkeypatch.setattr(sys, "argv", ["smi-fed", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == status
        said = capsys.readouterr()
        return json.loads(said.out) if "--json" in words and not status else said.out + said.err

    return run


def test_from_a_model_to_images_to_a_student_to_its_accuracy(place, call):
    small = ("iterations=4", "schedule='1:0.5'", "jitter=1", "--images", "6", "--classes", "3,7", "--json")
    made = call("invert", "tiny.json", "--weights", "random", *small)
    found = SparseImages.load("images.safetensors")
    assert found.targets.tolist() == [3, 7, 3, 7, 3, 7]
    assert (made["images"], made["kept_fraction"]) == (6, 0.5) == (len(found), found.kept_fraction)
    assert 0 < made["flops_of_dense"] < 1
    assert not (place / "images.checkpoint").exists()
    drawn = call("show", "images.safetensors", "--output", "some.png", "--json")
    assert (drawn["classes"], drawn["patches"]) == ([3, 7], [4, 4])
    for name in ("images.png", "some.png"):
        assert (place / name).read_bytes().startswith(b"\x89PNG")
    taught = call("distill", "tiny.json", "--teacher", "tiny.json", "--teacher-weights", "random",
                  "--images", "images.safetensors", "steps=3", "batch_size=4", "--json")  # fmt: skip
    assert taught["steps"] == 3
    student = load_student("student.safetensors")
    measured = call("evaluate", "student.safetensors", "--json")
    assert measured["images"] == 450
    assert len(measured["by_class"]) == 10
    assert 0 <= measured["accuracy"] <= 1
    made = call("quantize", "student.safetensors", "--images", "images.safetensors", "--bits", "w4a8",
                "--data", "digits", "--json")  # fmt: skip
    assert (made["accuracy_before"], made["calibrated_on"]) == (measured["accuracy"], 6)
    assert call("evaluate", made["file"], "--json")["accuracy"] == made["accuracy"]
    again = call("invert", "student.safetensors", *small)
    with torch.no_grad():
        said = student(SparseImages.load("images.safetensors").images).softmax(1)
    assert again["certainty_of_target"] == pytest.approx(float(said[range(6), [3, 7, 3, 7, 3, 7]].mean()), rel=1e-4)


@pytest.mark.parametrize("name", ["own:model", "own:whole"])
def test_a_module_of_ones_own(place, call, name):
    said = call("invert", name, "--images", "2", "--image-size", "16", "iterations=1", "schedule=''")
    assert "certainty of target" in said
    assert len(SparseImages.load("images.safetensors")) == 2


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["invert", "no_such_model"], "model: got 'no_such_model', allowed: a name of timm"),
        (["invert", "own:missing"], "has no attribute 'missing'"),
        (["invert", "own:nothing"], "which gave dict"),
        (
            ["invert", "tiny.json", "--weights", "random", "--classes", "3,x"],
            "classes: got '3,x', allowed: ints from 0",
        ),
        (["invert", "tiny.json", "--weights", "random", "iteration=3"], "iteration"),
        (["invert", "tiny.json", "--weights", "gone.safetensors"], "gone.safetensors"),
        (["invert", "tiny.json", "--weights", "random", "--method", "best"], "best"),
        (["invert", "tiny.json", "--weights", "random", "--output", "x.png"], "--output: got 'x.png'"),
        (["invert", "tiny.json", "--num-classes", "3"], "--num-classes: got 3, allowed: nothing: the spec says it"),
        (["invert", "deit_tiny_patch16_224.nosuch"], "model: got 'deit_tiny_patch16_224.nosuch'"),
        (["distill", "tiny.json", "--teacher", "x", "--images", "y", "ensemble=class"], "ensemble: got 'class'"),
        (["show", "gone.safetensors"], "gone.safetensors"),
        (["distill", "tiny.json"], "--teacher and --images"),
        (["quantize", "tiny.json", "--weights", "random"], "--images"),
        (["evaluate", "broken.pt2"], "broken.pt2: "),
        (["evaluate", "tiny.json", "--weights", "random", "--data", "gone"], "--data: got 'gone'"),
        (["evaluate", "student.pt"], "student.pt"),
    ],
)
def test_what_cannot_be_is_one_line(place, call, words, says):
    for name in ("student.pt", "broken.pt2"):
        (place / name).write_bytes(b"no model")
    said = call(*words, status=2).splitlines()
    assert says in said[-1]
    assert said[-1].startswith("smi-fed: ")


def test_a_students_file_needs_no_other_word(place, call):
    save_student("kept.safetensors", small_vit())
    said = call("evaluate", "kept.safetensors", status=2)
    assert f"one with {small_spec().num_classes}" in said
    said = call("evaluate", "kept.safetensors", "--weights", "random", status=2)
    assert "--weights: got 'random', allowed: nothing: the file says it" in said


def test_classes_of_a_folder_are_in_the_models_order(place):
    for name, value in (("cat", 0), ("dog", 255)):
        (place / "pets" / "test" / name).mkdir(parents=True)
        (place / "pets" / "train" / name).mkdir(parents=True)
        for part in ("train", "test"):
            for number in range(3):
                Image.new("L", (SIZE, SIZE), value).save(place / "pets" / part / name / f"{number}.png")
    spec = read(ModelSpec, SPEC | {"num_classes": 2, "class_names": ["dog", "cat"]})
    found = teaching.test_images("pets", build_model(spec))
    bright = found.images[torch.arange(len(found))].mean((1, 2, 3)) > 0.5
    assert found.class_names == ("dog", "cat")
    assert torch.equal(found.labels == 0, bright)
    other = build_model(replace(spec, class_names=("dog", "cow")))
    with pytest.raises(SettingError, match="--data: got"):
        teaching.test_images("pets", other)


def test_help_has_an_example_of_each_command(call):
    for command in ("invert", "show", "distill", "quantize", "evaluate", "audit", "demo", "federate"):
        assert f"Example: smi-fed {command} " in " ".join(call(command, "--help").split())


def test_an_app_of_ones_own_has_the_projects_keys_and_settings(place, call):
    call("federate", "mine")
    own, ours = (
        tomllib.loads((each / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
        for each in (place / "mine", CONF.parent)
    )
    assert {key: own[key] for key in ("components", "config")} == {key: ours[key] for key in ("components", "config")}
    assert set(own["fab-include"]) < set(ours["fab-include"])
    assert load_settings(place / "mine" / "conf", ["seed=3"]).seed == 3
    assert compileall.compile_dir(place / "mine", quiet=2, force=True)
    assert "directory: got 'mine', allowed: a path where nothing is" in call("federate", "mine", status=2)


@pytest.mark.parametrize(
    ("name", "start", "classes", "accuracy", "says"),
    [
        ("deit_base_patch16_224", "pretrained", 1000, 0.70, "70.0 %, which is far below the 81.8 %"),
        ("deit_base_patch16_224.fb_in1k", "pretrained", 1000, 0.0005, "0.1 %, which is near chance"),
        ("deit_base_patch16_224", "pretrained", 1000, 0.79, ""),
        ("deit_base_patch16_224", None, 1000, 0.65, ""),  # a quantized one has no start
        ("deit_base_patch16_224", "own.safetensors", 10, 0.50, ""),
        ("vit_tiny_patch16_224", None, 10, 0.14, "14.0 %, which is near chance"),
    ],
)
def test_an_implausible_accuracy_is_warned_of(caplog, name, start, classes, accuracy, says):
    class Model:
        spec = ModelSpec(name, num_classes=classes, start=start)

    teaching.warn_of(Model, accuracy)  # pyright: ignore[reportArgumentType]
    assert says in caplog.text
    assert bool(says) == bool(caplog.text)
