"""`DataFreeDistillation` over real messages, without processes."""

import logging
import zlib

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Message, MetricRecord
from flwr.serverapp.strategy import FedAvg

from simulations.local_grid import InProcessGrid
from smi_fed.distillation import DistillationConfig
from smi_fed.inversion import InversionConfig, SparseImages
from smi_fed.pipeline import PipelineConfig
from smi_fed.strategies import DataFreeDistillation, TooFewTeachersError, records
from smi_fed.strategies.watching_grid import WatchingGrid
from tests.models import small_spec, small_vit
from tests.same import assert_same

NODES = {11: {"partition-id": 0}, 22: {"partition-id": 1}, 33: {"partition-id": 2}}
ARCHITECTURES = [small_spec(), small_spec(embed_dim=36, num_heads=3), small_spec(patch_size=8, depth=1)]
PIPELINE = PipelineConfig(
    images_per_teacher=4,
    inversion=InversionConfig.paper(iterations=3, schedule="1:0.5"),
    distillation=DistillationConfig(steps=2, batch_size=4),
)


def client(message, context):
    number = context.node_config["partition-id"]
    model = small_vit(seed=number, **ARCHITECTURES[number].kwargs)
    return Message(
        records.pack_reply(
            model.spec, model.state_dict(), name=f"client {number}", num_examples=10 * (number + 1),
            train_loss=float(number), label_counts=[2 * (number + 1)] * 5,
        ),
        reply_to=message,
    )  # fmt: skip


def strategy(**changes):
    inner = FedAvg(fraction_evaluate=0.0, min_train_nodes=2, min_available_nodes=2)
    return DataFreeDistillation(inner, **{"student": small_spec(depth=3), "pipeline": PIPELINE, **changes})


def start(wrapped, grid, **arguments):
    return wrapped.start(grid=grid, initial_arrays=wrapped.initial_arrays, num_rounds=1, **arguments)


def test_three_architectures_become_one_student(tmp_path):
    seen = []
    wrapped = strategy(image_directory=tmp_path, on_round=seen.append)
    before = {key: value.clone() for key, value in wrapped.student.state_dict().items()}
    result = start(wrapped, WatchingGrid(InProcessGrid(client, NODES), interval=0.01))
    (record,) = seen
    assert [t.name for t in record.teachers] == ["client 0", "client 1", "client 2"]
    assert [len(images) for images in record.images] == [4, 4, 4]
    assert [images.patch_size for images in record.images] == [(4, 4), (4, 4), (8, 8)]
    numbers = [zlib.crc32(f"client {number}".encode()) for number in range(3)]
    assert [images.teachers.tolist() for images in record.images] == [[number] * 4 for number in numbers]
    for number, images in zip(numbers, record.images, strict=True):
        (path,) = tmp_path.glob(f"round1-client-?-{number:08x}.safetensors")
        assert_same(SparseImages.load(path), images)
    student = result.arrays.to_torch_state_dict()
    assert any(not torch.equal(student[key], before[key]) for key in before)
    for key, value in wrapped.student.state_dict().items():  # the mean of equal students is the student
        torch.testing.assert_close(student[key], value, atol=1e-6, rtol=1e-6)
    # FedAvg's own weighted mean of the clients' losses, by hand: (10 * 0 + 20 * 1 + 30 * 2) / 60
    assert result.train_metrics_clientapp[1]["train_loss"] == pytest.approx(80 / 60)


