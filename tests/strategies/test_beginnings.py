"""Where the student starts: the clients' average and the head of their class statistics, against numpy and the pool."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.server import strategy as legacy
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping, FedAvg

from clients.rounds import TrainRequest, statistics_of_start
from simulations.local_grid import InProcessGrid
from smi_fed.checks import SettingError
from smi_fed.class_statistics import class_statistics, discriminant, put_head
from smi_fed.data import ImageSet
from smi_fed.data.decoding import resize
from smi_fed.distillation import DistillationConfig
from smi_fed.models import build_seeded
from smi_fed.strategies import DataFreeDistillation, LegacyDataFreeDistillation, NoStartError, core, records
from smi_fed.strategies.beginning import begin_from
from smi_fed.teachers import TrainedTeacher, store
from tests.models import masked_model, randomised, small_spec, small_vit
from tests.strategies.test_data_free import NODES, PIPELINE, start
from tests.strategies.test_legacy import Client, one_round
from tests.strategies.test_resume import KilledError, after

STUDENT = small_spec()
SPECS = [STUDENT, small_spec(embed_dim=36, num_heads=3), STUDENT]
ALONE = replace(PIPELINE, distillation=DistillationConfig(steps=0))
EXAMPLES = [10, 20, 30]
GENERATOR = torch.Generator().manual_seed(0)
IMAGES = [torch.rand(n, 3, 16, 16, generator=GENERATOR) for n in EXAMPLES]
LABELS = [torch.arange(n) % 5 for n in EXAMPLES]


def reply_of(number, **more):
    model = small_vit(seed=number, **SPECS[number].kwargs)
    claims = {"num_examples": EXAMPLES[number], "label_counts": LABELS[number].bincount(minlength=5).tolist()}
    return records.pack_reply(
        model.spec, model.state_dict(), name=f"client {number}", train_loss=0.5, **{**claims, **more}
    )


def client(message, context):
    """Sends class statistics of the student that came, whether they are asked for or not."""
    number = context.node_config["partition-id"]
    came = build_seeded(STUDENT, 5).eval()
    came.load_state_dict(next(iter(message.content.array_records.values())).to_torch_state_dict())
    sums = class_statistics(came, [(IMAGES[number], LABELS[number])])
    return Message(reply_of(number, class_statistics=sums), reply_to=message)


def strategy(kind, pipeline=ALONE, inside=None, **options):
    inside = inside or FedAvg(fraction_evaluate=0.0, min_train_nodes=2, min_available_nodes=2)
    return DataFreeDistillation(inside, **{"student": STUDENT, "pipeline": pipeline, "start": kind, **options})


def averaged(weights):
    models = [small_vit(seed=number).state_dict() for number in (0, 2)]
    return {key: np.average([model[key].numpy() for model in models], axis=0, weights=weights) for key in models[0]}


def pooled(seed=0):
    """The start with the head of all clients' images in one place."""
    student = build_seeded(STUDENT, seed).eval()
    put_head(student, discriminant(class_statistics(student, [(torch.cat(IMAGES), torch.cat(LABELS))])))
    return {key: value.numpy() for key, value in student.state_dict().items()}


def assert_is(student, expected):
    for key, value in student.items():
        np.testing.assert_allclose(value.numpy(), expected[key], rtol=1e-5, atol=1e-5, err_msg=key)


@pytest.mark.parametrize(("kind", "expected"), [("average", averaged([10, 30])), ("statistics", pooled())])
@pytest.mark.parametrize("projection", ["ensemble", "per_teacher"])
def test_the_start_alone_is_a_baseline(kind, expected, projection):
    wrapped = strategy(kind, projection=projection)
    result = start(wrapped, InProcessGrid(client, NODES))
    assert_is(result.arrays.to_torch_state_dict(), expected)
    (record,) = wrapped.rounds
    assert (record.stored, record.distillation.steps, record.distillation.kept) == ([], 0, "start")


