"""A teacher of false labels is named in the round's record, after a restart too, and in every report of it."""

import io
from functools import cache

import pytest
import torch
from flwr.app import Message
from rich.console import Console

from server import reporting
from simulations.local_grid import InProcessGrid
from smi_fed.checks import SettingError
from smi_fed.data import ImageSet
from smi_fed.distillation import Agreement, DistillationConfig
from smi_fed.events import Events
from smi_fed.inversion import InversionConfig
from smi_fed.models import build_model
from smi_fed.pipeline import PipelineConfig, TrainedTeacher, distill_student, seeded
from smi_fed.pool import PoolConfig
from smi_fed.report import print_summary
from smi_fed.report_page import page
from smi_fed.strategies import records
from smi_fed.training import TrainingConfig, train
from tests.models import small_spec, small_vit
from tests.strategies.test_data_free import NODES, start, strategy
from tests.test_distillation import fresh, same_weights, sparse
from tests.test_report import REPORT

ALL = {**NODES, 44: {"partition-id": 3}}
LIAR = "client 2"
PIPELINE = PipelineConfig(
    images_per_teacher=20,
    inversion=InversionConfig.paper(iterations=15, schedule="5:0.5", jitter=0, parametrisation="pyramid"),
    distillation=DistillationConfig(steps=2, batch_size=4, robust=Agreement(trigger=None)),
)


@cache
def trained(number):
    """A model that tells five grey levels apart; the liar's labels are in the reverse order."""
    torch.manual_seed(number)
    labels = torch.arange(200) % 5
    images = (labels / 4)[:, None, None, None] * 0.8 + 0.2 * torch.rand(200, 3, 16, 16)
    model = build_model(small_spec())
    taught = ImageSet(images, 4 - labels if number == 2 else labels, tuple("abcde"))
    train(model, taught, TrainingConfig(steps=60), generator=torch.Generator().manual_seed(number))
    return model


def client(message, context):
    number = context.node_config["partition-id"]
    model = trained(number)
    content = records.pack_reply(
        model.spec, model.state_dict(), name=f"client {number}", num_examples=200, train_loss=0.1, label_counts=[40] * 5
    )
    return Message(content, reply_to=message)


def test_a_teacher_of_false_labels_is_named_wherever_it_is_told_of(tmp_path, caplog):
    told, state = [], tmp_path / "state"
    options = {"pipeline": PIPELINE, "state_directory": state, "pool": PoolConfig(images=100)}
    wrapped = strategy(**options, events=Events("run", [told.append]))
    start(wrapped, InProcessGrid(client, ALL))
    (record,) = wrapped.rounds
    factors = {verdict.called: verdict.opinion.factor for verdict in record.verdicts}
    assert factors == {"client 0": 1, "client 1": 1, LIAR: 0, "client 3": 1}
    reason = next(verdict.opinion.reason for verdict in record.verdicts if verdict.called == LIAR)
    assert "its agreement on the others' images is" in reason
    assert reason.endswith("left out of the ensemble")
    assert f"{LIAR}: {reason}" in caplog.text
    doubted = [event for event in told if (event.stage, event.name) == ("agreement", "doubted")]
    assert [(event.node, event.values["reason"]) for event in doubted] == [(LIAR, reason)]
    assert [entry.client.partition(",")[0] for entry in wrapped.core.pool.entries] == [
        "client 0",
        "client 1",
        "client 3",
    ]

    again = strategy(**options)
    assert [verdict.opinion for verdict in again.rounds[0].verdicts] == [v.opinion for v in record.verdicts]
    assert len(again.core.pool.entries) == 3
    assert [each["name"] for each in reporting._round(again.rounds[0])["doubted"]] == [LIAR]
    lines = reporting._clients(again.rounds[0].verdicts, [])
    assert [(line["name"], line["weight_factor"]) for line in lines if line["doubt"]] == [(LIAR, 0.0)]
    console = Console(file=io.StringIO(), width=500)
    print_summary({**REPORT, "clients": lines}, console)
    (row,) = [line for line in console.file.getvalue().splitlines() if LIAR in line]
    assert reason in row
    assert reason.replace("'", "&#39;") in page({**REPORT, "clients": lines}, "run")


def test_who_is_left_out_teaches_nothing():
    """Neither by what it says nor by its images; who has half a factor teaches half as much."""

    def student(liar, factors):
        teachers = [TrainedTeacher(f"t{i}", small_vit(i), 10, (2,) * 5) for i in (1, 2, liar)]
        images, found = [sparse(6, seed=i) for i in (1, 2, liar)], fresh()
        distill_student(found, teachers, images, DistillationConfig(steps=3, batch_size=8), seeded(0), factors=factors)
        return found.state_dict()

    assert same_weights(student(3, [1, 1, 0]), student(4, [1, 1, 0]))
    assert not same_weights(student(3, [1, 1, 0.5]), student(4, [1, 1, 0.5]))
    assert same_weights(student(3, [1, 1, 1]), student(3, None))


def test_agreement_needs_all_teachers_together():
    with pytest.raises(
        SettingError, match=r"distillation.robust.kind: got 'agreement'.* where projection is per_teach"
    ):
        strategy(pipeline=PIPELINE, projection="per_teacher")
