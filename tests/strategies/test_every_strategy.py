"""Every built-in strategy inside, two rounds over real messages, beside formulas that know nothing of Flower."""

from dataclasses import dataclass, field, replace
from functools import cache

import numpy as np
import pytest
from flwr.app import Array, Message, MetricRecord
from flwr.serverapp import strategy as flower

from simulations.local_grid import InProcessGrid
from smi_fed.distillation import DistillationConfig
from smi_fed.inversion import InversionConfig
from smi_fed.pipeline import PipelineConfig
from smi_fed.strategies import DataFreeDistillation, records
from tests.models import small_spec, small_vit
from tests.reference import aggregation as by_hand

ARCHITECTURES = [small_spec(depth=1), small_spec(depth=1, embed_dim=36, num_heads=3), small_spec(depth=1, patch_size=8)]
STUDENT = small_spec(depth=1, embed_dim=16)
FAILS, SENDS_NAN = "fails", "sends NaN"
PIPELINE = PipelineConfig(
    images_per_teacher=2,
    inversion=InversionConfig.paper(iterations=2, schedule="1:0.5"),
    distillation=DistillationConfig(steps=2, batch_size=4),
)
SAMPLING = {"fraction_evaluate": 0.0}


@cache
def model(number):
    return small_vit(seed=number, **ARCHITECTURES[number % 3].kwargs)


def client(message, context):
    number, kind = context.node_config["partition-id"], context.node_config.get("kind")
    if kind == FAILS:
        raise RuntimeError("the disk is full")
    content = records.pack_reply(
        model(number).spec, model(number).state_dict(), name=f"client {number}", num_examples=10 * (number + 1),
        train_loss=0.5 + number, label_counts=[2 * (number + 1)] * 5,
    )  # fmt: skip
    if kind == SENDS_NAN:
        content[records.ARRAYS]["backbone.head.bias"] = Array(np.full(5, np.nan, np.float32))
    return Message(content, reply_to=message)


def nodes(good):
    """`good` clients of three architectures in turn, one that fails and one whose weights are not finite."""
    bad = {100: {"partition-id": good, "kind": FAILS}, 101: {"partition-id": good + 1, "kind": SENDS_NAN}}
    return {1 + number: {"partition-id": number} for number in range(good)} | bad


@dataclass
class Round:
    """What one round handed to the inner strategy and what came out, as flat float64 vectors."""

    sent: np.ndarray
    names: list = field(default_factory=list)
    projected: np.ndarray | None = None
    replies: np.ndarray | None = None
    examples: np.ndarray | None = None
    losses: np.ndarray | None = None
    metrics: list = field(default_factory=list)
    aggregated: dict = field(default_factory=dict)
    result: np.ndarray | None = None
    returned: np.ndarray | None = None


def flat(arrays):
    return np.concatenate([np.asarray(a.numpy(), np.float64).ravel() for a in arrays.values()])


def watched(strategy, rounds):
    """The same strategy; copies of what it is handed and returns go to `rounds` before anyone can change them."""
    configure, aggregate = strategy.configure_train, strategy.aggregate_train

    def configure_train(server_round, arrays, config, grid):
        rounds.append(Round(flat(arrays)))
        return configure(server_round, arrays, config, grid)

    def aggregate_train(server_round, replies):
        now, replies = rounds[-1], list(replies)
        now.replies = np.stack([flat(reply.content[records.ARRAYS]) for reply in replies])
        now.metrics = [dict(reply.content[records.METRICS]) for reply in replies]
        now.examples = np.array([float(each[records.NUM_EXAMPLES]) for each in now.metrics])
        now.losses = np.array([each[records.TRAIN_LOSS] for each in now.metrics])
        arrays, metrics = aggregate(server_round, replies)
        now.result, now.aggregated = flat(arrays), dict(metrics)
        return arrays, metrics

    strategy.configure_train, strategy.aggregate_train = configure_train, aggregate_train
    return strategy


def run(inner, good=5, num_rounds=2, ask=client, places=None, **options):
    """(wrapper, what each round did) of a whole run by Flower's own `start`."""
    rounds = []
    wrapped = DataFreeDistillation(watched(inner, rounds), **{"student": STUDENT, "pipeline": PIPELINE, **options})
    distill = wrapped.core.distill

    def distill_and_tell():
        record = distill()
        rounds[-1].names = [teacher.name for teacher in record.teachers]
        rounds[-1].projected = np.stack([flat(each) for each in record.projections])
        return record

    wrapped.core.distill = distill_and_tell

    def evaluate(server_round, arrays):
        if server_round:
            rounds[server_round - 1].returned = flat(arrays)
        return MetricRecord({"round": server_round})

    result = wrapped.start(
        grid=InProcessGrid(ask, places or nodes(good)), initial_arrays=wrapped.initial_arrays, num_rounds=num_rounds,
        evaluate_fn=evaluate,
    )  # fmt: skip
    np.testing.assert_array_equal(flat(result.arrays), rounds[-1].returned)
    return wrapped, rounds


