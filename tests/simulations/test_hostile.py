"""The study of hostile clients: what they train on, that admission lets them in, and what its tables say."""

import pytest
import torch

from simulations.hostile import STUDY, attacks, main, shuffling
from simulations.hostile.report import arguments, table
from simulations.runner.ledger import PROJECT, read_lines
from simulations.runner.loop import parsed
from smi_fed.config import load_settings
from smi_fed.data import ImageSet
from smi_fed.training import predict
from tests.models import small_vit
from tests.simulations.test_owners import WORDS as OWNERS
from tests.simulations.test_owners import real  # noqa: F401  (a fixture)

WORDS = ["experiment=hostile", "client.training.steps=2", "client.device=cpu", "data.alpha=100.0"]


def data():
    labels = torch.tensor([0, 1, 2, 1])
    return ImageSet(torch.zeros(4, 1, 16, 16), labels, tuple("abc"))


def test_what_hostile_clients_train_on():
    assert attacks.flipped(data(), 3).labels.tolist() == [2, 1, 0, 1]
    poisoned = attacks.backdoored(data(), 3)
    assert poisoned.labels.tolist() == [0, 1, 2, 1, 0, 0, 0]
    assert bool((poisoned.images[:4] == 0).all())
    assert [int(image.sum()) for image in poisoned.images[4:]] == [4, 4, 4]  # a square of 2 px in the last corner
    assert bool((poisoned.images[4:, :, -2:, -2:] == 1).all())
    colour = attacks.with_trigger(torch.zeros(1, 3, 8, 8))
    assert colour[0, :, -1, -1].tolist() == [1, 0, 1]


@pytest.mark.parametrize("attack", ["random weights", "scaled logits"])
def test_admission_lets_them_in(tmp_path, attack):
    settings = load_settings(PROJECT / "conf", WORDS)
    teacher = attacks.sent_by(settings, 0, 8, attack, tmp_path, torch.device("cpu"))
    again = attacks.sent_by(settings, 0, 8, attack, tmp_path, torch.device("cpu"))
    assert (teacher.name, teacher.num_examples) == ("client 0", sum(teacher.label_counts))
    assert teacher.digest == again.digest
    honest = attacks.sent_by(settings, 0, 8, None, tmp_path, torch.device("cpu"))
    ratio = teacher.model.backbone.head.weight / honest.model.backbone.head.weight
    same = torch.allclose(ratio, torch.full_like(ratio, attacks.SCALE), rtol=1e-3)
    assert same == (attack == "scaled logits")


def test_a_shuffled_model_answers_otherwise_and_the_model_as_before():
    model, images = small_vit(1), torch.rand(4, 3, 16, 16)
    before = predict(model, images)
    assert not torch.allclose(predict(shuffling.shuffled(model, 0), images), before)
    assert torch.equal(predict(model, images), before)


def test_every_attack_meets_every_defence():
    found = STUDY.cells(parsed(STUDY, ["--skews", "1.0"]))
    assert len(found) == 5 * 5
    assert len({(each["attack"], each["defence"]) for each in found}) == 25
    assert {each["data"] for each in STUDY.cells(parsed(STUDY, ["--data", "real"]))} == {"real"}


def line(attack, defence, seed, accuracy, backdoor=0.0, hostile=2, caught=0, judging=0.0, **more):
    return {
        "data": "digits", "skew": 1.0, "attack": attack, "defence": defence, "seed": seed, "accuracy": accuracy,
        "backdoor_success": backdoor, "hostile": hostile, "clients": 8, "caught": caught, "wrongly_doubted": 1,
        "judging_seconds": judging, "distillation_seconds": 30.0, **more,
    }  # fmt: skip


def test_tables_say_what_was_lost_and_who_was_caught():
    lines = [
        line("none", "mean", 0, 0.95, hostile=0), line("none", "mean", 1, 0.93, hostile=0),
        line("backdoor", "mean", 0, 0.91, 0.3, surviving=[[1.0, 0.5], [None, 0.5], [0.5, 0.7]]),
        line("backdoor", "mean", 1, 0.93, 0.1),
        line("backdoor", "agreement", 0, 0.94, 0.01, caught=2, judging=7.0),
    ]  # fmt: skip
    accuracy, doubted, backdoor = table(lines)
    assert accuracy.rows == [
        ["defence", "no attack", "backdoor"],
        ["mean", "94.0 ± 1.4 (0.0)", "92.0 ± 1.4 (2.0)"],
        ["agreement", "", "94.0 (1.0), seed 0"],
    ]
    assert doubted.rows[1:] == [["agreement", "", "2 of 2, 1 of 6"]]
    assert backdoor.rows[1:] == [["mean", "20.0 ± 14.1", "0.0 ± 0.0", "0 / 30"], ["agreement", "1.0", "", "7 / 30"]]
    assert "100 % of the backdoored clients' images" in backdoor.notes[0]
    assert "60 % of honest" in backdoor.notes[0]
    owners = line("label flip", "mean", 0, 0.7, changes=["a=1"]) | {"data": "real"}
    assert arguments([*lines, owners]) == (
        "--data digits --seeds 0 1 --attacks none backdoor --defences mean agreement`, `python -m simulations.hostile "
        "--data real --seeds 0 --attacks 'label flip' --defences mean a=1"
    )


@pytest.mark.slow
@pytest.mark.usefixtures("real")
def test_owners_of_real_pictures_can_be_hostile(tmp_path):
    words = ["--attacks", "none", "backdoor", "--defences", "mean", "agreement and triggers"]
    assert main(["--data", "real", "--output", str(tmp_path), *words, *OWNERS, "strategy.start=own"]) == 0
    lines = list(read_lines(tmp_path / "pieces.jsonl").values())
    assert [(each["hostile"], each["clients"]) for each in lines] == [(0, 4), (0, 4), (1, 4), (1, 4)]
    assert all(0 <= each["accuracy"] <= 1 and 0 <= each["backdoor_success"] <= 1 for each in lines)
