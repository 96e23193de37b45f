"""A run that was killed goes on to the same student; here killed by exceptions, in tests/e2e by SIGKILL."""

import json
from functools import cache
from shutil import copytree

import numpy as np
import pytest
import torch
from flwr.serverapp.strategy import FedAdam, FedAvg, FedAvgM

from simulations.local_grid import InProcessGrid
from smi_fed.executors import job
from smi_fed.files import FileFormatError
from smi_fed.pool import PoolConfig
from smi_fed.strategies import DataFreeDistillation, core
from smi_fed.strategies.memory import recall, remember
from tests.models import small_spec
from tests.strategies.test_data_free import NODES, PIPELINE, bad_client, client

ROUNDS = 3


class KilledError(BaseException):
    pass


def inner(name):
    minima = {"fraction_evaluate": 0.0, "min_train_nodes": 2, "min_available_nodes": 2}
    return {"FedAvg": FedAvg, "FedAdam": FedAdam, "FedAvgM": FedAvgM}[name](
        **minima, **({"server_momentum": 0.9} if name == "FedAvgM" else {})
    )


def wrapped(directory, name="FedAvg", **options):
    options = {"student": small_spec(depth=3), "pipeline": PIPELINE, "pool": PoolConfig(images=8, warm=True), **options}
    return DataFreeDistillation(inner(name), state_directory=directory, **options)


