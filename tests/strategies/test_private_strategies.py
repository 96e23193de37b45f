"""Differential privacy inside: what each projected update is clipped to. Noise is 0 where numbers have to be exact."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from flwr.serverapp import strategy as flower

from smi_fed.pool import PoolConfig
from smi_fed.strategies import records
from tests.reference import aggregation as by_hand
from tests.strategies.test_every_strategy import PIPELINE, SAMPLING, client, nodes, run

CLIENTS = 3
SAMPLED = CLIENTS + 2  # with the one that fails and the one that is refused
QUANTILE, RATE = 0.4, 0.3
EACH = {"projection": "per_teacher", "seed": 2}  # a seed whose updates differ in norm


@cache
def first_norms():
    """Norms of the first round's updates, which depend neither on the strategy nor on its clipping."""
    _, (now,) = run(flower.FedAvg(**SAMPLING), CLIENTS, num_rounds=1, **EACH)
    return np.sort(np.linalg.norm(now.projected - now.sent, axis=1))


def norm_that_cuts(what):
    norms = first_norms()
    assert norms[0] < 0.99 * norms[-1]
    return {"all": norms[0] / 3, "some": (norms[0] + norms[-1]) / 2, "none": norms[-1] * 3}[what]


def fixed(side, norm, noise=0.0, inner=flower.FedAvg):
    kind = getattr(flower, f"DifferentialPrivacy{side}SideFixedClipping")
    return kind(inner(**SAMPLING), noise_multiplier=noise, clipping_norm=norm, num_sampled_clients=SAMPLED)


def adaptive(side, norm):
    kind = getattr(flower, f"DifferentialPrivacy{side}SideAdaptiveClipping")
    return kind(
        flower.FedAvg(**SAMPLING), noise_multiplier=0.0, num_sampled_clients=SAMPLED, initial_clipping_norm=norm,
        target_clipped_quantile=QUANTILE, clip_norm_lr=RATE, clipped_count_stddev=0.0,
    )  # fmt: skip


def check_round(now, norm, side):
    """Whether each update was cut; what came out is the mean of the cut updates."""
    assert now.examples.tolist() == [1] * CLIENTS  # the noise is for one of so many, not for what a client claims
    correct, cut = by_hand.clip(now.sent, now.projected, norm)
    if side == "Client":  # clipped before the strategy sees it: the strategy itself never would
        np.testing.assert_allclose(now.replies, correct, rtol=1e-5, atol=1e-6)
        assert (np.linalg.norm(now.replies - now.sent, axis=1) <= norm * (1 + 1e-5)).all()
    else:
        np.testing.assert_array_equal(now.replies, now.projected)
    expected = by_hand.weighted_mean(correct, now.examples)
    np.testing.assert_allclose(now.result, expected, rtol=1e-4, atol=2e-6)
    assert np.linalg.norm(now.result - now.sent) <= norm * (1 + 1e-5)
    np.testing.assert_array_equal(now.returned, now.result)
    return cut


@pytest.mark.parametrize("what", ["all", "some", "none"])
@pytest.mark.parametrize("side", ["Server", "Client"])
def test_fixed_clipping_is_of_each_projected_update(side, what):
    norm = norm_that_cuts(what)
    wrapped, rounds = run(fixed(side, norm), CLIENTS, **EACH)
    assert len(rounds) == 2
    cuts = [check_round(now, norm, side).sum() for now in rounds]
    assert (cuts[0] == CLIENTS, cuts[0] == 0) == (what == "all", what == "none")
    assert [sum(not v.admitted for v in record.verdicts) for record in wrapped.rounds] == [2, 2]
    assert all(np.abs(now.projected - now.projected[0]).max() > 1e-4 for now in rounds)
    np.testing.assert_array_equal(rounds[1].sent, rounds[0].returned)


