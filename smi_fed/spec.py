"""What it takes to build a model again, without its weights."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from smi_fed.checks import SettingError, is_integer, is_number, require

SCHEMA_VERSION = 1


@dataclass(frozen=True)
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

    Raises:
        SettingError: a field that cannot be right, naming it.
    """

    name: str
    num_classes: int
    image_size: int | None = None
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    class_names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        require(isinstance(self.name, str) and bool(self.name), "name", self.name, "a timm model name")
        require(is_integer(self.num_classes) and self.num_classes > 0, "num_classes", self.num_classes, "an int >= 1")
        if self.image_size is not None:
            require(is_integer(self.image_size) and self.image_size > 0, "image_size", self.image_size, "an int >= 1")
        require(isinstance(self.kwargs, Mapping), "kwargs", self.kwargs, "a mapping")
        kwargs = {key: _one_form(value) for key, value in self.kwargs.items()}
        object.__setattr__(self, "kwargs", kwargs)
        for key in ("mean", "std"):
            self._freeze_floats(key)
        if self.class_names is not None:
            good = isinstance(self.class_names, list | tuple) and len(self.class_names) == self.num_classes
            require(good, "class_names", self.class_names, f"{self.num_classes} names")
            object.__setattr__(self, "class_names", tuple(str(name) for name in self.class_names))

    def _freeze_floats(self, key: str) -> None:
        value = getattr(self, key)
        if value is None:
            return
        good = isinstance(value, list | tuple) and len(value) > 0
        good = good and all(is_number(x) and (key == "mean" or x > 0) for x in value)
        require(good, key, value, "finite numbers, above 0 for std, one per channel")
        object.__setattr__(self, key, tuple(float(x) for x in value))

    def to_json(self) -> str:
        """The spec as JSON with a schema version."""
        return json.dumps({"schema": SCHEMA_VERSION, **asdict(self)})

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
        try:
            return cls(**fields)
        except SettingError as error:
            raise error.under("spec") from error
        except TypeError as error:
            raise SettingError("spec", sorted(fields), "the fields of ModelSpec") from error


def _one_form(value: Any) -> Any:
    """The same argument, whether it came from JSON, YAML or Python."""
    if isinstance(value, list):
        return tuple(value)
    return os.fspath(value) if isinstance(value, os.PathLike) else value
