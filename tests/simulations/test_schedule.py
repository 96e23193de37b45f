"""What teachers see in images, and what the study's lines say."""

import pytest
import torch

from simulations.runner.loop import parsed
from simulations.schedule import STUDY, certainty, figure, table
from smi_fed.pipeline import TrainedTeacher
from smi_fed.sparse_images import SparseImages
from tests.models import small_vit


def images(targets, like):
    targets = torch.tensor(targets)
    whole = torch.ones(len(targets), 1, 1, dtype=torch.bool)
    return SparseImages(torch.rand(len(targets), *like), whole, targets, like[1:], torch.arange(len(targets)),
                        torch.zeros_like(targets), torch.where(whole, -1, 0))  # fmt: skip


def test_certainty_is_a_teachers_own_and_of_others_that_know_the_class():
    models = [small_vit(seed) for seed in range(3)]
    counts = [(1, 1, 0, 5, 1), (2, 0, 0, 1, 1), (0, 0, 0, 1, 0)]  # of class 1 nobody but the first has seen any
    teachers = [TrainedTeacher(str(n), model, 10, counts[n]) for n, model in enumerate(models)]
    like = (len(models[0].mean), *models[0].image_size)
    found = [images([0, 1, 3], like), images([4], like), images([3], like)]
    own, others = [], []
    for number, each in enumerate(found):
        for image, target in zip(each.images, each.targets.tolist(), strict=True):
            said = [float(model(image[None]).detach().softmax(1)[0, target]) for model in models]
            own.append(said[number])
            known = [said[n] for n in range(3) if n != number and counts[n][target]]
            others += [sum(known) / len(known)] if known else []
    assert len(others) == 4
    assert certainty(teachers, found) == pytest.approx((sum(own) / 5, sum(others) / 4))


def line(ratio, timing, accuracy, seed=0, **more):
    return {
        "data": "digits", "ratio": ratio, "timing": timing, "seed": seed, "student_test_accuracy": accuracy,
        "inversion_seconds": 4.0 - 2 * ratio, "flops": 100 - 50 * ratio, "own_certainty": 0.9,
        "others_certainty": 0.5, **more,
    }  # fmt: skip


def test_a_line_for_each_stop_beside_dense(tmp_path):
    pictures = {"pixels": [[[[3], [200]], [[0], [255]]]], "mask": [[[1, 0], [1, 1]]]}
    lines = [
        line(0.0, "never", 0.9, pictures=pictures), line(0.0, "never", 0.8, seed=1),
        line(0.5, "early", 0.7, pictures=pictures), line(0.5, "late", 0.75),
    ]  # fmt: skip
    (found,) = table(lines)
    assert found.rows[1:] == [
        ["0%", "never", "85.0 ± 7.1", "4.0", "1.00", "0.90", "0.50"],
        ["50%", "early", "70.0", "3.0", "0.75", "0.90", "0.50"],
        ["50%", "late", "75.0", "3.0", "0.75", "0.90", "0.50"],
    ]
    figure(lines).savefig(tmp_path / "schedule.png")
    assert (tmp_path / "schedule.png").read_bytes().startswith(b"\x89PNG")
    figure(lines[1:2])


def test_every_stop_at_every_time_and_dense_once():
    cells = STUDY.cells(parsed(STUDY, ["--data", "digits", "--ratios", "0.5", "0.9"]))
    assert [(each["ratio"], each["timing"]) for each in cells[:3]] == [(0.0, "never"), (0.5, "early"), (0.5, "middle")]
    assert len(cells) == 1 + 2 * 3
    schedules = [str(STUDY.compose((*STUDY.words, *each.overrides)).inversion.schedule) for each in cells[:3]]
    assert schedules == ["", "5:0.5", "10:0.5"]
