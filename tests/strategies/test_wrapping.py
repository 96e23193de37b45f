"""Which strategies are refused and why; privacy's clipping; refinement; metrics."""

import logging
from dataclasses import replace

import numpy as np
import pytest
from flwr.app import Message
from flwr.serverapp import strategy as flower

from smi_fed.checks import SettingError
from smi_fed.strategies import DataFreeDistillation, records
from smi_fed.strategies.wrapping import clipped
from tests.models import small_vit
from tests.reference import aggregation as by_hand
from tests.strategies.test_every_strategy import SAMPLING, STUDENT, client, run

PRIVATE = (
    flower.DifferentialPrivacyServerSideFixedClipping,
    flower.DifferentialPrivacyServerSideAdaptiveClipping,
    flower.DifferentialPrivacyClientSideFixedClipping,
    flower.DifferentialPrivacyClientSideAdaptiveClipping,
)


def private(kind, inner=None, **options):
    norm = {"clipping_norm": 1.0} if any("Fixed" in base.__name__ for base in kind.__mro__) else {}
    arguments = {"noise_multiplier": 0.0, "num_sampled_clients": 3, **norm, **options}
    return kind(inner or flower.FedAvg(), **arguments)


def wrap(inner, **options):
    return DataFreeDistillation(inner, **{"student": STUDENT, **options})


@pytest.mark.parametrize("kind", [flower.FedXgbBagging, flower.FedXgbCyclic])
def test_boosted_trees_are_refused(kind):
    reason = f"strategy: got '{kind.__name__}'.*boosted trees have no student"
    for inner in (kind(), private(PRIVATE[0], kind())):
        with pytest.raises(SettingError, match=reason):
            wrap(inner, projection="per_teacher")


@pytest.mark.parametrize("kind", PRIVATE)
def test_privacy_needs_a_student_of_each_teacher(kind):
    reason = f"inside {kind.__name__}: one student of all clients' images has no per-client sensitivity"
    with pytest.raises(SettingError, match=f"projection: got 'ensemble', allowed: per_teacher {reason}"):
        wrap(private(kind))
    with pytest.raises(SettingError, match=f"refine: got True, allowed: false {reason}"):
        wrap(private(kind), projection="per_teacher", refine=True)
    with pytest.raises(SettingError, match="inside Differential.* no per-client sensitivity"):  # however deep it is
        wrap(private(PRIVATE[0], private(kind)))
    assert wrap(private(kind), projection="per_teacher").strategy.noise_multiplier == 0


def test_distillation_wraps_once():
    with pytest.raises(SettingError, match="strategy: got 'DataFreeDistillation'.*data-free distillation wraps once"):
        wrap(wrap(flower.FedAvg()))


@pytest.mark.parametrize("projection", ["each", "", None, 1])
def test_an_unknown_projection_is_refused(projection):
    with pytest.raises(SettingError, match="projection: got .*ensemble.*per_teacher"):
        wrap(flower.FedAvg(), projection=projection)


def test_start_is_flowers_own():
    assert DataFreeDistillation.start is flower.Strategy.start


SENT = [np.zeros((2, 2), np.float32), np.ones(3, np.float32)]
MOVED = [np.full((2, 2), 3.0, np.float32), np.ones(3, np.float32)]  # by a norm of 6


@pytest.mark.parametrize("kind", PRIVATE)
@pytest.mark.parametrize(("norm", "cut"), [(1.5, 1), (6.0, 0), (60.0, 0)])
def test_a_projected_update_is_clipped_where_the_client_would_have(kind, norm, cut):
    name = "clipping_norm" if "Fixed" in kind.__name__ else "initial_clipping_norm"
    strategy = private(kind, **{name: norm})
    moved = [array.copy() for array in MOVED]
    arrays, metrics = clipped(moved, SENT, strategy)
    client_side, adaptive = "ClientSide" in kind.__name__, "Adaptive" in kind.__name__
    scale = min(1, norm / 6) if client_side else 1
    np.testing.assert_allclose(arrays[0], 3 * scale, rtol=1e-6)
    np.testing.assert_allclose(arrays[1], 1)
    assert metrics == ({"norm_bit": cut} if client_side and adaptive else {})
    assert all(np.array_equal(a, b) for a, b in zip(moved, MOVED, strict=True))
    assert [array.dtype for array in arrays] == [np.float32, np.float32]
    assert float(SENT[0].sum()) == 0


@pytest.mark.parametrize("kind", PRIVATE)
def test_a_subclass_clips_as_its_base_does(kind):
    own = type("Own", (kind,), {})
    name = "clipping_norm" if "Fixed" in kind.__name__ else "initial_clipping_norm"
    found, expected = (clipped(MOVED, SENT, private(each, **{name: 1.5})) for each in (own, kind))
    np.testing.assert_array_equal(found[0][0], expected[0][0])
    assert found[1] == expected[1]


@pytest.mark.parametrize("kind", PRIVATE)
def test_an_update_of_zero_is_left_alone(kind):
    arrays, metrics = clipped([array.copy() for array in SENT], SENT, private(kind))
    assert all(np.array_equal(a, b) for a, b in zip(arrays, SENT, strict=True))
    assert metrics == ({"norm_bit": 0} if "ClientSideAdaptive" in kind.__name__ else {})


