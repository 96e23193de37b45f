"""Images that the server measures on."""

from __future__ import annotations

from smi_fed.checks import SettingError, require
from smi_fed.config import Settings
from smi_fed.data import ImageSet, shared_images


def test_images(settings: Settings) -> ImageSet | None:
    """The server's test split; None where it has none or is not to evaluate.

    Raises:
        SettingError: more clients than images or places, or other classes than the student's.
        FileNotFoundError, FileFormatError: naming what is missing or broken.
    """
    data, student, nodes = settings.data, settings.model.student, settings.strategy.min_nodes
    many = len(data.nodes)
    require(not many or nodes <= many, "data.nodes", list(data.nodes), f"a place for each of {nodes} clients")
    if data.source == "none":
        return None
    shared, test = shared_images(data)
    allowed = f"at most {len(shared)}, the images that clients share"
    require(bool(many) or nodes <= len(shared), "strategy.min_nodes", nodes, allowed)
    classes, own = len(test.class_names), student.num_classes
    named = student.class_names is not None  # some of the data's will do
    require(named or classes == own, "model.student.num_classes", own, f"{classes}, the data's classes")
    try:
        test = test.of_classes(student.class_names)
        return test.loaded() if len(test) and settings.server_evaluates else None
    except SettingError as error:
        raise error.under("model.student") from error
