"""A schedule that trusts attention as far as it says something."""

import logging
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from smi_fed.inversion import InversionConfig, StopSchedule, adaptive, invert, loop
from smi_fed.inversion.adaptive import Reading, read_attention, reading
from smi_fed.inversion.planning import PROBES
from smi_fed.inversion.probe import probe
from smi_fed.inversion.problem import pose
from smi_fed.inversion.teacher import frozen
from tests.models import masked_model
from tests.same import assert_same

CONFIG = InversionConfig.paper(iterations=12, schedule="4:0.5,8:0.5", jitter=0, flip=False, planning="adaptive")
IMPORTANCE = "smi_fed.inversion.teacher.TokenTeacher.importance"


def looks(model, config=CONFIG, key=7, **arguments):
    return partial(probe, pose(model, config, key), **arguments)


def adapted(model, config=CONFIG, patches=16, **arguments):
    with frozen(model):
        return config.planning.plan(config.schedule, patches, looks(model, config, **arguments)).schedule


def test_flat_attention_gives_dense(vit, monkeypatch):
    monkeypatch.setattr(IMPORTANCE, lambda _self, view, _targets: torch.ones(view.positions.shape))
    assert adapted(vit).stops == ()


def test_attention_that_jumps_gives_nearly_dense(vit, monkeypatch):
    """One peak at another place on every look: overlap as by chance."""
    generator = torch.Generator().manual_seed(0)
    monkeypatch.setattr(
        IMPORTANCE, lambda _self, view, _targets: 1e3 * torch.rand(view.positions.shape, generator=generator) ** 40
    )
    kept = adapted(vit).kept_counts(16)[-1][1]
    assert kept >= 13  # of the 4 that were planned


def test_peaked_and_stable_attention_follows_the_plan(vit, monkeypatch):
    peaked = 1e-4 + (torch.arange(16) < 3).double()
    monkeypatch.setattr(IMPORTANCE, lambda _self, view, _targets: peaked.expand(view.positions.shape))
    assert adapted(vit).kept_counts(16) == CONFIG.schedule.kept_counts(16)


def test_never_fewer_patches_than_attention_is_spread_over(vit, monkeypatch):
    spread = (torch.arange(16) < 8).double()  # evenly over half of the patches
    monkeypatch.setattr(IMPORTANCE, lambda _self, view, _targets: spread.expand(view.positions.shape))
    assert adapted(vit).kept_counts(16) == [(0, 16), (4, 8)]


@pytest.mark.parametrize("count", [2, 4])
def test_a_reading_against_a_loop(count):
    earlier, now = torch.rand(2, 3, 8, dtype=torch.float64)
    spreads, overlaps = [], []
    for before, after in zip(earlier, now, strict=True):
        shares = [float(value) / float(after.sum()) for value in after]
        spreads.append(torch.tensor([-share * torch.tensor(share).log() for share in shares]).sum().exp() / 8)
        top = [set(each.argsort(descending=True)[:count].tolist()) for each in (before, after)]
        overlaps.append((len(top[0] & top[1]) / count - count / 8) / (1 - count / 8))
    found = reading(earlier, now, count)
    assert found.spread == pytest.approx(float(sum(spreads) / 3), rel=1e-5)
    assert found.stability == pytest.approx(min(1.0, max(0.0, sum(overlaps) / 3)), rel=1e-6)


def test_the_same_looks_are_perfectly_stable():
    now = torch.rand(2, 8, dtype=torch.float64)
    assert reading(now, now, 3).stability == pytest.approx(1)


def test_readings_come_one_for_each_stop(vit):
    with frozen(vit):
        found = read_attention(looks(vit), [(4, 8), (8, 4)])
    assert [type(each) for each in found] == [Reading] * 2
    assert all(0 < each.spread <= 1 and 0 <= each.stability <= 1 for each in found)