def test_without_privacy_and_below_other_layers_clipping_is_as_it_should_be():
    assert clipped(MOVED, SENT, flower.FedAvg()) == (MOVED, {})
    outer = private(PRIVATE[0], private(flower.DifferentialPrivacyClientSideFixedClipping, clipping_norm=1.5))
    np.testing.assert_allclose(clipped(MOVED, SENT, outer)[0][0], 0.75, rtol=1e-6)


def same_as_student(message, context, other=STUDENT):
    """A client with the student's architecture; client 1 has the `other`."""
    number = context.node_config["partition-id"]
    spec = other if number == 1 else STUDENT
    content = records.pack_reply(
        spec, small_vit(seed=number, **spec.kwargs).state_dict(), name=f"client {number}",
        num_examples=10 * (number + 1), train_loss=1.0, label_counts=[2 * (number + 1)] * 5,
    )  # fmt: skip
    return Message(content, reply_to=message)


THREE = {1: {"partition-id": 0}, 2: {"partition-id": 1}, 3: {"partition-id": 2}}


def flat_model(number):
    weights = small_vit(seed=number, **STUDENT.kwargs).state_dict().values()
    return np.concatenate([weight.numpy().astype(np.float64).ravel() for weight in weights])


@pytest.mark.parametrize("projection", ["ensemble", "per_teacher"])
def test_refinement_distills_into_the_mean_of_the_clients_own_arrays(projection):
    inner = flower.FedAvg(**SAMPLING)
    wrapped, rounds = run(inner, ask=same_as_student, places=THREE, refine=True, projection=projection)
    own = np.stack([flat_model(number) for number in range(3)])
    mean = (10 * own[0] + 20 * own[1] + 30 * own[2]) / 60
    for now, record in zip(rounds, wrapped.rounds, strict=True):
        assert record.refined
        np.testing.assert_array_equal(now.replies, own)
        np.testing.assert_allclose(now.result, mean, rtol=1e-5, atol=1e-6)
        moved = np.abs(now.returned - now.result)
        assert moved.max() > 1e-4
        assert moved.max() < 0.1  # two steps from the mean, not from anywhere else
        assert record.distillation.steps == 2


def test_momentum_goes_on_from_the_refined_student():
    momentum = by_hand.Momentum(0.9)
    inner = flower.FedAvgM(server_momentum=0.9, **SAMPLING)
    _, rounds = run(inner, ask=same_as_student, places=THREE, refine=True, num_rounds=3)
    for now in rounds:
        np.testing.assert_allclose(now.result, momentum(now.sent, now.replies, now.examples), rtol=1e-4, atol=2e-6)


OTHERS = {
    "depth": replace(STUDENT, kwargs={**STUDENT.kwargs, "depth": 2}),
    "heads": replace(STUDENT, kwargs={**STUDENT.kwargs, "num_heads": 4}),
    "normalisation": replace(STUDENT, mean=(0.1, 0.2, 0.3)),
}


@pytest.mark.parametrize("other", OTHERS)
def test_replies_of_another_architecture_are_projected_with_a_warning(other, caplog):
    """Weights of other heads or for other normalisation have the same shapes and mean something else."""
    with caplog.at_level(logging.WARNING, "smi_fed"):
        wrapped, (now,) = run(
            flower.FedAvg(**SAMPLING), ask=lambda message, context: same_as_student(message, context, OTHERS[other]),
            places=THREE, refine=True, num_rounds=1, projection="per_teacher",
        )  # fmt: skip
    assert not wrapped.rounds[0].refined
    assert "round 1: replies of other architectures than the student's are projected" in caplog.text
    assert not np.array_equal(now.replies[0], flat_model(0))
    np.testing.assert_array_equal(now.returned, now.result)
    np.testing.assert_allclose(now.result, by_hand.weighted_mean(now.replies, now.examples), rtol=1e-4, atol=2e-6)


def test_metrics_that_all_clients_send_are_aggregated_and_no_others_stop_the_run():
    def ask(message, context):
        reply, number = client(message, context), context.node_config["partition-id"]
        more = {"accuracy": 0.5 + 0.1 * number, "seconds": number, "broken": float("nan") if number == 1 else 1.0}
        if number == 2:
            more |= {"only mine": 7.0, "infinite": float("inf"), "many": [1.0, 2.0]}
        for key, value in more.items():
            reply.content[records.METRICS][key] = value
        return reply

    wrapped, (now,) = run(flower.FedAvg(**SAMPLING), ask=ask, places=THREE, num_rounds=1)
    assert [set(each) for each in now.metrics] == [{"num-examples", "train_loss", "accuracy", "seconds"}] * 3
    result = wrapped.rounds[0].verdicts
    assert [v.admitted for v in result] == [True] * 3
    assert [each["seconds"] for each in now.metrics] == [0, 1, 2]
    assert now.metrics[2]["accuracy"] == pytest.approx(0.7)
    assert now.aggregated["accuracy"] == pytest.approx((10 * 0.5 + 20 * 0.6 + 30 * 0.7) / 60)
    assert now.aggregated["seconds"] == pytest.approx((20 * 1 + 30 * 2) / 60)
    assert set(now.aggregated) == {"train_loss", "accuracy", "seconds"}
