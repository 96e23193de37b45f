"""The study of real owners, on stand-ins: few small pictures, and small models from random weights."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from simulations import owners
from simulations.real import pictures
from simulations.runner.ledger import PROJECT, read_lines
from smi_fed.class_statistics import class_statistics, discriminant, put_head
from smi_fed.config import load_settings
from smi_fed.data import load_images
from smi_fed.models import build_seeded
from smi_fed.training import accuracy

CONF = PROJECT / "conf"

CLASSES = ("activities", "animals", "flags", "food", "objects", "people", "smileys", "symbols", "travel")
TINY = "{depth: 1, embed_dim: 24, num_heads: 2, init_values: 1.0}"
WORDS = [
    "model.clients.vit_s.start=null", "model.student.start=null", f"+model.clients.vit_s.kwargs={TINY}",
    f"+model.student.kwargs={TINY}", "model.clients.vit_s.image_size=28", "model.student.image_size=28",
    "data.image_size=28", "client.training.epochs=1.0", "client.training.trainable=all",
    "client.training.layer_decay=1.0",
    "client.minimum_examples=2", "server.images_per_teacher=4", "inversion.iterations=4", "server.device=cpu",
    "inversion.schedule='1:0.25,2:0.33,3:0.5'", "inversion.parametrisation.levels=[4,7]", "distillation.trainable=all",
    "distillation.steps=2", "distillation.batch_size=4",
]  # fmt: skip


@pytest.fixture
def real(tmp_path, monkeypatch):
    """Four styles of plain pictures, a colour for each class."""
    draw = random.Random(0)
    for style in ("fluent", "google", "openmoji", "twitter"):
        for place, name in enumerate(CLASSES):
            for split, number in (("train", 4), ("test", 1)):
                for each in range(number):
                    path = tmp_path / "pictures" / style / split / name / f"{each}.webp"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    colour = (25 * place, 255 - 25 * place, draw.randrange(60))
                    Image.new("RGB", (28, 28), colour).save(path, lossless=True)
    pictures.list_all(tmp_path / "pictures")
    monkeypatch.setenv("SMI_FED_REAL", str(tmp_path))
    return tmp_path


def in_one_place():
    """The discriminant of all styles' pictures together, as accuracy on each style."""
    settings = load_settings(CONF, ["experiment=real", *WORDS])
    student = build_seeded(settings.model.student, settings.seed).eval()
    images = [load_images(replace(settings.data, source="folder", name=place)) for place in settings.data.nodes]
    put_head(student, discriminant(class_statistics(student, [(x.images, x.labels) for x, _ in images])))
    names = [Path(place).name for place in settings.data.nodes]
    return {name: accuracy(student, test) for name, (_, test) in zip(names, images, strict=True)}


def test_every_method_has_its_line_and_is_not_measured_again(real, tmp_path):
    words = ["--federations", "equal", "--skews", "styles", "--output", str(tmp_path / "out"), *WORDS]
    assert owners.main(words) == 0
    found = read_lines(tmp_path / "out" / "pieces.jsonl")
    lines = {line["method"]: line for line in found.values()}
    assert set(lines) == set(owners.NAMES)
    assert lines["class statistics"]["accuracy"] == in_one_place()
    assert "finished_accuracy" not in lines["class statistics"]
    assert len(lines["alone"]["accuracy"]) == owners.OWNERS
    assert lines["student"]["pictures"] == 16
    assert lines["student"]["steps"] == 2
    before = (tmp_path / "out" / "pieces.jsonl").read_bytes()
    assert owners.main(words) == 0
    assert (tmp_path / "out" / "pieces.jsonl").read_bytes() == before
