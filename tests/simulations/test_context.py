"""Grounds that mislead, groups, and what the study's lines say."""

import json

import pytest
import torch

from simulations.context import GROUNDS, STUDY, by_group, figure, grounded, main, table
from simulations.runner.loop import parsed
from smi_fed.data import ImageSet


def images(count=400):
    generator = torch.Generator().manual_seed(0)
    pixels, labels = torch.rand(count, 3, 4, 4, generator=generator), torch.arange(count) % 2
    masks = torch.zeros(count, 4, 4, dtype=torch.bool)
    masks[:, 1:3, 1:3] = True
    return ImageSet(pixels, labels, ("square", "star"), masks)


def test_the_ground_has_its_colour_and_the_object_stays():
    plain = images(8)
    grounds = torch.tensor([0, 1, 1, 0, 0, 1, 0, 1])
    found = grounded(plain, grounds)
    assert torch.equal(found.images[:, :, 1:3, 1:3], plain.images[:, :, 1:3, 1:3])
    for row in (0, 1, 7):
        half = (plain.images[row, :, 0, 0] + torch.tensor(GROUNDS[int(grounds[row])])) / 2
        assert torch.equal(found.images[row, :, 0, 0], half)


class ByGround(torch.nn.Module):
    """Looks at a corner, blue or green."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, pixels):
        return self.scale * pixels[:, [2, 1], 0, 0]


def test_who_goes_by_the_ground_fails_where_it_misleads():
    plain = images()
    plain = ImageSet(torch.zeros(len(plain), 3, 4, 4), plain.labels, plain.class_names, plain.masks)
    assert by_group(ByGround(), plain) == [1.0, 0.0, 0.0, 1.0]


def line(source, student, seed=0):
    return {"source": source, "seed": seed, "inversion_seconds": 0.0 if source == "real" else 2.0, "student": student,
            "teacher": [0.9, 0.7, 0.6, 0.8], "attention_iou": 0.3}  # fmt: skip


def test_a_row_of_each_source(tmp_path):
    lines = [
        line("dense", [0.8, 0.2, 0.4, 0.6]),
        line("dense", [0.8, 0.4, 0.4, 0.8], 1),
        line("real", [0.9, 0.5, 0.6, 0.8]),
    ]
    (found,) = table(lines)
    assert found.rows[1:] == [
        ["dense", "55.0 ± 7.1", "30.0 ± 14.1", "-30.0 ± 14.1", "40.0 ± 0.0", "2.0"],
        ["real", "70.0", "50.0", "-10.0", "30.0", ""],
    ]
    assert "75.0 ± 0.0 % in the mean of the groups, 60.0 ± 0.0 % in the worst" in found.notes[0]
    assert "leaning on the ground by 20.0 ± 0.0 points" in found.notes[0]
    assert "an IoU of 30.0 ± 0.0 %" in found.notes[0]
    figure(lines).savefig(tmp_path / "context.png")


@pytest.mark.usefixtures("uncounted")
def test_a_cell_is_measured_and_kept(tmp_path):
    words = ["--output", str(tmp_path), "--data", "shapes", "--sources", "attention", "real", "--smoke", "--seeds", "3",
             "client.training.steps=2", "distillation.batch_size=8"]  # fmt: skip
    assert main(words) == 0
    sparse, real = (json.loads(each) for each in (tmp_path / "pieces.jsonl").read_text().splitlines())
    assert sparse["teacher"] == real["teacher"]
    assert 0 < sparse["attention_iou"] < 1
    assert len(sparse["student"]) == 4
    assert real["inversion_seconds"] == 0 < sparse["inversion_seconds"]
    assert (tmp_path / "context.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("data", "iterations", "stop", "reborn"),
    [("shapes", 40, "5:0.77", "10:0.25,20:0.33,30:0.5"), ("real", 12, "2:0.77", "3:0.25,6:0.33,9:0.5")],
)
def test_all_sources_are_inverted_alike_but_for_their_stops(data, iterations, stop, reborn):
    cells = STUDY.cells(parsed(STUDY, ["--data", data]))
    found = {cell["source"]: STUDY.compose((*STUDY.words, *cell.defaults, *cell.overrides)) for cell in cells}
    stops = {name: str(each.inversion.schedule) for name, each in found.items() if name not in ("noise", "real")}
    assert stops == {"dense": "", "attention": stop, "random": stop, "rebirth at random": reborn}
    alike = {(x.inversion.learning_rate, x.inversion.iterations, x.server.images_per_teacher) for x in found.values()}
    assert alike == {(0.1, iterations, {"shapes": 400, "real": 100}[data])}
