"""What later rounds, restarts and many clients may rely on."""

import copy
import gc
from functools import partial

import numpy as np
import pytest
import torch
from flwr.app import Array
from flwr.serverapp.strategy import FedAdam, FedAvg

from simulations.local_grid import InProcessGrid
from smi_fed.executors import job
from smi_fed.files import FileFormatError
from smi_fed.models import Classifier
from smi_fed.pool import PoolConfig
from smi_fed.strategies import (
    AdmissionPolicy,
    DataFreeDistillation,
    TooFewTeachersError,
    WatchingGrid,
    core,
    records,
)
from smi_fed.strategies.run_state import file_name
from tests.models import small_spec
from tests.strategies.test_data_free import NODES, PIPELINE, client
from tests.strategies.test_resume import KilledError, after

MINIMA = {"fraction_evaluate": 0.0, "min_train_nodes": 2, "min_available_nodes": 2}


def wrapped(directory=None, inner=None, **options):
    options = {"student": small_spec(depth=3), "pipeline": PIPELINE, **options}
    return DataFreeDistillation(inner or FedAvg(**MINIMA), state_directory=directory, **options)


def start(strategy, ask=client, rounds=2, grid=WatchingGrid, evaluate_fn=None):
    inner = InProcessGrid(ask, NODES)
    return strategy.start(
        grid=grid(inner, interval=0.001) if grid else inner, initial_arrays=strategy.initial_arrays,
        num_rounds=strategy.remaining_rounds(rounds), evaluate_fn=evaluate_fn,
    )  # fmt: skip


def overflowing(message, context, number=0):
    """Weights and logits are finite, gradients are not: refused only in inversion."""
    reply = client(message, context)
    if context.node_config["partition-id"] == number:
        arrays = reply.content[records.ARRAYS]
        for key in [key for key in arrays if "norm" in key]:
            arrays[key] = Array((arrays[key].numpy() * 1e17).astype(np.float32))
    return reply


@pytest.mark.parametrize("grid", [None, WatchingGrid])
@pytest.mark.parametrize("killed_at", ["after round 1", "distilling round 2"])
def test_a_teacher_that_diverges_does_not_break_a_restart(tmp_path, monkeypatch, grid, killed_at):
    whole = wrapped(tmp_path / "whole")
    expected = start(whole, overflowing, grid=grid).arrays.to_torch_state_dict()
    assert ["diverged" in v.reason for v in whole.rounds[0].verdicts] == [True, False, False]

    def kill(number, _):
        if number == 1:
            raise KilledError

    with monkeypatch.context() as patch:
        if killed_at != "after round 1":
            patch.setattr(core, "distill_student", after(2, core.distill_student))
        with pytest.raises(KilledError):
            start(wrapped(tmp_path / "run"), overflowing, grid=grid, evaluate_fn=kill if "1" in killed_at else None)
    again = wrapped(tmp_path / "run")
    assert [teacher.name for teacher in again.rounds[0].teachers] == ["client 1", "client 2"]
    assert [len(images) for images in again.rounds[0].images] == [4, 4]
    found = start(again, overflowing, grid=grid).arrays.to_torch_state_dict()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_who_is_left_by_too_few_teachers_is_asked_again(tmp_path):
    with pytest.raises(TooFewTeachersError, match=r"2 teachers admitted, 3 needed .*inversion diverged"):
        start(wrapped(tmp_path, min_teachers=3), overflowing)
    asked = []

    def mended(message, context):
        asked.append(context.node_config["partition-id"])
        return client(message, context)

    again = wrapped(tmp_path, min_teachers=3)
    start(again, mended, rounds=1)
    assert sorted(asked) == [0, 1, 2]
    assert len(again.rounds[0].teachers) == 3


