"""Every client is asked after a round; what fails is told of, and the others count."""

import logging

import pytest
from flwr.app import Message, MessageType, MetricRecord
from flwr.serverapp.strategy import FedAvg

from simulations.local_grid import InProcessGrid
from smi_fed.strategies import FederatedEvaluation
from smi_fed.strategies.evaluation import Counts, Measured
from smi_fed.strategies.evaluation_records import pack_evaluation
from smi_fed.strategies.watching_grid import WatchingGrid
from tests.strategies.test_data_free import NODES, client, strategy

RIGHT = {0: Counts(10, 5, 8), 1: Counts(20, 18, 10), 2: Counts(70, 63)}
ASKED = []


def evaluating(message, context):
    number = context.node_config["partition-id"]
    ASKED.append((message.metadata.message_type, number))
    if message.metadata.message_type == MessageType.TRAIN:
        return client(message, context)
    assert message.content["config"]["server-round"] >= 1
    if context.node_config.get("fails"):
        raise RuntimeError("the disk is full")
    content = pack_evaluation(Measured(f"client {number}", RIGHT[number]))
    if context.node_config.get("lies"):
        content["metrics"]["student-right"] = 10**6
    return Message(content, reply_to=message)


@pytest.fixture(autouse=True)
def _nobody_asked():
    ASKED.clear()


def run(nodes=NODES, rounds=1, inner=None, **grid):
    wrapped = FederatedEvaluation(inner or strategy(min_teachers=1), classes=5)
    watching = WatchingGrid(InProcessGrid(evaluating, nodes, **grid), interval=0.01)
    arrays = wrapped.strategy.initial_arrays
    return wrapped, wrapped.start(grid=watching, initial_arrays=arrays, num_rounds=rounds, timeout=0.2)


def reasons(wrapped, server_round=1):
    return {each.name: each.reason for each in wrapped.rounds[server_round]}


def test_each_client_is_asked_once_a_round_and_the_mean_is_flowers_metric():
    wrapped, result = run(rounds=2)
    assert sorted(ASKED) == sorted(2 * [(kind, number) for number in range(3) for kind in ("train", "evaluate")])
    assert set(wrapped.rounds) == {1, 2}
    assert {each.name: each.measured.total for each in wrapped.rounds[2]} == {
        f"client {number}": counts for number, counts in RIGHT.items()
    }
    metrics = dict(result.evaluate_metrics_clientapp[2])
    assert metrics == {"images": 100, "student_accuracy": 0.86, "own_accuracy": 18 / 30}


def changed(**kinds):
    return {node: {**config, **kinds.get(f"n{node}", {})} for node, config in NODES.items()}


def test_one_that_fails_and_one_that_lies_are_named_and_the_third_counts(caplog):
    with caplog.at_level(logging.WARNING, "smi_fed"):
        wrapped, result = run(changed(n22={"fails": True}, n33={"lies": True}))
    assert reasons(wrapped) == {
        "client 0": "",
        "client 1": "client failed: RuntimeError: the disk is full (code 2)",
        "client 2": "student-right is 1000000, expected an int from 0 to 70, the images",
    }
    assert dict(result.evaluate_metrics_clientapp[1])["images"] == 10
    assert "client 1, node 22 was not evaluated: client failed: RuntimeError: the disk is full" in caplog.text


def test_all_that_fail_do_not_end_the_run(caplog):
    with caplog.at_level(logging.WARNING, "smi_fed"):
        wrapped, result = run({node: {**config, "fails": True} for node, config in NODES.items()})
    assert all("the disk is full" in reason for reason in reasons(wrapped).values())
    assert not result.evaluate_metrics_clientapp
    assert "round 1: no client measured anything" in caplog.text


def test_who_left_training_without_an_answer_is_not_waited_for_again():
    wrapped, _ = run(silent={11}, lost={33})
    assert reasons(wrapped) == {
        "node 11": "no reply in time to this round's training", "client 1": "",
        "node 33": "client failed: node unavailable (code 5)",
    }  # fmt: skip


class Leaving(InProcessGrid):
    """One node is gone, and another falls silent, once training is over."""

    def push_messages(self, messages):
        messages = list(messages)
        if messages[0].metadata.message_type == MessageType.EVALUATE:
            self.silent = {11}
        else:
            self.trained = True
        return super().push_messages(messages)

    def get_node_ids(self):
        return [node for node in self.nodes if node != 22 or not getattr(self, "trained", False)]


def test_who_is_gone_or_silent_after_training_is_told_of_by_its_name():
    wrapped = FederatedEvaluation(strategy(), classes=5)
    grid = WatchingGrid(Leaving(evaluating, NODES), interval=0.01)
    wrapped.start(grid=grid, initial_arrays=wrapped.strategy.initial_arrays, num_rounds=1, timeout=0.2)
    assert reasons(wrapped) == {
        "client 0": "no reply in time", "client 1": "not connected any more", "client 2": "",
    }  # fmt: skip


def test_two_clients_of_one_name_are_told_apart_where_nobody_named_them():
    def same(message, context):
        reply = evaluating(message, context)
        if message.metadata.message_type == MessageType.EVALUATE:
            reply.content["smi-fed.model"]["name"] = "St Mary"
        else:
            reply.content = type(reply.content)({
                "arrays": message.content["arrays"], "metrics": MetricRecord({"num-examples": 1}),
            })  # fmt: skip
        return reply

    wrapped = FederatedEvaluation(FedAvg(fraction_evaluate=0.0), classes=5)
    arrays = strategy().initial_arrays
    wrapped.start(grid=InProcessGrid(same, NODES), initial_arrays=arrays, num_rounds=1)
    assert set(reasons(wrapped)) == {"St Mary", "St Mary (node 22)", "St Mary (node 33)"}
