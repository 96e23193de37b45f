"""Clients that know different classes and take images of different sizes."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from flwr.app import Array, Message
from flwr.serverapp import strategy as flower

from smi_fed import pipeline
from smi_fed.models import ModelSpec
from smi_fed.pool import PoolConfig
from smi_fed.strategies import records
from smi_fed.strategies.admission import AdmissionPolicy, Expectation, admit
from smi_fed.strategies.records import BadReplyError
from tests.models import TINY, small_spec, small_vit
from tests.strategies.test_admission import with_kwargs, with_spec
from tests.strategies.test_every_strategy import PIPELINE, SAMPLING, client, run

NAMES = ("ant", "bee", "cat", "dog", "elk")


def spec(names, **kwargs):
    return ModelSpec("vit_tiny_patch16_224", len(names), kwargs={**TINY, "depth": 1, **kwargs}, class_names=names)


STUDENT = spec(NAMES)
CLIENTS = [
    (spec(("bee", "ant")), (30, 10)),
    (spec(("cat", "dog", "elk", "bee"), img_size=24, patch_size=8), (20, 0, 5, 15)),
    (spec(("elk", "dog", "cat", "bee", "ant"), img_size=32, embed_dim=36, num_heads=3), (15, 0, 20, 15, 10)),
]
PLACES = {1: {"partition-id": 0}, 2: {"partition-id": 1}, 3: {"partition-id": 2}}
ALIGNED = [[10, 30, 0, 0, 0], [0, 15, 20, 0, 5], [10, 15, 20, 0, 15]]


def weights(own):
    found = small_vit(seed=own.num_classes, **own.kwargs).state_dict()
    head = {key: value[: own.num_classes] for key, value in found.items() if ".head." in key}
    return found | head


def reply(message, own, counts, number):
    content = records.pack_reply(
        own, weights(own), name=f"client {number}", num_examples=sum(counts or (10,)), train_loss=1.0,
        label_counts=None if counts is None else list(counts),
    )  # fmt: skip
    return Message(content, reply_to=message)


def ask(message, context):
    number = context.node_config["partition-id"]
    return reply(message, *CLIENTS[number], number)


@pytest.fixture
def distilled(monkeypatch):
    """Every call of `distill`: teachers, images and weights."""
    calls, distill = [], pipeline.distill

    def watched(student, teachers, images, config, **options):
        calls.append((list(teachers), list(images), options["weights"]))
        return distill(student, teachers, images, config, **options)

    monkeypatch.setattr(pipeline, "distill", watched)
    return calls


def test_an_ensemble_hears_each_client_on_the_classes_that_it_has_seen(distilled):
    wrapped, rounds = run(flower.FedAvg(**SAMPLING), ask=ask, places=PLACES, student=STUDENT)
    assert len(distilled) == 2
    expected = np.array(ALIGNED, np.float64)
    total = expected.sum(0)
    expected = np.where(total > 0, expected / np.where(total > 0, total, 1), 1 / 3)  # nobody has seen a dog
    for teachers, images, found in distilled:
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6)
        assert [tuple(each.images.shape[2:]) for each in images] == [(16, 16), (24, 24), (32, 32)]
        logits = [teacher(torch.rand(2, 3, 16, 16)) for teacher in teachers]
        known = [set(own.class_names) for own, _ in CLIENTS]
        for each, names in zip(logits, known, strict=True):
            assert each.shape == (2, 5)
            assert each.isfinite().all(0).tolist() == [name in names for name in NAMES]
    assert [teacher.aligned_counts for teacher in wrapped.rounds[0].teachers] == [tuple(row) for row in ALIGNED]
    assert all(np.isfinite(now.returned).all() for now in rounds)
    assert np.abs(rounds[-1].returned - rounds[0].sent).max() > 1e-4


def test_images_are_of_classes_that_their_client_has_seen():
    wrapped, _ = run(flower.FedAvg(**SAMPLING), ask=ask, places=PLACES, student=STUDENT, num_rounds=1,
                     pipeline=replace(PIPELINE, images_per_teacher=12))  # fmt: skip
    for (own, counts), images in zip(CLIENTS, wrapped.rounds[0].images, strict=True):
        assert all(counts[target] > 0 for target in images.targets.tolist())
        assert int(images.targets.max()) < own.num_classes


@pytest.mark.parametrize("pool", [PoolConfig(), PoolConfig(images=7, warm=True)])
@pytest.mark.parametrize("projection", ["ensemble", "per_teacher"])
def test_mixed_clients_end_with_a_finite_student(projection, pool):
    inner = flower.FedAvg(**SAMPLING)
    wrapped, rounds = run(
        inner, ask=ask, places=PLACES, student=STUDENT, projection=projection, pool=pool, num_rounds=3
    )
    assert [len(record.teachers) for record in wrapped.rounds] == [3, 3, 3]
    assert all(np.isfinite(now.replies).all() for now in rounds)
    assert np.isfinite(rounds[-1].returned).all()
    assert all(np.isfinite(record.distillation.losses).all() for record in wrapped.rounds)


def test_targets_of_every_round_are_the_students_classes(distilled):
    """A client that comes back with its classes in another order does not change what its old images are of."""

    def changing(message, context):
        number = context.node_config["partition-id"]
        own, counts = CLIENTS[number]
        if number == 0 and message.content["config"]["server-round"] == 2:
            own, counts = spec(("ant", "bee")), counts[::-1]
        return reply(message, own, counts, number)

    pipe = replace(PIPELINE, images_per_teacher=6, distillation=replace(PIPELINE.distillation, relabel=0.5))
    wrapped, _ = run(
        flower.FedAvg(**SAMPLING), ask=changing, places=PLACES, student=STUDENT, pool=PoolConfig(images=99),
        pipeline=pipe, num_rounds=2,
    )  # fmt: skip
    names = [[own.class_names for own, _ in CLIENTS] for _ in range(2)]
    names[1][0] = ("ant", "bee")
    expected = [
        [[NAMES.index(known[target]) for target in found.targets.tolist()]
         for known, found in zip(names[number], record.images, strict=True)]
        for number, record in enumerate(wrapped.rounds)
    ]  # fmt: skip
    first, second = ([found.targets.tolist() for found in images] for _, images, _ in distilled)
    assert first == expected[0]
    assert second == expected[1] + expected[0]


def test_a_client_that_comes_back_with_other_images_is_started_from_noise():
    def changing(message, context):
        number = context.node_config["partition-id"]
        own, counts = CLIENTS[number]
        if number == 0 and message.content["config"]["server-round"] == 2:
            own = spec(("bee", "ant"), img_size=24, patch_size=8)
        return reply(message, own, counts, number)

    wrapped, _ = run(
        flower.FedAvg(**SAMPLING), ask=changing, places=PLACES, student=STUDENT, pool=PoolConfig(warm=True),
        pipeline=replace(PIPELINE, images_per_teacher=8),
    )  # fmt: skip
    assert [len(record.teachers) for record in wrapped.rounds] == [3, 3]


@pytest.mark.parametrize("projection", ["ensemble", "per_teacher"])
def test_a_client_that_does_not_tell_its_counts_does_not_end_the_run(projection):
    def silent(message, context):
        number = context.node_config["partition-id"]
        own, counts = CLIENTS[number]
        return reply(message, own, None if number == 1 else counts, number)

    _, (now,) = run(
        flower.FedAvg(**SAMPLING), ask=silent, places=PLACES, student=STUDENT, projection=projection, num_rounds=1
    )
    assert np.isfinite(now.returned).all()


@pytest.mark.parametrize(("scale", "part"), [(1e5, ""), (1e17, "norm")])
@pytest.mark.parametrize("projection", ["ensemble", "per_teacher"])
def test_a_teacher_whose_gradients_overflow_does_not_end_the_run(projection, scale, part):
    """Its weights and logits are finite, so that it is admitted."""

    def huge(message, context):
        answer = client(message, context)
        arrays = answer.content[records.ARRAYS]
        for key in [key for key in arrays if part in key] if context.node_config["partition-id"] == 0 else []:
            arrays[key] = Array((arrays[key].numpy() * scale).astype(np.float32))
        return answer

    _, (now,) = run(flower.FedAvg(**SAMPLING), 3, ask=huge, projection=projection, num_rounds=1)
    assert {"client 1", "client 2"} <= set(now.names)
    assert np.isfinite(now.returned).all()


def judge(content, student=STUDENT, policy=None):
    return admit(records.read_reply(content), policy or AdmissionPolicy(), Expectation(student, 3), torch.device("cpu"))


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (("ant", "bee", "cat", "dog", "fox"), "the model's classes are not the student's: class_names: got .*fox"),
        (("ant", "bee", "cat", "dog", "dog"), "the model's classes are not the student's: class_names: .*different"),
        (("ant", "bee", "cat", "dog"), "5 names"),
    ],
)
def test_class_names_that_the_student_does_not_have_are_refused(names, reason, monkeypatch):
    content = with_spec(class_names=list(names))
    monkeypatch.setattr("timm.create_model", lambda *_, **__: pytest.fail("it was built before it was refused"))
    with pytest.raises(BadReplyError, match=reason):
        judge(content)


def test_known_class_names_are_admitted_in_any_order():
    teacher = judge(with_spec(class_names=["elk", "ant", "dog", "bee", "cat"]))
    assert teacher.classes == (4, 0, 3, 1, 2)
    assert teacher.aligned_counts == (3, 1, 0, 2, 4)


BARE = {key: value for key, value in small_spec(patch_size=16, depth=1).kwargs.items() if key != "img_size"}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (lambda: with_kwargs(img_size=528, patch_size=16), "argument img_size is 528, allowed: 8 to 518"),
        (lambda: with_spec(image_size=528, kwargs=BARE), r"images of \(528, 528\) px, allowed: at most 518"),
        (lambda: with_spec(image_size=16 * 10**6, kwargs=BARE), "px, allowed: at most 518|parameters, allowed"),
        (lambda: with_spec(name="resnet10t", image_size=519, kwargs={}), r"images of \(519, 519\) px"),
    ],
)
def test_images_larger_than_518_px_are_refused(content, reason):
    policy = AdmissionPolicy(architectures=("vit_tiny_patch16_224", "resnet10t"))
    with pytest.raises(BadReplyError, match=reason):
        judge(content(), replace(STUDENT, class_names=None), policy)