@pytest.mark.parametrize("what", ["all", "some", "none"])
@pytest.mark.parametrize("side", ["Server", "Client"])
def test_adaptive_clipping_moves_its_norm_by_the_share_that_was_cut(side, what):
    norm = norm_that_cuts(what)
    strategy = adaptive(side, norm)  # no noise on the count either: the next norm is exact
    _, rounds = run(strategy, CLIENTS, **EACH)
    assert len(rounds) == 2
    for now in rounds:
        cut = check_round(now, norm, side)
        if side == "Client":
            assert [each["norm_bit"] for each in now.metrics] == cut.astype(int).tolist()
        norm = by_hand.adapt_norm(norm, cut, QUANTILE, RATE)
    assert strategy.clipping_norm == pytest.approx(norm, rel=1e-9)


@pytest.mark.parametrize("side", ["Server", "Client"])
def test_noise_is_added_once_and_as_large_as_flower_measures_it(side):
    norm, noise = norm_that_cuts("all"), 50.0
    np.random.seed(0)  # noqa: NPY002  (Flower draws from the global state)
    _, (now,) = run(fixed(side, norm, noise), CLIENTS, num_rounds=1, **EACH)
    clean = by_hand.weighted_mean(by_hand.clip(now.sent, now.projected, norm)[0], now.examples)
    added = now.returned - clean
    assert float(added.std()) == pytest.approx(noise * norm / SAMPLED, rel=0.05)
    assert abs(float(added.mean())) < 5 * float(added.std()) / np.sqrt(len(added))


@pytest.mark.parametrize("side", ["Server", "Client"])
def test_one_client_moves_the_clipped_mean_by_no_more_than_its_share(side):
    norm = norm_that_cuts("all")
    _, (everyone,) = run(fixed(side, norm), CLIENTS, num_rounds=1, **EACH)
    fewer = {node: place for node, place in nodes(CLIENTS).items() if place["partition-id"] != 2}
    _, (rest,) = run(fixed(side, norm), num_rounds=1, **EACH, places=fewer)
    share = everyone.examples[2] / everyone.examples.sum()
    assert np.linalg.norm(everyone.returned - rest.returned) <= 2 * norm * share * (1 + 1e-4)


@pytest.mark.parametrize("side", ["Server", "Client"])
def test_clipping_goes_with_another_strategy_inside(side):
    norm, momentum = norm_that_cuts("all"), by_hand.Momentum(0.9)
    inner = fixed(side, norm, inner=lambda **options: flower.FedAvgM(server_momentum=0.9, **options))
    _, rounds = run(inner, CLIENTS, **EACH)
    for now in rounds:
        expected = momentum(now.sent, by_hand.clip(now.sent, now.projected, norm)[0], now.examples)
        np.testing.assert_allclose(now.result, expected, rtol=1e-4, atol=2e-6)


class Stays(flower.FedAvg):
    """Forgets what it aggregated: every round starts from the same student."""

    def configure_train(self, server_round, arrays, config, grid):
        self.arrays = arrays
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(self, server_round, replies):
        return self.arrays, super().aggregate_train(server_round, replies)[1]


@pytest.mark.parametrize("third", ["third", "victim"])
@pytest.mark.parametrize("pool", [PoolConfig(images=100), PoolConfig(warm=True)])
def test_a_client_does_not_move_anothers_update_even_if_it_takes_its_name(pool, third):
    def ask(message, context):
        reply = client(message, context)
        reply.content[records.MODEL][records.NAME] = ["victim", "other", third][context.node_config["partition-id"]]
        return reply

    found = []
    for places in ({1: 0, 2: 1, 3: 2}, {1: 0, 2: 1}):
        inner = flower.DifferentialPrivacyServerSideFixedClipping(Stays(**SAMPLING), 0.0, 1.0, len(places))
        _, rounds = run(
            inner, ask=ask, projection="per_teacher", pool=pool, pipeline=replace(PIPELINE, images_per_teacher=8),
            places={node: {"partition-id": number} for node, number in places.items()},
        )  # fmt: skip
        found.append(rounds[1])
    everyone, alone = found
    np.testing.assert_array_equal(everyone.sent, alone.sent)
    (victim,) = [row for row, name in zip(alone.projected, alone.names, strict=True) if name.startswith("victim")]
    assert any(np.array_equal(victim, row) for row in everyone.projected)
