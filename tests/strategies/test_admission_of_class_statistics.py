"""Class statistics that no images have, each refused with its reason."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from flwr.app import Array, ConfigRecord

from smi_fed.class_statistics import class_statistics
from smi_fed.models import build_seeded
from smi_fed.policy import AdmissionPolicy
from smi_fed.strategies import records
from smi_fed.strategies.admission import Expectation, admit
from smi_fed.strategies.records import BadReplyError
from tests.strategies.test_beginnings import IMAGES, LABELS, STUDENT, reply_of


def changed(key, change):
    """Client 0's statistics with one array, as numpy has it, changed in place or replaced."""
    sums = class_statistics(build_seeded(STUDENT, 0).eval(), [(IMAGES[0], LABELS[0])])
    content = reply_of(0, class_statistics=sums)
    array = content[records.CLASS_STATISTICS][key].numpy().copy()
    replaced = change(array)
    content[records.CLASS_STATISTICS][key] = Array(array if replaced is None else replaced)
    return content


def put(place, value):
    return lambda array: array.__setitem__(place, value)


def without(key):
    content = changed("counts", lambda _: None)
    del content[records.CLASS_STATISTICS][key]
    return content


def untold(change):
    content = changed("counts", change)
    del content[records.METRICS][records.LABEL_COUNTS]
    return content


REFUSED = {
    "not finite": (lambda: changed("sums", put((0, 0), np.nan)), "sums is not finite"),
    "infinite moments": (lambda: changed("moments", put((1, 1), np.inf)), "moments is not finite"),
    "another width": (lambda: changed("moments", lambda a: a[:-1, :-1]), r"moments is float64 \(23, 23\), expected"),
    "other classes": (lambda: changed("sums", lambda a: a[:-1]), r"sums is float64 \(4, 24\)"),
    "another type": (lambda: changed("counts", lambda a: a.astype(np.float32)), "counts is float32"),
    "no moments": (lambda: without("moments"), r"missing \['moments'\]"),
    "negative count": (lambda: changed("counts", put(0, -1.0)), "of class 0 are of -1.0 images"),
    "half an image": (lambda: changed("counts", put(1, 1.5)), "of class 1 are of 1.5 images"),
    "more than were told": (lambda: changed("counts", put(2, 3.0)), "class 2 are of 3.0 images, expected .* to 2"),
    "more than there are": (lambda: untold(put(2, 11.0)), "class 2 are of 11.0 images, expected .* to 10"),
    "more together": (lambda: untold(put(2, 9.0)), "are of 17.0 images, expected at most 10"),
    "sums of nothing": (lambda: changed("counts", put(3, 0.0)), "sums of a class without images"),
    "asymmetric": (lambda: changed("moments", put((0, 1), 1.0)), "not those of features"),
    "negative square": (lambda: changed("moments", put((4, 4), -1.0)), "not those of features"),
    "sums beyond their squares": (lambda: changed("sums", lambda a: 10 * a), "not those of features"),
    "correlation above 1": (
        lambda: changed("moments", lambda a: a + 1e3 * (np.ones_like(a) - np.eye(len(a)))), "not those of features",
    ),
    "giant": (lambda: changed("moments", put((0, 0), 1e200)), "features beyond 1e\\+06"),
    "giant sums": (lambda: changed("sums", put((0, 0), 1e200)), "features beyond 1e\\+06"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_statistics_that_no_images_have_are_refused(case):
    make, says = REFUSED[case]
    asks, cpu = Expectation(STUDENT, 3, features=24), torch.device("cpu")
    with pytest.raises(BadReplyError, match=says):
        admit(records.read_reply(make()), AdmissionPolicy(), asks, cpu)
    ignored = admit(records.read_reply(make()), AdmissionPolicy(), replace(asks, features=0), cpu)
    assert ignored.class_statistics is None  # nobody asked


def test_another_record_in_their_place_is_refused():
    content = reply_of(0)
    content[records.CLASS_STATISTICS] = ConfigRecord({"counts": 1})
    with pytest.raises(BadReplyError, match="'class-statistics' is not of arrays"):
        records.read_reply(content)


def test_good_statistics_are_admitted_as_they_were_sent():
    content = changed("counts", lambda _: None)
    teacher = admit(
        records.read_reply(content), AdmissionPolicy(), Expectation(STUDENT, 3, features=24), torch.device("cpu")
    )
    for key, value in vars(teacher.class_statistics).items():
        assert np.array_equal(value.numpy(), content[records.CLASS_STATISTICS][key].numpy())
