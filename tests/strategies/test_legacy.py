"""`LegacyDataFreeDistillation` with real instructions and results, without processes."""

import numpy as np
import pytest
import torch
from flwr.common import Code, FitRes, Status, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.server import strategy as legacy
from flwr.server.client_manager import SimpleClientManager
from flwr.server.client_proxy import ClientProxy

from smi_fed.checks import SettingError
from smi_fed.inversion import feature_statistics
from smi_fed.strategies import LegacyDataFreeDistillation, TooFewTeachersError, records
from smi_fed.strategies.legacy import initial_parameters
from tests.models import small_spec, small_vit
from tests.strategies.test_data_free import ARCHITECTURES, PIPELINE

STUDENT = small_spec(depth=3)
SAME = [STUDENT] * 3


class Client(ClientProxy):
    """Answers as a NumPyClient would whose `fit` returns `records.pack_fit`."""

    def __init__(self, number, specs, change=None, **sent):
        super().__init__(str(100 + number))
        self.number, self.spec, self.change, self.sent = number, specs[number], change, sent

    def fit(self, ins, timeout=None, group_id=None):
        model = small_vit(seed=self.number, **self.spec.kwargs)
        arrays, examples, metrics = records.pack_fit(
            self.spec, model.state_dict(), name=f"client {self.number}", num_examples=10 * (self.number + 1),
            train_loss=float(self.number), label_counts=[2 * (self.number + 1)] * 5, **self.sent,
        )  # fmt: skip
        if self.change is not None:
            self.change(arrays, metrics)
        return FitRes(Status(Code.OK, ""), ndarrays_to_parameters(arrays), examples, metrics)

    def get_properties(self, *_):
        raise NotImplementedError

    get_parameters = evaluate = reconnect = get_properties


def inner(name, **arguments):
    minima = {"min_fit_clients": 3, "min_available_clients": 3, "fraction_evaluate": 0.0}
    return getattr(legacy, name)(initial_parameters=initial_parameters(STUDENT), **minima, **arguments)


def one_round(wrapped, clients, number=1, parameters=None, failures=()):
    manager = SimpleClientManager()
    for client in clients:
        manager.register(client)
    parameters = parameters or wrapped.initialize_parameters(manager)
    asked = sorted(wrapped.configure_fit(number, parameters, manager), key=lambda pair: pair[0].cid)
    results = [(client, client.fit(ins)) for client, ins in asked if client.cid not in failures]
    return wrapped.aggregate_fit(number, results, [RuntimeError("the disk is full")] * len(failures))


def wrapped(strategy=None, **options):
    return LegacyDataFreeDistillation(strategy or inner("FedAvg"), student=STUDENT, pipeline=PIPELINE, **options)


def clients(specs=ARCHITECTURES, **changes):
    return [Client(number, specs, **changes.get(f"c{number}", {})) for number in range(3)]


def test_three_architectures_become_one_student():
    strategy = wrapped()
    parameters, metrics = one_round(strategy, clients())
    (record,) = strategy.rounds
    assert [teacher.name for teacher in record.teachers] == ["client 0", "client 1", "client 2"]
    assert [verdict.node for verdict in record.verdicts] == [100, 101, 102]
    for array, weight in zip(parameters_to_ndarrays(parameters), strategy.core.weights.values(), strict=True):
        np.testing.assert_allclose(array, weight.numpy(), atol=1e-6)
    assert metrics == {}  # FedAvg of this API aggregates metrics only by a function that its user gives


def nan(arrays, _metrics):
    arrays[0][...] = np.nan


def other_spec(_arrays, metrics):
    metrics[records.SPEC_METRIC] = small_spec("resnet101").to_json()


def one_array_less(arrays, _metrics):
    arrays.pop()


def bad_counts(_arrays, metrics):
    metrics[records.LABEL_COUNTS] = "[[["


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (nan, "not finite"),
        (other_spec, "not on the allow-list"),
        (one_array_less, "arrays, the model has"),
        (bad_counts, "cannot be read"),
    ],
)
def test_a_bad_result_is_refused_and_the_others_count(change, reason):
    strategy = wrapped()
    one_round(strategy, clients(c1={"change": change}))
    reasons = {verdict.node: verdict.reason for verdict in strategy.rounds[0].verdicts}
    assert reason in reasons.pop(101)
    assert reasons == {100: "", 102: ""}


def test_failures_are_told_by_client():
    strategy = wrapped()
    one_round(strategy, clients(), failures={"102"})
    assert {v.node: v.reason for v in strategy.rounds[0].verdicts}[102] == "client failed: the disk is full"
    with pytest.raises(TooFewTeachersError, match="node 101: client failed"):
        one_round(wrapped(), clients(), failures={"101", "102"})


