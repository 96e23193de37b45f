"""What can be known of a run's models before anybody trains."""

from __future__ import annotations

import logging

import torch

from smi_fed.alignment import class_positions, union_of_classes
from smi_fed.checks import SettingError, require
from smi_fed.class_statistics import linear_head
from smi_fed.models import Classifier, ModelSpec, architecture_of, build_model
from smi_fed.settings import Settings
from smi_fed.starts import same_architecture
from smi_fed.strategies.admission import check_model
from smi_fed.strategies.allow_list import Expectation
from smi_fed.strategies.records import BadReplyError
from smi_fed.tuning import trained_weights

log = logging.getLogger("smi_fed")


def _check_admission(settings: Settings, key: str, spec: ModelSpec) -> None:
    """A client that the policy refuses would be refused after it has trained."""
    expected = Expectation(settings.model.student, settings.data.channels)
    try:
        check_model(architecture_of(spec).to_json(), settings.admission, expected)
    except BadReplyError as error:
        raise SettingError(f"model.{key}", spec.name, f"what `admission` lets in ({error})") from error


def _check_trainable(settings: Settings, key: str, model: Classifier) -> None:
    """Layers that a model does not have cannot be trained."""
    student = key == "student"
    try:
        trained_weights(model, (settings.distillation if student else settings.client.training).trainable)
    except SettingError as error:
        raise error.under("distillation" if student else "client.training") from error


def _check_model(settings: Settings, key: str, spec: ModelSpec) -> None:
    """One architecture, and whether it fits the data and the student."""
    data, student = settings.data, settings.model.student
    try:
        with torch.device("meta"):  # a client's start lies at that client
            model = build_model(spec if key == "student" else architecture_of(spec))
        class_positions(spec, student)
    except SettingError as error:
        raise error.under(f"model.{key}") from error
    _check_trainable(settings, key, model)
    channels, size, of_data = len(model.mean), model.image_size, (data.image_size,) * 2
    if key == "student" and settings.strategy.finish == "statistics":
        linear_head(model)
    # Clients show their models images at their own size; the test split has the data's.
    require(key != "student" or size == of_data, "model.student.image_size", size, f"data.image_size, {of_data}")
    require(channels == data.channels, f"model.{key}.kwargs.in_chans", channels, f"data.channels, {data.channels}")
    if settings.strategy.wraps and key != "student":
        _check_admission(settings, key, spec)
    good = settings.strategy.wraps or same_architecture(spec, student)
    require(good, f"model.{key}", spec.name, "the student's architecture, where strategy.distillation is false")


def check_models(settings: Settings) -> None:
    """Build every architecture on the meta device, so that none fails after training.

    Raises:
        SettingError: naming the model's key.
    """
    specs = {f"clients.{name}": spec for name, spec in settings.model.clients.items()}
    for key, spec in {**specs, "student": settings.model.student}.items():
        _check_model(settings, key, spec)
    fits = any(same_architecture(spec, settings.model.student) for spec in settings.model.clients.values())
    allowed = "own | random | pretrained | statistics, since no client has the student's architecture"
    require(fits or settings.strategy.start != "average", "strategy.start", "average", allowed)
    known = union_of_classes(list(settings.model.clients.values()))
    unknown = [name for name in settings.model.student.class_names or () if known and name not in known]
    if unknown:
        log.warning("no client's model knows the student's classes %s", unknown)