def run(directory, client=client, nodes=NODES, name="FedAvg", evaluate_fn=None, **options):
    strategy = wrapped(directory, name, **options)
    result = strategy.start(
        grid=InProcessGrid(client, nodes), initial_arrays=strategy.initial_arrays,
        num_rounds=strategy.remaining_rounds(ROUNDS), evaluate_fn=evaluate_fn,
    )  # fmt: skip
    return strategy, result.arrays.to_torch_state_dict()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(directory, strategy, final weights) of a run that nobody disturbed, once of each kind."""

    @cache
    def undisturbed(name, projection):
        directory = tmp_path_factory.mktemp(name) / "run"
        return (directory, *run(directory, name=name, projection=projection))

    return undisturbed


def after(calls, function):
    """`function`, which kills its caller when it is called for the `calls`-th time."""

    def counting(*args, **kwargs):
        nonlocal calls
        calls -= 1
        if calls == 0:
            raise KilledError
        return function(*args, **kwargs)

    return counting


STAGES = {
    "waiting": lambda patch: None,
    "first inversion": lambda patch: patch.setattr(job, "invert_teacher", after(1, job.invert_teacher)),
    "inversion of round 2": lambda patch: patch.setattr(job, "invert_teacher", after(5, job.invert_teacher)),
    "distilling": lambda patch: patch.setattr(core, "distill_student", after(2, core.distill_student)),
    "aggregating": lambda patch: patch.setattr(FedAvg, "aggregate_train", after(2, FedAvg.aggregate_train)),
    "closing": lambda patch: patch.setattr(core.RunState, "close", after(2, core.RunState.close)),
}


@pytest.mark.parametrize(
    ("stage", "projection"), [*((stage, "ensemble") for stage in STAGES), ("inversion of round 2", "per_teacher")]
)
def test_killed_in_any_stage(tmp_path, monkeypatch, whole, stage, projection):
    _, undisturbed, expected = whole("FedAvg", projection)
    with monkeypatch.context() as patch:
        STAGES[stage](patch)
        asked = after(5, client) if stage == "waiting" else client
        with pytest.raises(KilledError):
            run(tmp_path / "killed", asked, projection=projection)
    # Other node ids, as after a restart of a simulation; per teacher they tell whose earlier images are whose.
    other = projection == "ensemble"
    nodes = {90 - node if other else node: config for node, config in NODES.items()}
    again, found = run(tmp_path / "killed", nodes=nodes, projection=projection)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert [record.round for record in again.rounds] == [1, 2, 3]
    for one, other in zip(again.rounds, undisturbed.rounds, strict=True):
        assert one.reused == other.reused
        traffic = [[(verdict.sent, verdict.received) for verdict in record.verdicts] for record in (one, other)]
        assert traffic[0] == traffic[1]
        assert min(min(pair) for pair in traffic[0]) > 0
        assert all(torch.equal(a.images, b.images) for a, b in zip(one.images, other.images, strict=True))


@pytest.mark.parametrize("name", ["FedAdam", "FedAvgM"])
def test_the_inner_strategys_memory_comes_back(tmp_path, whole, name):
    *_, expected = whole(name, "ensemble")

    def killing(number, _arrays):
        if number == 2:
            raise KilledError

    with pytest.raises(KilledError):
        run(tmp_path / "killed", name=name, evaluate_fn=killing)
    again, found = run(tmp_path / "killed", name=name)
    assert again.done_before == 2
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_who_replied_before_the_crash_is_not_asked_again(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(job, "invert_teacher", after(2, job.invert_teacher))
        with pytest.raises(KilledError):
            run(tmp_path, bad_client)
    asked = []

    def listening(message, context):
        asked.append(message.content["config"]["server-round"])
        return bad_client(message, context)

    again, _ = run(tmp_path, listening)
    assert sorted(set(asked)) == [2, 3]
    reasons = {verdict.node: verdict.reason for verdict in again.rounds[0].verdicts}
    assert "not finite" in reasons[22]


def test_a_finished_run_has_nothing_left_to_do(whole):
    directory, _, expected = whole("FedAvg", "ensemble")
    again = wrapped(directory)
    assert again.remaining_rounds(ROUNDS) == 0
    found = again.initial_arrays.to_torch_state_dict()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    last = again.rounds[-1]
    assert [teacher.name for teacher in last.teachers] == ["client 0", "client 1", "client 2"]
    assert last.distillation.losses
    assert (
        [tuple(entry.classes) for entry in again.core.pool.entries]
        == [tuple(range(5))] * len(again.core.pool.entries)
        != []
    )


@pytest.mark.parametrize(
    ("options", "differs"),
    [({"seed": 1}, "seed"), ({"projection": "per_teacher"}, "projection"), ({"student": small_spec()}, "student")],
)
def test_the_state_of_another_run_is_refused(whole, options, differs):
    directory, *_ = whole("FedAvg", "ensemble")
    with pytest.raises(FileFormatError, match=f"another, unfinished run, which differs in {differs};") as error:
        wrapped(directory, **options)
    assert "rounds.json" in str(error.value)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "truncated"),
        ("{}", "not what it should be"),
        (json.dumps({"identity": {}, "rounds": [], "version": 9}), "9"),
    ],
)
def test_a_broken_state_is_refused(tmp_path, content, says):
    wrapped(tmp_path)
    (tmp_path / "rounds.json").write_text(content)
    with pytest.raises(FileFormatError, match=says):
        wrapped(tmp_path)


@pytest.mark.parametrize("content", ["", "[[", "[1]", '[{"node": "x"}]', "[" * 100_000])
def test_broken_verdicts_are_refused(whole, tmp_path, content):
    copytree(whole("FedAvg", "ensemble")[0], tmp_path, dirs_exist_ok=True)
    (tmp_path / "round3-verdicts.json").write_text(content)
    with pytest.raises(FileFormatError, match=r"round3-verdicts\.json: truncated or not what it should be"):
        wrapped(tmp_path)


def test_a_broken_global_model_is_refused(whole, tmp_path):
    copytree(whole("FedAvg", "ensemble")[0], tmp_path, dirs_exist_ok=True)
    path = tmp_path / "global3.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(FileFormatError, match=r"global3\.safetensors"):
        wrapped(tmp_path)


def test_what_a_strategy_remembers():
    adam = FedAdam()
    adam.m_t, adam.v_t = {"b": np.ones(2), "a": np.zeros(())}, None
    adam.strategy = FedAvg(min_train_nodes=5)
    adam.strategy.momentum_vector = [np.ones(1), np.zeros(2)]
    arrays, numbers = remember(adam)
    fresh = FedAdam()
    fresh.strategy = FedAvg()
    recall(fresh, arrays, numbers)
    assert list(fresh.m_t) == ["b", "a"]
    assert np.array_equal(fresh.m_t["b"], np.ones(2))
    assert [len(each) for each in fresh.strategy.momentum_vector] == [1, 2]
    assert fresh.strategy.min_train_nodes == 5
    assert fresh.eta == adam.eta
