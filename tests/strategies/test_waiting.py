"""Rounds that end without the slowest, replies that come late, and a run without rounds."""

import logging
import threading
import time
from dataclasses import replace

import pytest
import torch
from flwr.app import Message
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping, FedAvg

from simulations.local_grid import InProcessGrid
from smi_fed.checks import SettingError
from smi_fed.distillation import ensemble_weights
from smi_fed.events import Events
from smi_fed.executors import job
from smi_fed.pipeline import weights_of
from smi_fed.strategies import DataFreeDistillation, FederatedEvaluation, WaitingConfig, WatchingGrid, records
from tests.models import small_spec, small_vit
from tests.strategies.test_data_free import NODES, PIPELINE, client, strategy
from tests.strategies.test_federated_evaluation import evaluating
from tests.strategies.test_resume import KilledError, after

NEVER = 10**9


class SlowGrid(InProcessGrid):
    """Of each node's questions, in turn, the replies are there when they are looked for so many times."""

    def __init__(self, looks, answer=client, **grid):
        super().__init__(answer, NODES, **grid)
        self.looks = {node: list(each) for node, each in looks.items()}
        self.answered, self.questions = [], []

    def push_messages(self, messages):
        messages = list(messages)
        self.questions.append(sorted(m.metadata.dst_node_id for m in messages if m.metadata.message_type == "train"))
        return super().push_messages(messages)

    def _is_silent(self, asked):
        left = self.looks.get(self.asked[asked].metadata.dst_node_id, [])
        if left and left[0] > 1:
            left[0] -= 1
            return True
        del left[:1]
        return False


def run(grid, rounds=1, timeout=60, interval=0.001, directory=None, **waiting):
    wrapped = strategy(waiting=WaitingConfig(**waiting), state_directory=directory)
    watching = WatchingGrid(grid, interval=interval)
    wrapped.start(
        grid=watching, initial_arrays=wrapped.initial_arrays, num_rounds=wrapped.remaining_rounds(rounds),
        timeout=timeout,
    )  # fmt: skip
    return wrapped


def ages(wrapped):
    return [{v.node: v.age for v in record.admitted} for record in wrapped.rounds]


def test_a_quorum_ends_a_round_and_the_late_reply_joins_the_next(caplog):
    with caplog.at_level(logging.INFO, "smi_fed"):
        grid = SlowGrid({33: [3]})
        wrapped = run(grid, rounds=3, quorum=2)
    assert ages(wrapped) == [{11: 0, 22: 0}, {11: 0, 22: 0, 33: 1}, {11: 0, 22: 0, 33: 0}]
    assert grid.questions == [[11, 22, 33], [11, 22], [11, 22, 33]]
    assert [v.reason for v in wrapped.rounds[0].verdicts if not v.admitted] == ["no reply in time"]
    assert "client 2, node 33 admitted: vit_tiny_patch16_224 (patch 8, width 24, depth 1, heads 2), 30 examples, " \
        "asked in round 1" in caplog.text  # fmt: skip
    assert [teacher.factor for teacher in wrapped.rounds[1].teachers] == [1.0, 1.0, 2**-0.5]


def test_age_is_in_the_weight_of_the_ensemble():
    wrapped = run(SlowGrid({33: [3]}), rounds=2, quorum=2, staleness=1.0)
    teachers = wrapped.rounds[1].teachers
    assert torch.allclose(weights_of(teachers, "examples")[:, 0], torch.tensor([10.0, 20, 15]) / 45)
    # Each client's examples are even over the five classes.
    assert torch.allclose(weights_of(teachers, "class"), (torch.tensor([10.0, 20, 15]) / 45)[:, None].expand(3, 5))
    nobody = ensemble_weights("class", [1, 1], [[0.0], [0.0]], [1.0, 0.5])
    assert torch.allclose(nobody[:, 0], torch.tensor([2 / 3, 1 / 3]))


def test_the_inner_strategy_weighs_a_late_reply_less():
    class Noting(FedAvg):
        def aggregate_train(self, server_round, replies):
            replies = list(replies)
            seen.append([reply.content["metrics"]["num-examples"] for reply in replies])
            return super().aggregate_train(server_round, replies)

    seen = []
    inner = Noting(fraction_evaluate=0.0, min_train_nodes=2, min_available_nodes=2)
    wrapped = DataFreeDistillation(
        inner, WaitingConfig(quorum=2, staleness=1.0), student=small_spec(depth=3), pipeline=PIPELINE
    )
    grid = WatchingGrid(SlowGrid({33: [3]}), interval=0.001)
    wrapped.start(grid=grid, initial_arrays=wrapped.initial_arrays, num_rounds=2)
    assert seen == [[10, 20], [10, 20, 15]]