@pytest.mark.parametrize("kind", ["vit", "resnet", "multi-label"])
def test_invert_uses_the_adapted_schedule(vit, kind, caplog):
    caplog.set_level(logging.INFO, "smi_fed")
    model = masked_model("resnet") if kind == "resnet" else vit
    targets = torch.eye(5) if kind == "multi-label" else torch.arange(5)
    logging.getLogger("smi_fed").propagate = True
    spent = {}
    found = invert(model, targets, CONFIG, generator=torch.Generator().manual_seed(0),
                   progress=lambda now: spent.update(now.spent))  # fmt: skip
    key = int(torch.randint(2**62, (), generator=torch.Generator().manual_seed(0)))
    patches = found.mask[0].numel()
    schedule = adapted(model, patches=patches, key=key, multi_label=kind == "multi-label")
    assert found.kept.shape[1] == schedule.kept_counts(patches)[-1][1]
    assert f"'{schedule}' of '4:0.5,8:0.5'" in caplog.text
    assert sum(spent.values()) == 5 * 12 + PROBES * 8
    plain = replace(CONFIG, planning="fixed", schedule=schedule)
    assert_same(invert(model, targets, plain, generator=torch.Generator().manual_seed(0)), found)


@given(
    st.lists(st.tuples(st.floats(0.01, 1), st.floats(0, 1)), min_size=3, max_size=3),
    st.sampled_from(["4:0.5,6:0.5,8:0.3", "1:0.3,2:0.3,3:0.9", "0:0.5,1:0.5,2:0.1"]),
)
def test_never_steeper_than_planned(readings, schedule):
    """Whatever attention says, after every planned stop at least as many patches go on as planned."""
    stops = [pair for pair in StopSchedule.parse(schedule).kept_counts(16) if pair[1] < 16]
    found = adaptive.adapted(stops, [Reading(*each) for each in readings], 16).kept_counts(16)
    for (at, planned), (spread, _) in zip(stops, readings, strict=True):
        kept = min(count for iteration, count in found if iteration <= at)
        assert kept >= planned
        assert kept >= min(spread, *(each[0] for each in readings)) * 16 - 1e-6


def test_a_stop_before_anything_moved_is_not_trusted(vit):
    with frozen(vit):
        (found,) = read_attention(looks(vit), [(0, 8)])
    assert found.stability == 0


@pytest.mark.parametrize("fitting", [1, 3, 8])
def test_the_probe_takes_what_fits(vit, monkeypatch, fitting):
    model = vit.double()
    with frozen(model):
        whole = read_attention(looks(model), [(4, 8)])
    objective = loop.objective

    def scarce(problem, state, touching):
        if len(state.ids) > fitting:
            raise torch.OutOfMemoryError
        return objective(problem, state, touching)

    monkeypatch.setattr(loop, "objective", scarce)
    with frozen(model):
        found = read_attention(looks(model), [(4, 8)])
    assert found[0].spread == pytest.approx(whole[0].spread)
    assert found[0].stability == pytest.approx(whole[0].stability)


def test_a_killed_one_does_not_probe_again(vit, tmp_path, monkeypatch):
    monkeypatch.setattr("smi_fed.inversion.checkpoint.LARGEST_SHARE", float("inf"))
    arguments = {"checkpoint": tmp_path, "checkpoint_interval": 0}
    whole = invert(vit, torch.arange(5), CONFIG, generator=torch.Generator().manual_seed(0))

    def kill(now):
        if now.done == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        invert(vit, torch.arange(5), CONFIG, generator=torch.Generator().manual_seed(0), progress=kill, **arguments)
    monkeypatch.setattr(adaptive, "read_attention", pytest.fail)
    assert_same(invert(vit, torch.arange(5), CONFIG, generator=torch.Generator().manual_seed(0), **arguments), whole)


def test_without_a_stop_there_is_nothing_to_adapt(vit):
    dense = replace(CONFIG, schedule="")
    first, second = (
        invert(vit, torch.arange(2), each, generator=torch.Generator().manual_seed(0))
        for each in (dense, replace(dense, planning="fixed"))
    )
    assert_same(first, second)
