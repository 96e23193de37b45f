"""Images that begin where others ended."""

import pytest
import torch

from smi_fed.checks import SettingError
from smi_fed.closed_loop import allotted, disagreement
from smi_fed.inversion import InversionConfig, StopSchedule, invert
from smi_fed.inversion.amortised import Amortised, divided, invert_amortised, mixtures, shortened
from smi_fed.inversion.rebirth import Rebirth
from smi_fed.pipeline import TrainedTeacher
from tests.models import small_vit

TARGETS = torch.tensor([3, 1, 1, 0, 3, 1, 1, 1, 3, 0, 2, 1])
CONFIG = InversionConfig(iterations=4, schedule=StopSchedule(), batch_size=4, jitter=0, flip=False)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_every_class_has_a_pioneer():
    pioneers, others = divided(TARGETS, 0.5)
    assert pioneers.tolist() == [0, 1, 2, 3, 4, 10]  # the first of each class, then the first of all
    assert others.tolist() == [5, 6, 7, 8, 9, 11]
    assert [len(part) for part in divided(TARGETS, 0.01)] == [4, 8]


@pytest.mark.parametrize("iterations", [0, 2])
@pytest.mark.parametrize("start", ["mixtures", "learned"])
def test_pioneers_are_as_alone_and_the_others_begin_from_them(vit, start, iterations):
    how = Amortised(start, 0.5, iterations)
    found = invert_amortised(vit, TARGETS, CONFIG, how, generator=seeded(), teacher_id=7)
    assert found.ids.tolist() == list(range(12))
    assert found.targets.tolist() == TARGETS.tolist()
    assert found.teachers.tolist() == [7] * 12
    pioneers, others = divided(TARGETS, 0.5)
    alone = invert(vit, TARGETS[pioneers], CONFIG, generator=seeded())
    assert torch.equal(found.images[pioneers], alone.images)
    assert not torch.equal(found.images[others[0]], found.images[others[1]])  # two of one class
    if not iterations and start == "mixtures":
        of_two = alone.images[alone.targets == 2]
        assert torch.allclose(found.images[10], of_two[0])


def test_a_mixture_is_one_of_its_class_and_a_learned_start_goes_to_where_images_ended(vit):
    finished = invert(vit, TARGETS, CONFIG, generator=seeded())
    made = mixtures(finished, torch.tensor([2, 3]), Amortised(shift=0, parts=3), seeded(1))
    assert torch.allclose(made[0], finished.images[10], atol=1e-6)  # the only one of its class
    own = finished.images[finished.targets == 3]
    weights = torch.linalg.lstsq(own.flatten(1).T, made[1].flatten()[:, None]).solution[:, 0]
    assert torch.allclose((weights[:, None] * own.flatten(1)).sum(0), made[1].flatten(), atol=1e-4)
    assert weights.sum() == pytest.approx(1, abs=1e-3)
    far = Amortised("learned", 0.34, 1, rate=1.0, noise=0.0)  # four pioneers, eight others in two batches
    found = invert_amortised(vit, TARGETS, CONFIG, far, generator=seeded())
    still = invert_amortised(vit, TARGETS, CONFIG, Amortised("learned", 0.34, 1, rate=0.001, noise=0.0),
                             generator=seeded())  # fmt: skip
    same = [torch.equal(a, b) for a, b in zip(found.images, still.images, strict=True)]
    pioneers, others = divided(TARGETS, 0.34)
    assert all(same[row] for row in [*pioneers.tolist(), *others[:4].tolist()])
    assert [same[row] for row in others[4:].tolist()] == [
        False,
        False,
        True,
        False,
    ]  # no other of class 0 was there yet


def test_rebirth_gives_several_images_of_a_pioneer_and_stops_need_room(vit):
    stops = StopSchedule(((1, 0.5), (2, 0.5)))
    config = InversionConfig(iterations=4, schedule=stops, stopping=Rebirth(), batch_size=4, jitter=0)
    found = invert_amortised(vit, TARGETS, config, Amortised("mixtures", 0.5, 0), generator=seeded())
    assert len(found) == 6 * 3 + 6
    assert found.ids.tolist() == sorted(found.ids.tolist())
    assert not shortened(config, 2).schedule.stops
    assert shortened(config, 3).schedule.stops == ((1, 0.5), (2, 0.5))


def test_several_classes_at_once_are_refused(vit):
    with pytest.raises(SettingError, match="one class each"):
        invert_amortised(vit, torch.rand(3, 5), CONFIG, Amortised(), generator=seeded())


def test_a_student_disagrees_where_it_says_something_else():
    vit, other = small_vit(), small_vit(seed=1)
    teachers = [TrainedTeacher(name, model.eval(), 10, None, None) for name, model in (("a", vit), ("b", vit))]
    images = [invert(vit, torch.tensor([0, 0, 2]), CONFIG, generator=seeded(each)) for each in range(2)]
    assert disagreement(vit, teachers, images, "uniform").abs().max() < 1e-5
    apart = disagreement(other, teachers, images, "uniform")
    assert apart.shape == (2, vit.spec.num_classes)
    assert (apart[:, [0, 2]] > 1e-3).all()
    assert not apart[:, 1].any()
    with torch.no_grad():
        said = [model(images[0].images[:2]).softmax(1) for model in (vit, other)]
    expected = (said[0] * (said[0].log() - said[1].log())).sum(1).mean()
    assert apart[0, 0] == pytest.approx(float(expected), rel=1e-3)


def test_what_is_allotted_sums_up_in_proportion():
    assert allotted(torch.tensor([[1.0, 0.0], [2.0, 1.0]]), 10).tolist() == [[3, 0], [5, 2]]
    with pytest.raises(ValueError, match="one above 0"):
        allotted(torch.zeros(2, 2), 3)