def test_same_seed_same_student_whoever_answers_first():
    first, second, other = strategy(seed=1), strategy(seed=1), strategy(seed=2)
    start(first, InProcessGrid(client, NODES))
    start(second, InProcessGrid(client, {90 - node: config for node, config in reversed(NODES.items())}))
    start(other, InProcessGrid(client, NODES))
    students = [list(s.student.state_dict().values()) for s in (first, second, other)]
    assert all(torch.equal(a, b) for a, b in zip(students[0], students[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(students[0], students[2], strict=True))


def bad_client(message, context):
    reply = client(message, context)
    if context.node_config["partition-id"] == 1:
        key = "backbone.head.bias"
        bias = reply.content[records.ARRAYS][key].numpy().copy()
        bias[0] = np.nan
        reply.content[records.ARRAYS][key] = type(reply.content[records.ARRAYS][key])(bias)
    return reply


def failing_client(message, context):
    if context.node_config["partition-id"] == 2:
        raise RuntimeError("the disk is full")
    return bad_client(message, context)


def test_a_nan_reply_is_refused_and_reported_by_node(caplog):
    wrapped = strategy()
    with caplog.at_level(logging.WARNING, "smi_fed"):
        start(wrapped, InProcessGrid(bad_client, NODES))
    refused = [v for v in wrapped.rounds[0].verdicts if not v.admitted]
    assert [(v.node, "backbone.head.bias is not finite" in v.reason) for v in refused] == [(22, True)]
    assert "node 22 refused: backbone.head.bias is not finite" in caplog.text
    assert bool(torch.cat([w.flatten() for w in wrapped.student.parameters()]).isfinite().all())


def test_too_few_teachers_end_the_run_with_every_reason():
    wrapped = strategy()
    with pytest.raises(TooFewTeachersError, match="1 teachers admitted, 2 needed") as error:
        start(wrapped, InProcessGrid(failing_client, NODES))
    assert "node 33: client failed: RuntimeError: the disk is full (code 2)" in str(error.value)
    assert "node 22: backbone.head.bias is not finite" in str(error.value)
    assert not wrapped.rounds


def test_silent_and_lost_nodes_are_named_by_who_was_asked():
    wrapped = strategy(min_teachers=1)
    grid = WatchingGrid(InProcessGrid(client, NODES, silent={11}, lost={33}), interval=0.01)
    start(wrapped, grid, timeout=0.05)
    reasons = {v.node: v.reason for v in wrapped.rounds[0].verdicts}
    assert reasons == {11: "no reply in time", 22: "", 33: "client failed: node unavailable (code 5)"}


def test_no_reply_at_all_ends_the_run():
    wrapped = strategy()
    wrapped.configure_train(1, wrapped.initial_arrays, ConfigRecord(), InProcessGrid(client, NODES))
    with pytest.raises(TooFewTeachersError, match="no reply in time"):
        wrapped.aggregate_train(1, [])
    with pytest.raises(TooFewTeachersError, match="no node replied"):
        strategy().aggregate_train(1, [])


def test_replies_are_left_as_they_came():
    wrapped = strategy()
    grid = InProcessGrid(client, NODES)
    replies = grid.send_and_receive(wrapped.configure_train(1, wrapped.initial_arrays, ConfigRecord(), grid))
    before = [dict(reply.content[records.ARRAYS]) for reply in replies]
    wrapped.aggregate_train(1, replies)
    assert [dict(reply.content[records.ARRAYS]) for reply in replies] == before


def test_start_is_flowers_own_and_hands_on_what_it_is_given():
    assert "start" not in vars(DataFreeDistillation)
    rounds = []
    wrapped = strategy()
    start(
        wrapped, InProcessGrid(client, NODES), train_config=ConfigRecord({"lr": 0.1}),
        evaluate_fn=lambda number, _: rounds.append(number) or MetricRecord({"a": 1.0}),
    )  # fmt: skip
    assert rounds == [0, 1]


def test_bad_construction_is_refused():
    with pytest.raises(ValueError, match="strategy: got 'object'"):
        DataFreeDistillation(object(), student=small_spec())
    with pytest.raises(ValueError, match="min_teachers: got 0"):
        strategy(min_teachers=0)
    with pytest.raises(ValueError, match="name: got 'no_such_model'"):
        strategy(student=small_spec("no_such_model"))


def test_watching_grid_shows_arrivals_and_stops_at_its_timeout(caplog):
    with caplog.at_level(logging.INFO, "smi_fed"):
        arrived = []
        grid = WatchingGrid(InProcessGrid(client, NODES, silent={33}), on_reply=arrived.append, interval=0.01)
        wrapped = strategy()
        messages = list(wrapped.configure_train(1, wrapped.initial_arrays, ConfigRecord(), grid))
        replies = grid.send_and_receive(messages, timeout=0.1)
    assert [each.metadata for each in replies] == [each.metadata for each in arrived]
    assert sorted(verdict.node for verdict in wrapped.core.arrivals.verdicts) == [11, 22]
    assert not any(each.content for each in replies)  # what was judged is not held
    assert "waiting for train replies:   0%" in caplog.text  # before anybody has answered
    assert grid.send_and_receive([], timeout=None) == []
