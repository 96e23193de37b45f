"""Starts out of what clients sent, through the whole app."""

import pytest
import torch

from server.checks import check_models
from smi_fed.checks import SettingError
from smi_fed.class_statistics import class_statistics, discriminant, put_head
from smi_fed.config import load_settings
from smi_fed.data import digits
from smi_fed.models import build_seeded
from smi_fed.report import load_student
from tests.e2e.test_app import CONF, SMOKE, run

STATISTICS = f"{SMOKE} data.scheme=iid client.minimum_examples=2 strategy.start=statistics"


def student_of(tmp_path, overrides):
    report = run(tmp_path, overrides)
    return report, load_student(tmp_path / "out" / "student.safetensors").state_dict()


@pytest.mark.parametrize("alone", ["strategy.distillation=false", "distillation.steps=0"])
def test_class_statistics_alone_are_those_of_all_images_in_one_place(tmp_path, monkeypatch, alone):
    """Four architectures, none the student's; nothing is inverted, and nobody trains."""
    monkeypatch.setattr("clients.app.train", lambda *_, **__: pytest.fail("trained"))
    report, found = student_of(tmp_path, f"{STATISTICS} {alone}")
    assert {each["admitted"] for each in report["clients"]} == {True}
    assert {each[key] for each in report["clients"] for key in ("train_loss", "test_accuracy", "start")} == {None}
    assert report["ensemble"]["test_accuracy"] is None
    settings = load_settings(CONF, STATISTICS)
    expected, shared = build_seeded(settings.model.student, settings.seed).eval(), digits()[0]
    put_head(expected, discriminant(class_statistics(expected, [(shared.images, shared.labels)])))
    for key, value in expected.state_dict().items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-5)
    assert (report["start"], report["student"]["start"]) == ("statistics", "random")
    assert (report["inversion"], report["distillation"]["steps"], report["distillation"]["kept"]) == (None, 0, "start")
    assert report["student"]["test_accuracy"] > 0.5  # the start is of random weights
    assert not (tmp_path / "out" / "synthetic.png").exists()


def test_clients_that_did_not_train_measure_the_student_alone(tmp_path):
    found = run(tmp_path, f"{STATISTICS} distillation.steps=0 evaluation=clients")["evaluation"]["mean"]
    assert found["student_accuracy"] > 0.5
    assert found["own_accuracy"] is None


def test_the_average_alone_is_fedavgs(tmp_path):
    homogeneous = f"{SMOKE} model=digits_homogeneous strategy.distillation=false"
    _, average = student_of(tmp_path / "average", f"{homogeneous} strategy.start=average")
    _, fedavg = student_of(tmp_path / "fedavg", homogeneous)
    for key, value in fedavg.items():
        torch.testing.assert_close(average[key], value, rtol=1e-5, atol=1e-6)


def test_a_student_is_distilled_from_the_statistics(tmp_path):
    report, _ = student_of(tmp_path, f"{STATISTICS} strategy.rounds=2 distillation.validation=0.25")
    assert report["status"] == "completed"
    for each in [report["distillation"], *(line["distillation"] for line in report["rounds"])]:
        assert each["kept"] in ("start", "step 3")


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (
            "strategy.start=warm",
            "strategy.start: got 'warm', allowed: average | own | pretrained | random | statistics",
        ),
        ("strategy.start=pretrained", "strategy.start: got 'pretrained', allowed: own | random | average"),
        ("strategy.start=random model.student.start=pretrained", "strategy.start: got 'random', allowed: own | pretr"),
        ("strategy.start=average strategy.refine=true", "strategy.start: got 'average', allowed: own, where refine"),
        ("strategy.rounds=2 distillation.steps=0", "strategy.rounds: got 2, allowed: 1, since without distillation"),
        ("strategy.rounds=2 strategy.start=statistics strategy.distillation=false", "strategy.rounds: got 2"),
        ("strategy.start=average", "strategy.start: got 'average', .* no client has the student's architecture"),
        ("distillation.anchor=-1", "distillation.anchor: got -1"),
    ],
)
def test_a_start_that_cannot_be_is_refused_before_a_client_is_asked(overrides, says):
    with pytest.raises(SettingError, match=says.replace("|", r"\|")):
        check_models(load_settings(CONF, overrides))


@pytest.mark.parametrize("overrides", ["strategy.start=random", "strategy.start=pretrained model.student.start=/a.pt"])
def test_a_start_that_agrees_with_the_students_is_taken(overrides):
    assert load_settings(CONF, overrides).strategy.wraps