def test_who_answers_within_the_grace_is_waited_for():
    assert ages(run(SlowGrid({33: [40]}), quorum=2, grace_seconds=30)) == [{11: 0, 22: 0, 33: 0}]
    began = time.monotonic()
    assert ages(run(SlowGrid({33: [NEVER]}), quorum=2, grace_seconds=0.5)) == [{11: 0, 22: 0}]
    assert 0.5 <= time.monotonic() - began < 15


def test_a_reply_after_the_timeout_joins_the_next_round_too():
    grid = SlowGrid({33: [1000]})
    wrapped = run(grid, rounds=2, timeout=0.3)
    assert ages(wrapped)[0] == {11: 0, 22: 0}
    grid.looks[33] = []
    second = wrapped.rounds[1].verdicts
    assert grid.questions == [[11, 22, 33], [11, 22]]
    assert {v.node: v.reason for v in second if not v.admitted} in ({}, {33: "still at work on round 1, so not asked"})


def test_a_late_failure_is_named_and_the_node_is_asked_again():
    class Dying(SlowGrid):
        def _reply(self, message):
            reply = super()._reply(message)
            self.lost -= {message.metadata.dst_node_id}
            return reply

    grid = Dying({33: [3]}, lost={33})
    wrapped = run(grid, rounds=3, quorum=2)
    assert ages(wrapped) == [{11: 0, 22: 0}, {11: 0, 22: 0}, {11: 0, 22: 0, 33: 0}]
    (failed,) = [v for v in wrapped.rounds[1].verdicts if not v.admitted]
    assert (failed.node, failed.age, failed.reason) == (33, 1, "client failed: node unavailable (code 5)")


def test_what_a_late_reply_leaves_out_is_what_it_was_sent():
    """The client has not changed the student of round 1; that of round 2 is another."""

    def echo(message, context):
        number = context.node_config["partition-id"]
        if number != 2:
            return client(message, context)
        model = small_vit(depth=3)
        model.load_state_dict(next(iter(message.content.array_records.values())).to_torch_state_dict())
        sent[message.content["config"]["server-round"]] = model.state_dict()
        known = records.read_known(message.content)
        content = records.pack_reply(
            model.spec, model.state_dict(), name="echo", num_examples=5, train_loss=0.0, label_counts=[1] * 5,
            known=known,
        )  # fmt: skip
        return Message(content, reply_to=message)

    sent = {}
    wrapped = strategy(waiting=WaitingConfig(quorum=2))
    wrapped.core.starts = {b"of another": None}  # clients leave out what they were sent
    grid = SlowGrid({33: [3]}, echo)
    wrapped.start(
        grid=WatchingGrid(grid, interval=0.001), initial_arrays=wrapped.initial_arrays, num_rounds=2, timeout=60
    )
    (late,) = [v for v in wrapped.rounds[1].admitted if v.node == 33]
    assert (late.age, list(sent)) == (1, [1])
    known = late.teacher.load().model.state_dict()
    assert all(torch.equal(known[key], value) for key, value in sent[1].items())


def test_without_rounds_every_clients_newest_model_teaches(tmp_path):
    """33 takes three refreshes for each model, and is never waited for."""
    grid = SlowGrid({33: [7, 7]})
    wrapped = run(grid, rounds=6, directory=tmp_path, quorum=2, asynchronous=True)
    assert ages(wrapped)[0] == {11: 0, 22: 0}
    arrived = next(place for place, found in enumerate(ages(wrapped)) if 33 in found)
    assert ages(wrapped)[arrived] == {11: 0, 22: 0, 33: arrived}
    for place, found in enumerate(ages(wrapped)[arrived + 1 :], arrived + 1):
        assert found.keys() == {11, 22, 33}
        assert 0 < found[33] <= ages(wrapped)[place - 1][33] + 1
    assert {path.name[5] for path in tmp_path.glob("*client-2*.model.safetensors")} <= {str(arrived + 1), "6"}
    assert all(len(record.stored) == len(record.teachers) for record in wrapped.rounds)