def test_statistics_and_counts_arrive():
    known = feature_statistics(small_vit(**ARCHITECTURES[0].kwargs), [torch.rand(8, 3, 16, 16)])
    strategy = wrapped()
    one_round(strategy, clients(c0={"statistics": known}))
    teacher = strategy.rounds[0].teachers[0].load()
    assert teacher.label_counts == (2,) * 5
    assert all(torch.equal(a, b) for a, b in zip(teacher.statistics.mean, known.mean, strict=True))


def projected_by_hand(strategy, specs, monkeypatch):
    handed = []
    own = strategy.strategy.aggregate_fit

    def listening(number, results, failures):
        handed.append([(parameters_to_ndarrays(r.parameters), r.num_examples) for _, r in results])
        return own(number, results, failures)

    monkeypatch.setattr(strategy.strategy, "aggregate_fit", listening)
    parameters, _ = one_round(strategy, clients(specs))
    return handed[0], parameters_to_ndarrays(parameters)


def test_per_teacher_fedavg_is_the_weighted_mean(monkeypatch):
    handed, result = projected_by_hand(wrapped(projection="per_teacher"), ARCHITECTURES, monkeypatch)
    assert [examples for _, examples in handed] == [10, 20, 30]
    for i, array in enumerate(result):
        expected = sum(arrays[i].astype(np.float64) * examples for arrays, examples in handed) / 60
        np.testing.assert_allclose(array, expected, atol=1e-6)


def test_fedadam_by_hand(monkeypatch):
    strategy = wrapped(inner("FedAdam", eta=0.1, beta_1=0.9, beta_2=0.99, tau=1e-3), projection="per_teacher")
    before = parameters_to_ndarrays(initial_parameters(STUDENT))
    handed, result = projected_by_hand(strategy, ARCHITECTURES, monkeypatch)
    for i, array in enumerate(result):
        mean = sum(arrays[i].astype(np.float64) * examples for arrays, examples in handed) / 60
        first, second = 0.1 * (mean - before[i]), 0.01 * (mean - before[i]) ** 2
        rate = 0.1 * np.sqrt(1 - 0.99**2) / (1 - 0.9**2)  # Flower counts its first round as step 2
        np.testing.assert_allclose(array, before[i] + rate * first / (np.sqrt(second) + 1e-3), atol=1e-5)


@pytest.mark.parametrize("name", ["FedProx", "FedAvgM", "FedMedian", "Krum"])
def test_other_strategies_over_two_rounds(name):
    strategy = wrapped(inner(name, **({"proximal_mu": 0.1} if name == "FedProx" else {})), projection="per_teacher")
    parameters, _ = one_round(strategy, clients())
    again, _ = one_round(strategy, clients(), 2, parameters)
    assert len(strategy.rounds) == 2
    assert all(np.isfinite(array).all() for array in parameters_to_ndarrays(again))


@pytest.mark.parametrize("name", ["FedAvg", "FedAdam"])
def test_refining_goes_on_from_the_refined_student(name, monkeypatch):
    strategy = wrapped(inner(name), refine=True)
    handed, result = projected_by_hand(strategy, SAME, monkeypatch)
    model = small_vit(seed=1, **STUDENT.kwargs)
    for array, weight in zip(handed[1][0], model.state_dict().values(), strict=True):
        assert np.array_equal(array, weight.numpy())
    for array, weight in zip(result, strategy.core.weights.values(), strict=True):
        assert np.array_equal(array, weight.numpy())
    kept = getattr(strategy.strategy, "current_weights", None)
    assert name != "FedAdam" or all(np.array_equal(a, b) for a, b in zip(kept, result, strict=True))


def private(around=None, **arguments):
    return legacy.DifferentialPrivacyClientSideFixedClipping(around or inner("FedAvg"), 0.0, 0.5, 3, **arguments)


def test_client_side_privacy_clips_what_is_projected(monkeypatch):
    before = parameters_to_ndarrays(initial_parameters(STUDENT))
    handed, _ = projected_by_hand(wrapped(private(), projection="per_teacher"), ARCHITECTURES, monkeypatch)
    for arrays, _examples in handed:
        norm = np.sqrt(sum(((a - b) ** 2).sum() for a, b in zip(arrays, before, strict=True)))
        assert norm <= 0.5 + 1e-5


def test_what_cannot_be_is_refused_at_construction():
    with pytest.raises(SettingError, match="no per-client sensitivity"):
        wrapped(private())
    with pytest.raises(SettingError, match="boosted trees"):
        wrapped(legacy.FedXgbBagging())
    with pytest.raises(SettingError, match=r"^known_starts: got \[ModelSpec.*only to DataFreeDistillation"):
        wrapped(known_starts=[STUDENT])
    with pytest.raises(SettingError, match="strategy: got 'object'"):
        wrapped(object())
