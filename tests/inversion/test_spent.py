"""What an inversion took is counted from what it did, not from what was planned."""

from dataclasses import replace

import pytest
import torch

from smi_fed.inversion import Converged, InversionConfig, StopSchedule, invert
from smi_fed.inversion.flops import spent_flops, stage_flops, trajectory_flops
from smi_fed.models import ModelSpec, build_model
from smi_fed.pipeline import PipelineConfig, TrainedTeacher, invert_teacher
from tests.models import TINY

TARGETS = torch.tensor([0, 1, 2])
SPARSE = InversionConfig.paper(iterations=8, schedule="2:0.3,5:0.5", jitter=0, flip=False, batch_size=2)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def spent_by(model, config):
    spent = {}
    invert(model, TARGETS, config, generator=seeded(), progress=lambda now: spent.update(now.spent))
    return spent


@pytest.mark.parametrize("schedule", ["", "2:0.3,5:0.5", "0:0.3,5:0.5"])
def test_a_plain_inversion_spends_what_was_planned(vit, schedule):
    config = replace(SPARSE, schedule=schedule)
    spent = spent_by(vit, config)
    counts = config.schedule.kept_counts(16)
    ends = [at for at, _ in counts[1:]] + [8]
    assert spent == {count: 3 * (end - at) for (at, count), end in zip(counts, ends, strict=True)}
    assert spent_flops(vit, config, spent, 3) == 3 * trajectory_flops(vit, config)


def test_early_stop_spends_less(vit):
    config = replace(SPARSE, iterations=40, leaving=Converged(3, 0.1))
    spent = spent_by(vit, config)
    stages = {stage.kept: stage for stage in stage_flops(vit, config)}
    by_hand = sum(count * stages[kept].iteration for kept, count in spent.items())
    assert spent_flops(vit, config, spent, 3) == by_hand + 3 * sum(stage.stop for stage in stages.values())
    assert spent_flops(vit, config, spent, 3) < 3 * trajectory_flops(vit, config)


def test_a_schedule_that_was_softened_costs_more(vit, monkeypatch):
    """Flat attention: dense, and the probe beside it."""
    monkeypatch.setattr(
        "smi_fed.inversion.teacher.TokenTeacher.importance",
        lambda _self, view, _targets: torch.ones(view.positions.shape),
    )
    config = replace(SPARSE, planning="adaptive")
    spent = spent_by(vit, config)
    assert spent == {16: 3 * 8 + 8 * 5}
    dense = replace(SPARSE, schedule=StopSchedule())
    assert spent_flops(vit, config, spent, 3) == (24 + 40) * trajectory_flops(vit, dense) // 8


@pytest.mark.parametrize("count", [1, 4, 6])
def test_a_teacher_gives_as_many_images_as_asked_for_from_fewer_trajectories(count):
    model = build_model(ModelSpec("vit_tiny_patch16_224", num_classes=5, kwargs=TINY))
    teacher = TrainedTeacher("client", model, 10)
    rebirth = PipelineConfig(count, replace(SPARSE, stopping="rebirth"))
    images, record = invert_teacher(teacher, 3, rebirth, seeded())
    assert len(images) == count
    assert images.teachers.tolist() == [3] * count
    trajectories = -(-count // 3)
    assert record.flops == trajectories * trajectory_flops(model, rebirth.inversion)
    assert record.dense_flops == count * trajectory_flops(model, replace(SPARSE, schedule=StopSchedule()))


@pytest.mark.parametrize("leaving", ["last", Converged(patience=2, tolerance=0.3)])
def test_a_finished_checkpoint_still_tells_what_it_took(tmp_path, vit, leaving):
    """With early stop that is less than was planned."""
    pipeline = PipelineConfig(3, replace(SPARSE, iterations=30, leaving=leaving))
    first, second = (
        invert_teacher(TrainedTeacher("client", vit, 10), 0, pipeline, seeded(), checkpoint=tmp_path)[1]
        for _ in range(2)
    )
    planned = 3 * trajectory_flops(vit, pipeline.inversion)
    assert first.flops == second.flops
    assert first.flops == planned if leaving == "last" else first.flops < planned
