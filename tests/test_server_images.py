"""Which classes the server tests on."""

from dataclasses import replace

import pytest

from server.images import test_images as server_images
from simulations.runner.ledger import PROJECT
from smi_fed.checks import SettingError
from smi_fed.config import load_settings


def settings(**student):
    found = load_settings(PROJECT / "conf", ["data=shapes", "model=outlines"])
    model = replace(found.model, student=replace(found.model.student, **student))
    return replace(found, model=model, strategy=replace(found.strategy, min_nodes=2))


def test_some_of_the_datas_classes_by_name_and_in_the_students_order():
    found = server_images(settings(num_classes=2, class_names=("star", "ring")))
    assert found is not None
    assert found.class_names == ("star", "ring")
    everything = server_images(settings(num_classes=10, class_names=None))
    assert everything is not None
    for place, name in enumerate(found.class_names):
        of_all = everything.labels == everything.class_names.index(name)
        assert int((found.labels == place).sum()) == int(of_all.sum()) > 0


@pytest.mark.parametrize(
    ("student", "told"),
    [
        ({"num_classes": 2, "class_names": None}, "model.student.num_classes: got 2, allowed: 10, the data's classes"),
        ({"num_classes": 2, "class_names": ("star", "cat")}, "model.student.class_names: got .'cat'"),
    ],
)
def test_others_are_refused(student, told):
    with pytest.raises(SettingError, match=told):
        server_images(settings(**student))