def test_another_model_of_the_same_name_gets_images_of_its_own(tmp_path, monkeypatch):
    """A client that trained anew after a crash in the middle of a round."""
    with monkeypatch.context() as patch:
        patch.setattr(job, "invert_teacher", after(3, job.invert_teacher))
        with pytest.raises(KilledError):
            start(wrapped(tmp_path), partial(client), rounds=1)
    (tmp_path / "round1-verdicts.json").unlink()  # as if one had not answered yet

    def trained_anew(message, context):
        reply = client(message, context)
        head = reply.content[records.ARRAYS]["backbone.head.bias"].numpy()
        reply.content[records.ARRAYS]["backbone.head.bias"] = Array(head + np.float32(context.node_id == 11))
        return reply

    found, fresh = wrapped(tmp_path), wrapped()
    start(found, trained_anew, rounds=1)
    start(fresh, trained_anew, rounds=1)
    for one, other in zip(found.rounds[0].images, fresh.rounds[0].images, strict=True):
        assert torch.equal(one.images, other.images)


ADAM = partial(FedAdam, **MINIMA)


@pytest.mark.parametrize(
    ("before", "now", "differs"),
    [
        ({"inner": ADAM(eta=0.1)}, {"inner": ADAM(eta=0.2)}, "strategy.eta"),
        ({"inner": ADAM()}, {"inner": FedAvg(**MINIMA)}, "strategy"),
        ({}, {"inner": FedAvg(**{**MINIMA, "fraction_train": 0.7})}, "strategy.fraction_train"),
        ({"identity": {"data.alpha": "0.5"}}, {"identity": {"data.alpha": "0.1"}}, "data.alpha"),
        ({}, {"identity": {"data.alpha": "0.1"}}, "data.alpha"),
    ],
)
def test_other_settings_are_not_gone_on_with(tmp_path, before, now, differs):
    before, now = copy.deepcopy(before), copy.deepcopy(now)
    start(wrapped(tmp_path, **before), rounds=1)
    with pytest.raises(FileFormatError, match=rf"which differs in (strategy\.\w+, )*{differs}[,;]"):
        wrapped(tmp_path, **now)


def test_what_only_evaluation_needs_may_change(tmp_path):
    start(wrapped(tmp_path), rounds=1)
    assert wrapped(tmp_path, FedAvg(**{**MINIMA, "fraction_evaluate": 1.0})).done_before == 1


def test_one_teacher_is_in_memory_at_a_time_and_none_after_a_round(monkeypatch):
    def alive():
        gc.collect()
        return sum(isinstance(each, Classifier) for each in gc.get_objects())

    strategy = wrapped()
    others, seen = alive() - 1, {"inverting": [], "after": []}  # a student is there
    invert = job.invert_teacher

    def watched(teacher, *arguments, **options):
        seen["inverting"].append(alive() - others)
        return invert(teacher, *arguments, **options)

    monkeypatch.setattr(job, "invert_teacher", watched)
    strategy.core.on_round = lambda _: seen["after"].append(alive() - others)
    start(strategy, rounds=3)
    assert seen == {"inverting": [2] * 9, "after": [1] * 3}
    assert not any(verdict.reply for record in strategy.rounds for verdict in record.verdicts)
    assert not any(record.projections for record in strategy.rounds)


def test_the_first_is_inverted_while_others_still_train(monkeypatch):
    events = []
    invert = job.invert_teacher

    def noted(teacher, *arguments, **options):
        events.append(f"invert {teacher.name}")
        return invert(teacher, *arguments, **options)

    class SlowGrid(InProcessGrid):
        """The last client's reply is not there when it is first looked for."""

        looks = 0

        def _is_silent(self, asked):
            if self.asked[asked].metadata.dst_node_id != 33:
                return False
            self.looks += 1
            return self.looks < 4

    def training(message, context):
        events.append(f"train client {context.node_config['partition-id']}")
        return client(message, context)

    monkeypatch.setattr(job, "invert_teacher", noted)
    early = wrapped()
    grid = WatchingGrid(SlowGrid(training, NODES), interval=0.001)
    early.start(grid=grid, initial_arrays=early.initial_arrays, num_rounds=1)
    late = events.index("train client 2")
    assert sorted(events[:late]) == ["invert client 0", "invert client 1", "train client 0", "train client 1"]
    assert events[late + 1 :] == ["invert client 2"]
    usual = wrapped()
    start(usual, rounds=1, grid=None)
    assert all(torch.equal(a, b) for a, b in zip(early.student.parameters(), usual.student.parameters(), strict=True))


