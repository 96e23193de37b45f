"""Converged images leave, others enter."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from smi_fed.inversion import Converged, InversionConfig, PyramidConfig, batch_queue, feature_statistics, invert, loop
from smi_fed.inversion.loop import start
from smi_fed.inversion.problem import pose
from tests.same import assert_same

TARGETS = torch.arange(11) % 5
BASE = InversionConfig.paper(
    iterations=40, schedule="2:0.3,5:0.4", jitter=0, flip=False, learning_rate=0.1, batch_size=4,
    leaving=Converged(patience=4, tolerance=0.02),
)  # fmt: skip
DENSE = replace(BASE, schedule="")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def followed(model, config, **arguments):
    seen = []
    found = invert(model, TARGETS, config, generator=seeded(), progress=seen.append, **arguments)
    return found, seen


@pytest.mark.parametrize("config", [BASE, DENSE], ids=["sparse", "dense"])
def test_images_do_not_depend_on_when_others_leave(vit, config):
    model = vit.double()
    found, seen = followed(model, config)
    for size in (3, 11):
        other, _ = followed(model, replace(config, batch_size=size))
        assert other.ids.tolist() == found.ids.tolist() == list(range(11))
        assert torch.equal(other.stopped_at, found.stopped_at)
        torch.testing.assert_close(other.images, found.images, atol=1e-7, rtol=0)
    assert sum(seen[-1].spent.values()) < 11 * 40


def test_it_is_the_plain_inversion_cut_off_at_convergence(vit):
    """Each image alone, held when its own smoothed loss has not fallen for `patience` iterations."""
    model = vit.double()
    found, _ = followed(model, DENSE)
    for number in (0, 3):
        ages = {}
        plain = replace(DENSE, leaving="last")
        targets = TARGETS.clone()

        def remember(now, ages=ages):
            ages[now.done] = float(now.loss)

        alone = replace(plain, batch_size=1, iterations=40)
        # Batches of one are inverted in order, so this image's iterations are these.
        invert(model, targets[: number + 1], alone, generator=seeded(), progress=remember)
        losses = [ages[number * 40 + step] for step in range(1, 41)]
        level, lowest, lowest_at, stop = None, float("inf"), 0, 40
        for age, loss in enumerate(losses, start=1):
            level = loss if level is None else level + 0.1 * (loss - level)
            if level < lowest * (1 - DENSE.leaving.tolerance):
                lowest, lowest_at = level, age
            if age - lowest_at >= DENSE.leaving.patience:
                stop = age
                break
        short = invert(model, targets[: number + 1], replace(alone, iterations=stop), generator=seeded())
        torch.testing.assert_close(short.images[number], found.images[number], atol=1e-7, rtol=0)


@pytest.mark.parametrize("config", [BASE, DENSE], ids=["sparse", "dense"])
def test_the_batch_stays_full_while_images_wait(vit, config, monkeypatch):
    """Past the stops never fewer than three of four places are taken before the last image was begun."""
    steps, begun = [], []
    step, begin = loop.step, batch_queue._begin

    def count(problem, state, touching):
        steps.append((len(state.ids), problem.in_last_stage(state)))
        return step(problem, state, touching)

    def note(problem, queue, targets):
        begin(problem, queue, targets)
        begun.append((len(steps), queue.following))

    monkeypatch.setattr(loop, "step", count)
    monkeypatch.setattr(batch_queue, "_begin", note)
    followed(vit, config)
    last = next(place for place, following in begun if following == len(TARGETS))
    assert len(begun) > 2
    assert all(size >= 3 for size, last_stage in steps[:last] if last_stage)
    assert last > 20


def test_no_image_converges_before_its_last_stop(vit):
    found, _ = followed(vit, replace(BASE, schedule="2:0.3,30:0.4", leaving=Converged(1, 0.5)))
    assert set(found.stopped_at.unique().tolist()) == {-1, 2, 30}


@pytest.mark.parametrize("schedule", ["2:0.3,5:0.4", ""], ids=["sparse", "dense"])
def test_a_killed_one_goes_on_to_the_same_images(vit, tmp_path, monkeypatch, schedule):
    monkeypatch.setattr("smi_fed.inversion.checkpoint.LARGEST_SHARE", float("inf"))
    known = feature_statistics(vit, [torch.rand(8, 3, 16, 16)])
    leaving, pyramid = replace(BASE.leaving, tolerance=0.15), PyramidConfig((2, 4))
    config = replace(BASE, parametrisation=pyramid, statistics=0.01, schedule=schedule, leaving=leaving)
    whole, seen = followed(vit, config, statistics=known)
    for at in (1, 6, 20, 33):
        count = iter(range(1, 1000))

        def kill(_now, count=count, at=at):
            if next(count) == at:
                raise KeyboardInterrupt

        directory = tmp_path / str(at)
        with pytest.raises(KeyboardInterrupt):
            invert(vit, TARGETS, config, generator=seeded(), statistics=known, checkpoint=directory,
                   checkpoint_interval=0, progress=kill)  # fmt: skip
        spent = {}
        found = invert(vit, TARGETS, config, generator=seeded(), statistics=known, checkpoint=directory,
                       progress=lambda now, spent=spent: spent.update(now.spent))  # fmt: skip
        assert_same(found, whole)
        assert sum(seen[-1].spent.values()) < 11 * 40  # images did leave early
        assert not spent or spent == seen[-1].spent


def test_progress_goes_from_start_to_total(vit):
    _, seen = followed(vit, BASE)
    assert all(a.done <= b.done for a, b in pairwise(seen))
    assert seen[-1].done == seen[-1].total
    assert seen[-1].images == 11
    assert {now.total for now in seen} == {3 * 40}


def test_memory_that_runs_out_changes_no_image(vit, monkeypatch):
    """Out of memory with more than two images, whether they are past their stops or fill a batch up."""
    model = vit.double()
    whole, _ = followed(model, BASE)
    objective = loop.objective

    def scarce(problem, state, touching):
        if len(state.ids) > 2:
            raise torch.OutOfMemoryError
        return objective(problem, state, touching)

    monkeypatch.setattr(loop, "objective", scarce)
    found, _ = followed(model, BASE)
    assert torch.equal(found.stopped_at, whole.stopped_at)
    torch.testing.assert_close(found.images, whole.images, atol=1e-7, rtol=0)


def test_a_converged_image_stays_so(vit):
    config = replace(DENSE, leaving=Converged(3, 0.02))
    problem = pose(vit, config, 0)
    state = start(problem, torch.arange(2), TARGETS[:2])
    for loss in ([1.0, 1.0], [1.0, 0.1], [1.0, 0.1], [1.0, 0.1], [0.0, 0.1]):
        still = problem.done(state)
        state.age += 1
        config.leaving.note(state, torch.tensor(loss), still)
    assert problem.done(state).tolist() == [True, False]