def averages(*_):
    return lambda now: by_hand.weighted_mean(now.replies, now.examples)


def steps(stateful):
    return lambda now: stateful(now.sent, now.replies, now.examples)


ADAPTIVE = {"eta": 0.05, "tau": 1e-3}
BETAS = {"beta_1": 0.9, "beta_2": 0.99}
# name: (strategy, formula of one round; stateful where the strategy is), each made anew for every test
CASES = {
    "FedAvg": (lambda: flower.FedAvg(**SAMPLING), averages),
    "FedProx": (lambda: flower.FedProx(proximal_mu=0.3, **SAMPLING), averages),
    "FedAvgM": (lambda: flower.FedAvgM(server_momentum=0.9, **SAMPLING), lambda: steps(by_hand.Momentum(0.9))),
    "FedAdam": (
        lambda: flower.FedAdam(**ADAPTIVE, **BETAS, **SAMPLING),
        lambda: steps(by_hand.Adaptive("adam", **ADAPTIVE, **BETAS)),
    ),
    "FedYogi": (
        lambda: flower.FedYogi(**ADAPTIVE, **BETAS, **SAMPLING),
        lambda: steps(by_hand.Adaptive("yogi", **ADAPTIVE, **BETAS)),
    ),
    "FedAdagrad": (
        lambda: flower.FedAdagrad(**ADAPTIVE, **SAMPLING), lambda: steps(by_hand.Adaptive("adagrad", **ADAPTIVE)),
    ),
    "FedMedian": (lambda: flower.FedMedian(**SAMPLING), lambda: lambda now: by_hand.median(now.replies)),
    "FedTrimmedAvg": (
        lambda: flower.FedTrimmedAvg(beta=0.2, **SAMPLING), lambda: lambda now: by_hand.trimmed_mean(now.replies, 0.2),
    ),
    "Krum": (
        lambda: flower.Krum(num_malicious_nodes=1, **SAMPLING),
        lambda: lambda now: by_hand.multi_krum(now.replies, now.examples, 1, 1),
    ),
    "MultiKrum": (
        lambda: flower.MultiKrum(num_malicious_nodes=1, num_nodes_to_select=3, **SAMPLING),
        lambda: lambda now: by_hand.multi_krum(now.replies, now.examples, 1, 3),
    ),
    "Bulyan": (
        lambda: flower.Bulyan(num_malicious_nodes=1, **SAMPLING), lambda: lambda now: by_hand.bulyan(now.replies, 1),
    ),
    "QFedAvg": (
        lambda: flower.QFedAvg(client_learning_rate=0.1, q=0.2, **SAMPLING),
        lambda: lambda now: by_hand.q_fair(now.sent, now.replies, now.losses, 0.2, 0.1),
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "projection"),
    # an ensemble's replies are all equal, and so is what most strategies make of them
    [*((name, "per_teacher") for name in CASES), *((name, "ensemble") for name in ("FedAvg", "FedAdam", "Bulyan"))],
)
def test_two_rounds_are_what_the_strategys_formula_says(name, projection):
    make, formula = CASES[name]
    good = 7 if name == "Bulyan" else 5  # it asks for 4 f + 3 replies
    wrapped, rounds = run(make(), good, projection=projection)
    expected = formula()
    assert len(rounds) == 2
    for now, record in zip(rounds, wrapped.rounds, strict=True):
        assert now.names == [f"client {number}" for number in range(good)]
        assert now.examples.tolist() == [10 * (number + 1) for number in range(good)]
        assert now.losses.tolist() == [0.5 + number for number in range(good)]
        refused = {v.node: v.reason for v in record.verdicts if not v.admitted}
        assert refused == {
            100: "client failed: RuntimeError: the disk is full (code 2)", 101: "backbone.head.bias is not finite",
        }  # fmt: skip
        np.testing.assert_array_equal(now.replies, now.projected)
        assert np.abs(now.projected - now.sent).max(1).min() > 1e-4
        np.testing.assert_allclose(now.result, expected(now), rtol=1e-4, atol=2e-6)
        np.testing.assert_array_equal(now.returned, now.result.astype(np.float32))  # in the student's precision
        assert np.isfinite(now.result).all()
    np.testing.assert_array_equal(rounds[1].sent, rounds[0].returned)
    assert np.abs(rounds[1].sent - rounds[0].sent).max() > 1e-4
    student = flat({key: value.cpu() for key, value in wrapped.student.state_dict().items()})
    np.testing.assert_allclose(student, rounds[1].returned, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("q", [0.0, 1.0])
def test_q_fedavg_follows_the_clients_own_losses(q):
    _, rounds = run(flower.QFedAvg(client_learning_rate=0.1, q=q, **SAMPLING), 3, projection="per_teacher")
    for now in rounds:
        assert now.losses.tolist() == [0.5, 1.5, 2.5]
        expected = by_hand.q_fair(now.sent, now.replies, now.losses, q, 0.1)
        np.testing.assert_allclose(now.result, expected, rtol=1e-4, atol=2e-6)
    if q == 0:  # then it is the plain mean
        np.testing.assert_allclose(rounds[0].result, rounds[0].replies.mean(0), rtol=1e-4, atol=2e-6)


def test_what_fedprox_tells_clients_reaches_them():
    received = []

    def ask(message, context):
        received.append(message.content["config"]["proximal-mu"])
        return client(message, context)

    run(flower.FedProx(proximal_mu=0.3, **SAMPLING), 3, num_rounds=1, ask=ask)
    assert received == [0.3] * 5


def test_an_ensemble_hands_the_same_student_on_for_everyone_and_each_teacher_a_student_of_its_own():
    _, (ensemble,) = run(flower.FedAvg(**SAMPLING), 3, num_rounds=1)
    _, (alone,) = run(flower.FedAvg(**SAMPLING), 3, num_rounds=1, projection="per_teacher")
    np.testing.assert_array_equal(ensemble.sent, alone.sent)
    assert (ensemble.replies == ensemble.replies[0]).all()
    for one in range(3):
        for other in range(one):
            assert np.abs(alone.replies[one] - alone.replies[other]).max() > 1e-4


@pytest.mark.parametrize("left_out", [0, 1, 2])
def test_a_teachers_own_student_does_not_depend_on_who_else_is_there(left_out):
    _, (everyone,) = run(flower.FedAvg(**SAMPLING), 3, num_rounds=1, projection="per_teacher")
    fewer = {node: place for node, place in nodes(3).items() if place["partition-id"] != left_out}
    _, (rest,) = run(flower.FedAvg(**SAMPLING), num_rounds=1, projection="per_teacher", places=fewer)
    assert rest.names == [f"client {number}" for number in range(3) if number != left_out]
    for name, reply in zip(rest.names, rest.replies, strict=True):
        np.testing.assert_array_equal(reply, everyone.replies[everyone.names.index(name)])


def test_a_teachers_own_student_does_not_depend_on_others_claims_even_where_its_own_is_cut():
    claims = [([1, 0, 0, 0, 0], "a"), ([1, 1, 1, 0, 0], "b"), ([9, 9, 9, 9, 64], "c")]  # 100 are more than 10 medians

    def ask(message, context):
        number = context.node_config["partition-id"]
        counts, name = claims[number]
        content = records.pack_reply(
            model(number).spec, model(number).state_dict(), name=name, num_examples=sum(counts), train_loss=1.0,
            label_counts=counts,
        )  # fmt: skip
        return Message(content, reply_to=message)

    replies = []
    for places in ({1: 0, 2: 1, 3: 2}, {1: 0, 3: 2}):
        _, (now,) = run(
            flower.FedAvg(**SAMPLING), num_rounds=1, projection="per_teacher", ask=ask,
            places={node: {"partition-id": number} for node, number in places.items()},
            pipeline=replace(PIPELINE, images_per_teacher=16),
        )  # fmt: skip
        replies.append(now.replies[now.names.index("c")])
    np.testing.assert_array_equal(*replies)


@pytest.mark.parametrize("projection", ["ensemble", "per_teacher"])
def test_a_round_that_the_strategy_skips_leaves_the_global_model_as_it_was(projection):
    inner = flower.Bulyan(num_malicious_nodes=1, **SAMPLING)  # needs 7 replies
    wrapped = DataFreeDistillation(inner, student=STUDENT, pipeline=PIPELINE, projection=projection)
    before = wrapped.initial_arrays
    wrapped.start(grid=InProcessGrid(client, nodes(3)), initial_arrays=before, num_rounds=1)
    assert len(wrapped.rounds) == 1
    np.testing.assert_array_equal(flat(wrapped.initial_arrays), flat(before))
