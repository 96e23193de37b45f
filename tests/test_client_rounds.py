"""What a client does in later rounds."""

from types import SimpleNamespace

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, RecordDict
from torch.nn import functional as F

import clients.app
from clients.rounds import TrainRequest, loss_of
from smi_fed.data import ImageSet
from smi_fed.models import build_model
from smi_fed.training import TrainingConfig, train
from tests.models import randomised, small_spec, small_vit

STUDENT = small_spec(depth=3)


def asked(server_round=2, weights=None, spec=STUDENT, **config):
    weights = randomised(build_model(spec), 3).state_dict() if weights is None else weights
    content = RecordDict({
        "arrays": ArrayRecord(weights),
        "config": ConfigRecord({"server-round": server_round, **config}),
    })  # fmt: skip
    return TrainRequest(SimpleNamespace(content=content), spec)


def settings(weight=0.5, temperature=2.0):
    return SimpleNamespace(client=SimpleNamespace(student_weight=weight, student_temperature=temperature))


IMAGES, LABELS = torch.rand(6, 3, 16, 16), torch.tensor([0, 1, 2, 3, 4, 0])


def test_what_was_asked_is_read():
    found = asked(3, **{"proximal-mu": 0.5})
    assert (found.round, found.proximal_mu) == (3, 0.5)
    assert found.fits(build_model(STUDENT))
    assert not found.fits(small_vit())


def test_the_students_architecture_with_other_classes_does_not_go_on_from_it():
    student = small_spec(depth=3)
    named = type(student)(**{**vars(student), "class_names": tuple("abcde")})
    turned = type(student)(**{**vars(student), "class_names": tuple("edcba")})
    question = asked(spec=named)
    assert question.fits(build_model(named))
    assert not question.fits(build_model(turned))


def test_from_the_student_on_it_is_cross_entropy():
    model = small_vit(depth=3)
    loss = loss_of(settings(), model, asked())
    with torch.no_grad():
        assert float(loss(model, IMAGES, LABELS)) == pytest.approx(float(F.cross_entropy(model(IMAGES), LABELS)))


def test_fedprox_adds_half_mu_times_the_squared_distance():
    model = small_vit(depth=3)
    loss = loss_of(settings(), model, asked(**{"proximal-mu": 0.4}))
    with torch.no_grad():
        assert float(loss(model, IMAGES, LABELS)) == pytest.approx(float(F.cross_entropy(model(IMAGES), LABELS)))
        for weight in model.parameters():
            weight.add_(0.1)
        count = sum(weight.numel() for weight in model.parameters())
        expected = float(F.cross_entropy(model(IMAGES), LABELS)) + 0.2 * 0.01 * count
        assert float(loss(model, IMAGES, LABELS)) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("weight", [0.0, 0.3])
@pytest.mark.parametrize("server_round", [1, 2])
def test_another_architecture_learns_from_the_student_from_round_two_on(weight, server_round):
    model, question = small_vit(), asked(server_round)
    with torch.no_grad():
        found = float(loss_of(settings(weight), model, question)(model, IMAGES, LABELS))
        own, theirs = model(IMAGES), question.student()(IMAGES)
        hard = float(F.cross_entropy(own, LABELS))
        soft = 4 * float(F.kl_div((own / 2).log_softmax(1), (theirs / 2).softmax(1), reduction="batchmean"))
    share = weight if server_round > 1 else 0.0
    assert found == pytest.approx((1 - share) * hard + share * soft, rel=1e-5)


def test_a_client_of_some_classes_hears_the_student_on_those():
    student = type(STUDENT)(**{**vars(STUDENT), "class_names": tuple("abcde")})
    own = type(STUDENT)(**{**vars(small_spec(num_classes=2)), "class_names": ("d", "b")})
    model, question = randomised(build_model(own)), asked(spec=student)
    labels = torch.zeros(6, dtype=torch.long)
    with torch.no_grad():
        found = float(loss_of(settings(), model, question)(model, IMAGES, labels))
        logits, theirs = model(IMAGES), question.student()(IMAGES)[:, [3, 1]]
        soft = 4 * float(F.kl_div((logits / 2).log_softmax(1), (theirs / 2).softmax(1), reduction="batchmean"))
    assert found == pytest.approx(0.5 * float(F.cross_entropy(logits, labels)) + 0.5 * soft, rel=1e-5)


def test_the_student_teaches_what_the_labels_do_not_say():
    student = small_vit(depth=3, seed=4)
    data = ImageSet(torch.rand(64, 3, 16, 16), torch.zeros(64, dtype=torch.long), tuple("abcde"))
    config = TrainingConfig(steps=40, batch_size=16, jitter=0)
    gaps = []
    for weight in (0.0, 0.9):
        model = small_vit()
        loss = loss_of(settings(weight), model, asked(weights=student.state_dict()))
        train(model, data, config, generator=torch.Generator().manual_seed(0), loss=loss)
        with torch.no_grad():
            expected = student(data.images).softmax(1)
            gaps.append(float(F.kl_div(model(data.images).log_softmax(1), expected, reduction="batchmean")))
    assert gaps[1] < 0.5 * gaps[0]


def test_questions_differ_by_round_settings_and_weights():
    one = asked().digest("settings")
    assert asked().digest("settings") == one
    others = [asked(3).digest("settings"), asked().digest("others"), asked(**{"proximal-mu": 0.1}).digest("settings")]
    others.append(asked(weights=small_vit(depth=3, seed=9).state_dict()).digest("settings"))
    assert len({one, *others}) == 5


def test_no_two_clients_and_no_two_rounds_share_their_draws(monkeypatch):
    seen = {}

    def noted(model, _data, _config, *, generator, **_options):
        first = next(model.parameters()).flatten()[0].item()
        seen[server_round, number] = (generator.initial_seed(), first)
        return 0.5

    monkeypatch.setattr(clients.app, "train", noted)
    training = TrainingConfig(steps=1)
    client = SimpleNamespace(device="cpu", training=training, student_weight=0.0, student_temperature=1.0)
    run = SimpleNamespace(seed=3, data=None, client=client)
    for number in (0, 1):
        for server_round in (1, 2):
            own = clients.app.OwnModels(Context(1, number, {}, RecordDict(), {}), number)
            clients.app.train_round(run, number, small_spec(), (), asked(server_round), own)
    assert len({seed for seed, _ in seen.values()}) == 4
    assert seen[1, 0][1] == seen[2, 0][1] != seen[1, 1][1] == seen[2, 1][1]  # each its own start