def test_two_quick_of_three_are_enough_and_the_third_is_carried_on():
    grid = SlowGrid({33: [1, NEVER]})
    wrapped = run(grid, rounds=3, quorum=2, asynchronous=True)
    assert ages(wrapped) == [{11: 0, 22: 0, 33: 0}, {11: 0, 22: 0, 33: 1}, {11: 0, 22: 0, 33: 2}]
    assert [teacher.factor for teacher in wrapped.rounds[2].teachers] == [1.0, 1.0, 3**-0.5]
    (carried,) = {v.images.path for record in wrapped.rounds for v in record.admitted if v.node == 33}
    assert carried.name.startswith("round1-")  # inverted once


def test_a_run_without_rounds_goes_on_after_a_crash(tmp_path, monkeypatch):
    looks = {33: [1, NEVER]}
    whole = run(SlowGrid(looks), rounds=3, quorum=2, asynchronous=True)
    with monkeypatch.context() as patch:
        patch.setattr(job, "invert_teacher", after(6, job.invert_teacher))
        with pytest.raises(KilledError):
            run(SlowGrid(looks), rounds=3, quorum=2, asynchronous=True, directory=tmp_path)
    again = run(SlowGrid({33: [NEVER]}), rounds=3, quorum=2, asynchronous=True, directory=tmp_path)
    assert ages(again) == ages(whole)
    pairs = zip(whole.student.parameters(), again.student.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_late_nodes_are_not_asked_to_evaluate():
    wrapped = FederatedEvaluation(strategy(waiting=WaitingConfig(quorum=2)), classes=5)
    grid = WatchingGrid(SlowGrid({33: [NEVER]}, evaluating), interval=0.001)
    wrapped.start(grid=grid, initial_arrays=wrapped.strategy.initial_arrays, num_rounds=2, timeout=60)
    reasons = [{each.node: each.reason for each in wrapped.rounds[number]} for number in (1, 2)]
    assert reasons[0] == {11: "", 22: "", 33: "no reply in time to this round's training"}
    assert reasons[1] == {11: "", 22: "", 33: "still at work on its training"}


@pytest.mark.parametrize("seconds", [1.0, pytest.param(30.0, marks=pytest.mark.slow)])
def test_a_late_client_overlaps_with_the_servers_work(seconds):
    """By the clock: others' models are inverted and the student is distilled while it still works."""

    class Later(InProcessGrid):
        def _is_silent(self, asked):
            return self.asked[asked].metadata.dst_node_id == 33 and not arrived.is_set()

    arrived, told, begun = threading.Event(), [], time.time()
    timer = threading.Timer(seconds, arrived.set)
    timer.start()
    wrapped = strategy(waiting=WaitingConfig(quorum=3), events=Events("run", [told.append]))
    wrapped.start(
        grid=WatchingGrid(Later(client, NODES), interval=0.01), initial_arrays=wrapped.initial_arrays, num_rounds=1
    )
    timer.join()
    ended = {each.node: each.time - begun for each in told if (each.stage, each.name) == ("inversion", "ended")}
    assert len(ended) == 3
    assert max(ended["client 0"], ended["client 1"]) < seconds <= ended["client 2"]


def test_a_quorum_is_checked_when_it_is_made():
    for wrong, key in (
        ({"grace_seconds": 3.0}, "grace_seconds"), ({"asynchronous": True}, "asynchronous"), ({"quorum": 0}, "quorum"),
        ({"quorum": 2, "staleness": -1.0}, "staleness"),
    ):  # fmt: skip
        with pytest.raises(SettingError, match=f"^{key}: "):
            WaitingConfig(**wrong)
    with pytest.raises(SettingError, match=r"quorum: got 1, allowed: None, or at least min_teachers \(2\)"):
        strategy(waiting=WaitingConfig(quorum=1))
    private = DifferentialPrivacyServerSideFixedClipping(FedAvg(), 0.1, 1.0, 2)
    with pytest.raises(SettingError, match="None inside DifferentialPrivacyServerSideFixedClipping"):
        DataFreeDistillation(
            private, WaitingConfig(quorum=2), student=small_spec(), pipeline=PIPELINE, projection="per_teacher"
        )


def test_a_weight_falls_with_age():
    halved = WaitingConfig(staleness=1.0)
    assert [halved.weight(age) for age in range(3)] == [1.0, 0.5, 1 / 3]
    assert replace(halved, staleness=0.0).weight(9) == 1.0
