"""How often teachers are right, and which of them are to be doubted."""

import math
from dataclasses import replace

import pytest
import torch

from smi_fed.data import digits
from smi_fed.models import ModelSpec, build_model
from smi_fed.pipeline import weights_of
from smi_fed.scores import Score, ensemble_accuracy, scores_of
from smi_fed.teachers import TrainedTeacher
from smi_fed.training import TrainingConfig, accuracy, train

SPEC = ModelSpec(
    "vit_tiny_patch16_224", 10, mean=(0.5,), std=(0.5,),
    kwargs={"img_size": 16, "patch_size": 4, "embed_dim": 48, "depth": 2, "num_heads": 3, "in_chans": 1},
)  # fmt: skip


@pytest.fixture(scope="module")
def trained():
    """A model, its training loss and a test split."""
    images, test = digits(16, 1)
    torch.manual_seed(0)
    model = build_model(SPEC)
    generator = torch.Generator().manual_seed(0)
    loss = train(model, images, TrainingConfig(steps=300, batch_size=64), generator=generator)
    return model, loss, test


def teacher_of(trained, counts=(10,) * 10, **changes):
    model = build_model(replace(SPEC, **changes))
    model.load_state_dict(trained[0].state_dict())
    return TrainedTeacher("a", model.eval(), sum(counts), counts)


def test_a_wrong_normalisation_is_doubted_and_the_right_one_is_not(trained):
    _, loss, test = trained
    right, wrong = teacher_of(trained), teacher_of(trained, mean=(8.0,), std=(0.02,))
    (good, bad), together = scores_of([right, wrong], "uniform", test)
    assert good.accuracy > 0.85
    assert bad.accuracy < 0.15
    assert good.doubt(loss) == ""
    assert f"{100 * bad.own:.1f} % of the test images of its classes is near chance" in bad.doubt(loss)
    assert "mean, std" in bad.doubt(loss)
    assert good.accuracy == pytest.approx(accuracy(right.model, test))
    assert together == ensemble_accuracy([right, wrong], "uniform", test)


def test_a_client_of_few_classes_is_judged_by_these(trained):
    _, loss, test = trained
    counts = (5, 5) + (0,) * 8
    model = teacher_of(trained, counts)
    (score,), _ = scores_of([model], "uniform", test)
    own = test.select((test.labels < 2).nonzero()[:, 0])
    assert (score.seen, score.own) == (2, pytest.approx(accuracy(model.model, own)))
    assert score.doubt(loss) == ""


@pytest.mark.parametrize(
    ("own", "seen", "loss", "doubted"),
    [
        (0.14, 10, 0.5 * math.log(10) - 0.01, True), (0.16, 10, 0.1, False), (0.10, 10, 2.2, False),
        (0.5, 1, 0.0, False), (0.0, 0, 0.0, False), (0.6, 2, 0.2, True), (0.8, 2, 0.2, False),
    ],
)  # fmt: skip
def test_who_is_doubted(own, seen, loss, doubted):
    assert bool(Score(0.1, own, seen).doubt(loss)) is doubted


def test_the_ensembles_accuracy_is_that_of_its_weighted_probabilities(trained):
    *_, test = trained
    teachers = [teacher_of(trained, (1,) * 5 + (9,) * 5), teacher_of(trained, (9,) * 5 + (1,) * 5, mean=(0.2,))]
    _, together = scores_of(teachers, "class", test)
    weights = weights_of(teachers, "class")
    with torch.no_grad():
        each = torch.stack([teacher.model(test.images).softmax(-1) for teacher in teachers])
    named = (each * weights[:, None]).sum(0).argmax(1)
    assert together == pytest.approx(float((named == test.labels).float().mean()))