@pytest.mark.parametrize(("kind", "expected"), [("average", averaged([10, 30])), ("statistics", pooled())])
@pytest.mark.parametrize("projection", ["ensemble", "per_teacher"])
def test_distillation_begins_from_the_start_in_round_1_alone(monkeypatch, kind, expected, projection):
    began, distill = [], core.distill_student

    def noted(student, *arguments, **options):
        began.append({key: value.clone() for key, value in student.state_dict().items()})
        return distill(student, *arguments, **options)

    monkeypatch.setattr(core, "distill_student", noted)
    wrapped, each = strategy(kind, PIPELINE, projection=projection), 1 if projection == "ensemble" else 3
    wrapped.start(grid=InProcessGrid(client, NODES), initial_arrays=wrapped.initial_arrays, num_rounds=2)
    assert len(began) == 2 * each
    for weights in began[:each]:
        assert_is(weights, expected)
    with pytest.raises(AssertionError):
        assert_is(began[each], expected)
    last = wrapped.rounds[-1]
    assert last.distillation.kept == ", ".join(["step 2"] * each)
    assert all(teacher.load().class_statistics is None for teacher in last.teachers)


@pytest.mark.parametrize("kind", ["average", "statistics"])
@pytest.mark.parametrize("calls", [1, 2])
def test_a_killed_run_goes_on_from_its_start(tmp_path, monkeypatch, kind, calls):
    def run(directory):
        wrapped = strategy(kind, PIPELINE, state_directory=directory)
        grid, left = InProcessGrid(client, NODES), wrapped.remaining_rounds(2)
        result = wrapped.start(grid=grid, initial_arrays=wrapped.initial_arrays, num_rounds=left)
        return result.arrays.to_torch_state_dict()

    expected = run(tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(core, "distill_student", after(calls, core.distill_student))
        with pytest.raises(KilledError):
            run(tmp_path / "killed")
    found = run(tmp_path / "killed")
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_the_older_api_starts_from_both_too():
    came = build_seeded(STUDENT, 0).eval()
    clients = [
        Client(n, SPECS, class_statistics=class_statistics(came, [(IMAGES[n], LABELS[n])])) for n in range(len(SPECS))
    ]
    for kind, expected in (("average", averaged([10, 30])), ("statistics", pooled())):
        inside = legacy.FedAvg(min_fit_clients=3, min_available_clients=3, fraction_evaluate=0.0)
        wrapped = LegacyDataFreeDistillation(inside, student=STUDENT, pipeline=ALONE, start=kind)
        one_round(wrapped, clients)
        assert_is(wrapped.student.state_dict(), expected)


def test_an_average_of_models_with_batch_norm():
    first, second = masked_model("resnet"), randomised(masked_model("resnet"), 1)
    for count, model in ((4, first), (8, second)):
        for key, buffer in model.named_buffers():
            buffer.fill_(count) if key.endswith("num_batches_tracked") else None
    student = masked_model("resnet")
    begin_from("average", student, [TrainedTeacher("a", first, 1), TrainedTeacher("b", second, 3)])
    mine, theirs = first.state_dict(), second.state_dict()
    for key, value in student.state_dict().items():
        expected = np.average([mine[key].numpy(), theirs[key].numpy()], axis=0, weights=[1, 3])
        np.testing.assert_allclose(value.numpy(), expected, rtol=1e-6, atol=1e-6)
        assert value.dtype == mine[key].dtype


def test_a_claim_of_many_examples_does_not_outweigh_all_others():
    """Ten times the median is the most that counts: 10 * 20 of 10 million, in the average and in the sums."""

    def liar(message, context):
        if context.node_config["partition-id"] != 2:
            return client(message, context)
        sums = class_statistics(build_seeded(STUDENT, 0).eval(), [(IMAGES[2], LABELS[2])])
        many = type(sums)(*(1_000_000 / 6 * each for each in vars(sums).values()))
        many = replace(many, counts=many.counts.round())
        counts = many.counts.long().tolist()
        content = reply_of(2, num_examples=sum(counts), label_counts=counts, class_statistics=many)
        return Message(content, reply_to=message)

    wrapped = strategy("average")
    start(wrapped, InProcessGrid(liar, NODES))
    assert_is(wrapped.student.state_dict(), averaged([10, 200]))
    known = class_statistics(build_seeded(STUDENT, 0).eval(), [(IMAGES[2], LABELS[2])])
    honest = class_statistics(build_seeded(STUDENT, 0).eval(), [(torch.cat(IMAGES[:2]), torch.cat(LABELS[:2]))])
    share = 200 / 30
    total = type(known)(*(a + share * b for a, b in zip(vars(honest).values(), vars(known).values(), strict=True)))
    wrapped = strategy("statistics")
    start(wrapped, InProcessGrid(liar, NODES))
    torch.testing.assert_close(
        wrapped.student.backbone.head.weight, discriminant(total)[0].float(), rtol=1e-3, atol=1e-3
    )


def test_a_run_without_what_it_starts_from_says_so_and_asks_again(tmp_path):
    def poor(message, context):
        return Message(reply_of(context.node_config["partition-id"]), reply_to=message)

    for kind, student, says in (
        ("average", small_spec(depth=1), r"average needs a client of the student's architecture, vit_tiny.*depth 1"),
        ("statistics", STUDENT, r"statistics needs a client with at least client\.minimum_examples images of one"),
    ):
        for _ in range(2):
            asked = []

            def noted(message, context, asked=asked):
                asked.append(context.node_id)
                return poor(message, context)

            wrapped = strategy(kind, student=student, state_directory=tmp_path / kind)
            with pytest.raises(NoStartError, match=says):
                start(wrapped, InProcessGrid(noted, NODES))
            assert len(asked) == 3


def test_statistics_are_stored_with_their_teacher(tmp_path):
    sums = class_statistics(small_vit(), [(IMAGES[0], LABELS[0])])
    stored = store(TrainedTeacher("a", small_vit(), 10, class_statistics=sums), tmp_path / "a.safetensors")
    found = stored.load(verify=True).class_statistics
    assert all(torch.equal(value, getattr(found, key)) for key, value in vars(sums).items())


def asked(server_round=1):
    student = build_seeded(replace(STUDENT, class_names=tuple("abcde")), 0)
    content = RecordDict({
        "arrays": ArrayRecord(student.state_dict()), "config": ConfigRecord({"server-round": server_round}),
    })  # fmt: skip
    return TrainRequest(SimpleNamespace(content=content), student.spec)


def settings(start="statistics", least=3):
    return SimpleNamespace(strategy=SimpleNamespace(start=start), client=SimpleNamespace(minimum_examples=least))


def test_a_client_tells_in_the_students_classes_and_leaves_small_classes_out():
    """It knows d, a and e in this order, has images of another size, and of a only two."""
    spec = small_spec(num_classes=3, img_size=32)
    spec = replace(spec, class_names=("d", "a", "e"))
    images, labels = resize(IMAGES[0], (32, 32)), torch.tensor([0, 1, 2, 0, 2, 0, 1, 2, 0, 2])
    data, cpu = ImageSet(images, labels, spec.class_names), torch.device("cpu")
    found = statistics_of_start(settings(), asked(), spec, data, cpu)
    kept = labels != 1
    expected = class_statistics(
        asked().student(), [(resize(images, (16, 16))[kept], torch.tensor([3, 0, 4])[labels[kept]])]
    )
    assert found.counts.tolist() == [0, 0, 0, 4, 4]
    for key, value in vars(expected).items():
        torch.testing.assert_close(getattr(found, key), value)
    assert statistics_of_start(settings(least=5), asked(), spec, data, cpu) is None
    assert statistics_of_start(settings("own"), asked(), spec, data, cpu) is None
    assert statistics_of_start(settings(), asked(2), spec, data, cpu) is None


@pytest.mark.parametrize("kind", ["average", "statistics"])
def test_a_start_without_noise_is_refused_inside_privacy(kind):
    private = DifferentialPrivacyServerSideFixedClipping(FedAvg(), 1.0, 1.0, 2)
    with pytest.raises(SettingError, match=f"start: got '{kind}', allowed: own | random | pretrained inside Diff"):
        strategy(kind, inside=private, projection="per_teacher")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"kind": "warm"}, "start: got 'warm', allowed: own | random"),
        ({"kind": "pretrained"}, "start: got 'pretrained', allowed: own | random | .* start is null"),
        ({"kind": "average", "refine": True}, "start: got 'average', allowed: own, where refine is true"),
        (
            {"kind": "statistics", "student": small_spec("deit_tiny_distilled_patch16_224")},
            "model.student: got 'deit_tiny_distilled_patch16_224', allowed: a timm model with one linear head",
        ),
    ],
)
def test_a_start_that_cannot_be_is_refused_at_once(options, says):
    with pytest.raises(SettingError, match=says):
        strategy(**options)


@pytest.mark.cuda
def test_models_on_a_gpu_are_averaged_on_the_students_device():
    models = [small_vit(seed) for seed in range(2)]
    expected = models[0].state_dict()["backbone.cls_token"] * 0.25 + models[1].state_dict()["backbone.cls_token"] * 0.75
    student = small_vit(5)
    begin_from("average", student, [TrainedTeacher(str(n), m.cuda(), 1 + 2 * n, None) for n, m in enumerate(models)])
    assert torch.allclose(student.state_dict()["backbone.cls_token"], expected, atol=1e-6)
