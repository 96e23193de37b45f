"""A student that was aggregated is checked as a teacher is."""

import pytest
import torch
from flwr.serverapp.strategy import FedAvg, FedAvgM

from smi_fed.models import ModelSpec, build_seeded
from smi_fed.strategies import UnsoundStudentError, core
from smi_fed.strategies.soundness import require_sound, with_sound_statistics
from tests.models import masked_model
from tests.strategies.test_trusted_rounds import MINIMA, start, wrapped

RESNET = ModelSpec("resnet10t", 5, image_size=32, kwargs={"channels": (8, 8, 16, 16), "stem_width": 8})
VARIANCE = "backbone.bn1.running_var"


def test_a_variance_below_0_is_the_mean_of_what_was_aggregated():
    student = masked_model("resnet")
    projections = [dict(student.state_dict()) for _ in range(2)]
    for scale, each in zip((1.0, 3.0), projections, strict=True):
        each[VARIANCE] = torch.full_like(each[VARIANCE], scale)
    aggregated = dict(student.state_dict())
    aggregated[VARIANCE] = torch.full_like(aggregated[VARIANCE], 0.7)
    aggregated[VARIANCE][:2] = torch.tensor([-0.38, torch.nan])
    sound = with_sound_statistics(aggregated, projections, student)
    assert sound[VARIANCE].tolist() == pytest.approx([2.0, 2.0] + [0.7] * (len(sound[VARIANCE]) - 2))
    assert all(sound[key] is aggregated[key] for key in aggregated if key != VARIANCE)


def test_momentum_over_batch_norm_ends_with_a_student_that_answers(monkeypatch):
    """The second round's mean is far below the first's, and momentum carries the variance past 0."""
    scales = iter([1.0, 0.05, 0.05, 0.05])

    def shrinking(student, *_arguments, **_options):
        scale = next(scales)
        with torch.no_grad():
            for key, value in student.state_dict().items():
                if key.endswith("running_var"):
                    value.fill_(scale)
        return core.DistillationRecord()

    monkeypatch.setattr(core, "distill_student", shrinking)
    inner = FedAvgM(**MINIMA, server_momentum=0.9)
    strategy = wrapped(inner=inner, student=RESNET)
    variances = []

    def evaluate(_, arrays):
        state = arrays.to_torch_state_dict()
        variances.append(state[VARIANCE][0].item())
        student = build_seeded(RESNET, 0)
        student.load_state_dict(state)
        require_sound(student.eval(), "the test")

    start(strategy, rounds=4, evaluate_fn=evaluate)
    assert min(variances) > 0
    kept = inner.current_arrays.to_torch_state_dict()[VARIANCE]
    assert kept[0].item() == pytest.approx(variances[-1])  # what the strategy goes on from is what was sent


@pytest.mark.parametrize("broken", [torch.nan, torch.inf, 3e38])
def test_a_student_that_is_not_finite_is_never_written(tmp_path, monkeypatch, broken):
    def aggregate(self, server_round, replies):
        arrays, metrics = FedAvg.aggregate_train(self, server_round, replies)
        state = arrays.to_torch_state_dict()
        state["backbone.head.weight"].fill_(broken)
        return type(arrays)(state), metrics

    inner = type("Broken", (FedAvg,), {"aggregate_train": aggregate})(**MINIMA)
    with pytest.raises(UnsoundStudentError, match="after Broken aggregated round 1 the student cannot be used"):
        start(wrapped(tmp_path, inner))
    assert not list(tmp_path.glob("global*"))


def test_distillation_that_diverges_is_told(monkeypatch):
    def diverging(student, *_arguments, **_options):
        student.backbone.head.bias.data.fill_(torch.nan)
        return core.DistillationRecord()

    monkeypatch.setattr(core, "distill_student", diverging)
    with pytest.raises(UnsoundStudentError, match=r"after the distillation of round 1 .*head\.bias is not finite"):
        start(wrapped())
