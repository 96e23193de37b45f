"""What it takes to build a model again, without its weights."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, field
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from smi_fed.checks import Allowed, Count, Number, Positive, SettingError, checked, read, require

SCHEMA_VERSION = 1

FEW = Field(min_length=1)
ClassName = Annotated[str, Field(coerce_numbers_to_str=True)]
FilledText = Annotated[str, Field(strict=True, min_length=1)]
START = "null | pretrained | the path of a file of weights"
CHANNELS = Allowed("finite numbers, above 0 for std, one per channel")


def _path_text(value: Any) -> Any:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


@checked
class ModelSpec:
    """What it takes to build a classifier again, without its weights.

    Args:
        name: a timm model name, or one of `register_model`.
        num_classes: number of classes, at least 1.
        image_size: height and width of the images in pixels; None takes the model's own.
        kwargs: keyword arguments for `timm.create_model`, or for the registered builder.
            `checkpoint_path` is a file of weights, see `smi_fed.weights.load_weights`.
        mean, std: per-channel normalisation of images in [0, 1]; None takes the model's own.
        class_names: names of the classes in the order of the logits.
        start: what its weights are at first: None (random), pretrained (timm's, from the hub) or
            the path of a file, see `smi_fed.weights.load_weights`. It never leaves this process.

    Raises:
        SettingError: a field that cannot be right, naming it.
    """

    name: Annotated[FilledText, Allowed("a timm model name")]
    num_classes: Count
    image_size: Annotated[Count | None, Allowed("an int >= 1 or null")] = None
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    mean: Annotated[Annotated[tuple[Number, ...], FEW] | None, CHANNELS] = None
    std: Annotated[Annotated[tuple[Positive, ...], FEW] | None, CHANNELS] = None
    class_names: Annotated[tuple[ClassName, ...] | None, Allowed("a list of names")] = None
    start: Annotated[FilledText | None, BeforeValidator(_path_text), Allowed(START)] = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "kwargs", {key: _one_form(value) for key, value in self.kwargs.items()})
        good = self.class_names is None or len(self.class_names) == self.num_classes
        require(good, "class_names", self.class_names, f"{self.num_classes} names")
        twice = [key for key in ("pretrained", "checkpoint_path") if self.kwargs.get(key)] if self.start else []
        require(not twice, "start", self.start, f"null, where kwargs has {' and '.join(twice)}")

    def to_json(self) -> str:
        """The spec as JSON with a schema version, without its start."""
        known = {key: value for key, value in asdict(self).items() if key != "start"}
        return json.dumps({"schema": SCHEMA_VERSION, **known})

    @classmethod
    def from_json(cls, text: str) -> ModelSpec:
        """Read `to_json`'s text.

        Raises:
            SettingError: not JSON, an unknown schema version (both are named) or a bad field.
        """
        try:
            fields = json.loads(text)
        except (TypeError, ValueError, RecursionError) as error:
            raise SettingError("spec", text, "JSON text of a model spec") from error
        require(isinstance(fields, dict), "spec", fields, "a JSON object")
        schema = fields.pop("schema", None)
        require(schema == SCHEMA_VERSION, "spec.schema", schema, f"version {SCHEMA_VERSION}")
        require("start" not in fields, "spec.start", fields.get("start"), "nothing: weights are sent, not named")
        try:
            spec = read(cls, fields)
        except SettingError as error:
            raise error.under("spec") from error
        require(":" not in spec.name, "spec.name", spec.name, "a model; a hub or a directory is not looked into")
        return spec


def _one_form(value: Any) -> Any:
    """The same argument, whether it came from JSON, YAML or Python."""
    return tuple(value) if isinstance(value, list) else _path_text(value)
