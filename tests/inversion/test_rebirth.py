"""Patch rebirth: what matters detaches as a finished image, the rest goes on."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from smi_fed.inversion import InversionConfig, PyramidConfig, invert, trajectories
from smi_fed.inversion.flops import spent_flops, trajectory_flops
from smi_fed.inversion.rebirth import stops_of_images
from tests.models import masked_model
from tests.same import assert_same

TARGETS = torch.tensor([0, 1, 2, 3, 4])
REBIRTH = InversionConfig.paper(iterations=8, schedule="2:0.25,5:0.5", jitter=0, flip=False, stopping="rebirth")
PYRAMID = replace(REBIRTH, parametrisation=PyramidConfig((2, 4)), learning_rate=0.1)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("kind", ["vit", "resnet"])
@pytest.mark.parametrize(
    "config", [REBIRTH, PYRAMID, replace(PYRAMID, background="rendered"), replace(REBIRTH, schedule="0:0.25,5:0.5")]
)
def test_every_patch_belongs_to_one_image_of_its_trajectory(vit, kind, config):
    model = vit if kind == "vit" else masked_model(kind)
    found = invert(model, TARGETS, config, generator=seeded())
    assert found.ids.tolist() == [each for each in range(5) for _ in range(3)]
    assert found.targets.tolist() == [each for each in TARGETS.tolist() for _ in range(3)]
    patches = found.mask[0].numel()
    masks = found.mask.view(5, 3, patches)
    assert bool((masks.sum(1) == 1).all())
    counts = [patches, *(count for _, count in config.schedule.kept_counts(patches) if count < patches), 0]
    detached = [before - after for before, after in pairwise(counts)]
    assert masks.sum(2).tolist() == [detached] * 5


def test_what_detached_does_not_move_again(vit):
    found = invert(vit, TARGETS, REBIRTH, generator=seeded())
    images = found.images.view(5, 3, 3, 16, 16)
    first = found.mask.view(5, 3, 4, 4)[:, 0].repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None]
    for later in (1, 2):
        assert torch.equal(images[:, later].where(first, 0.0), images[:, 0].where(first, 0.0))
        assert not torch.equal(images[:, later], images[:, 0])


def test_the_most_important_detach_first(vit, monkeypatch):
    """A teacher to which the patches matter in their own order."""
    monkeypatch.setattr(
        "smi_fed.inversion.teacher.TokenTeacher.importance", lambda _self, view, _targets: -view.positions.double()
    )
    found = invert(vit, TARGETS[:1], REBIRTH, generator=seeded())
    kept = [mask.flatten().nonzero()[:, 0].tolist() for mask in found.mask]
    assert kept == [[0, 1, 2, 3], list(range(4, 10)), list(range(10, 16))]


def test_images_do_not_depend_on_their_batch(vit):
    model = vit.double()
    together = invert(model, TARGETS, REBIRTH, generator=seeded())
    alone = invert(model, TARGETS, replace(REBIRTH, batch_size=2), generator=seeded())
    assert torch.equal(together.mask, alone.mask)
    torch.testing.assert_close(together.images, alone.images, atol=1e-7, rtol=0)


def test_a_killed_one_goes_on_to_the_same_images(vit, tmp_path, monkeypatch):
    monkeypatch.setattr("smi_fed.inversion.checkpoint.LARGEST_SHARE", float("inf"))
    whole = invert(vit, TARGETS, REBIRTH, generator=seeded())

    def kill(now):
        if now.done == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        invert(vit, TARGETS, REBIRTH, generator=seeded(), checkpoint=tmp_path, checkpoint_interval=0, progress=kill)
    assert_same(invert(vit, TARGETS, REBIRTH, generator=seeded(), checkpoint=tmp_path), whole)


def test_memory_that_runs_out_at_a_stop_adds_no_image(vit, monkeypatch):
    from smi_fed.inversion import loop

    model = vit.double()
    whole = invert(model, TARGETS, REBIRTH, generator=seeded())
    scores, calls = loop.scores, iter(range(100))

    def scarce(problem, state, patches):
        if next(calls) == 1:
            raise torch.OutOfMemoryError
        return scores(problem, state, patches)

    monkeypatch.setattr(loop, "scores", scarce)
    found = invert(model, TARGETS, REBIRTH, generator=seeded())
    assert torch.equal(found.stopped_at, whole.stopped_at)
    torch.testing.assert_close(found.images, whole.images, atol=1e-7, rtol=0)


def test_how_many_trajectories_give_enough_images(vit):
    assert REBIRTH.images_per_target(16) == 3
    assert replace(REBIRTH, stopping="keep").images_per_target(16) == 1
    assert REBIRTH.images_per_target(1) == 1  # one patch cannot be divided
    assert replace(REBIRTH, schedule="0:0.25,5:0.5").images_per_target(16) == 3
    assert [trajectories(vit, REBIRTH, images) for images in (1, 3, 4)] == [1, 1, 2]


def test_it_costs_a_trajectory_not_one_for_each_image(vit):
    spent = {}
    invert(vit, TARGETS, REBIRTH, generator=seeded(), progress=lambda now: spent.update(now.spent))
    assert spent == {16: 5 * 2, 12: 5 * 3, 6: 5 * 3}
    assert spent_flops(vit, REBIRTH, spent, 5) == 5 * trajectory_flops(vit, REBIRTH)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=20))
def test_stops_of_images_against_a_loop(stages):
    """Stage 0 goes on to the end; 1 to 3 detach at iterations 10 to 30, where any does."""
    stopped = [-1 if stage == 0 else 10 * stage for stage in stages]
    ages = sorted({age for age in stopped if age >= 0})
    rows = stops_of_images(torch.tensor([stopped]), len(ages) + 1)[0].tolist()
    for age, row in zip(ages, rows[:-1], strict=True):
        for patch, at in enumerate(stopped):
            assert row[patch] == (-1 if at == age else at if 0 <= at < age else age)
    assert rows[-1] == stopped


def test_the_lowest_go_on_in_order():
    assert REBIRTH.stopping.going_on(torch.tensor([[0.3, 0.1, 0.9, 0.2]]), 2).tolist() == [[1, 3]]