@pytest.mark.parametrize("projection", ["ensemble", "per_teacher"])
def test_no_two_purposes_share_their_draws(monkeypatch, projection):
    seeds = []

    def noted(function, place):
        def noting(*arguments, **options):
            seeds.append(arguments[place].initial_seed())
            return function(*arguments, **options)

        return noting

    monkeypatch.setattr(job, "invert_teacher", noted(job.invert_teacher, 3))
    monkeypatch.setattr(core, "distill_student", noted(core.distill_student, 4))
    start(wrapped(projection=projection))
    assert len(seeds) == 2 * (3 + (1 if projection == "ensemble" else 3))
    assert len(set(seeds)) == len(seeds)


def test_file_names_are_plain_short_and_different():
    names = ["client 1", "client-1", "Client 1", "St. Mary's", "東京", "大阪", "x" * 64, "", ".."]
    files = [file_name(name) for name in names]
    assert len(set(files)) == len(names)
    assert all(len(each) <= 50 and each.isascii() and "/" not in each and not each.startswith(".") for each in files)


def test_two_clients_of_one_name_both_teach(tmp_path):
    def namesakes(message, context):
        reply = client(message, context)
        reply.content[records.MODEL][records.NAME] = "hospital"
        return reply

    strategy = wrapped(tmp_path)
    start(strategy, namesakes, rounds=1)
    assert [teacher.name for teacher in strategy.rounds[0].teachers] == ["hospital"] * 3
    assert len({stored.path for stored in strategy.rounds[0].stored}) == 3
    shapes = {teacher.load().spec.to_json() for teacher in strategy.rounds[0].teachers}
    assert len(shapes) == 3  # nobody's model took the place of another's


@pytest.mark.parametrize(("pool", "kept"), [(PoolConfig(), {3}), (PoolConfig(images=16), {2, 3})])
def test_what_nobody_asked_to_keep_goes(pool, kept):
    strategy = wrapped(pool=pool)
    start(strategy, rounds=3)
    directory = strategy.core.state.directory
    assert {int(path.name[5]) for path in directory.glob("images/*")} == kept
    assert {int(path.name[5]) for path in directory.glob("*.model.safetensors")} == {3}
    del strategy
    gc.collect()
    assert not directory.exists()


def test_images_that_have_a_place_stay(tmp_path):
    start(wrapped(image_directory=tmp_path), rounds=2)
    assert {int(path.name[5]) for path in tmp_path.iterdir()} == {1, 2}


@pytest.mark.parametrize("lost", ["images/round1-client-1*", "round1-client-1*.model*"])
@pytest.mark.parametrize("how", ["gone", "damaged"])
def test_a_file_that_is_lost_amid_a_round_is_made_again(tmp_path, monkeypatch, lost, how):
    expected = start(wrapped(), rounds=1).arrays.to_torch_state_dict()
    with monkeypatch.context() as patch:
        patch.setattr(core, "distill_student", after(1, core.distill_student))
        with pytest.raises(KilledError):
            start(wrapped(tmp_path), rounds=1)
    (path,) = tmp_path.glob(lost)
    path.write_bytes(path.read_bytes()[:-7]) if how == "damaged" else path.unlink()
    found = start(wrapped(tmp_path), rounds=1).arrays.to_torch_state_dict()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("grid", [None, WatchingGrid])
def test_a_cap_does_not_depend_on_when_a_teacher_is_found_to_diverge(grid):
    """The three claim 10, 20 and 30 examples; without the one that diverges the lower median is 20."""
    strategy = wrapped(policy=AdmissionPolicy(max_claim_ratio=1.0))
    start(strategy, overflowing, rounds=1, grid=grid)
    assert [teacher.num_examples for teacher in strategy.rounds[0].teachers] == [20, 20]
