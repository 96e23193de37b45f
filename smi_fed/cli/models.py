"""Models as a command line names them."""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace
from pathlib import Path

import timm
from torch import nn

from smi_fed.checks import SettingError, read, require
from smi_fed.files import format_of, read_json
from smi_fed.models import Classifier, ModelSpec, adapt, build_seeded
from smi_fed.quantization import FORMAT as QUANTIZED
from smi_fed.quantization import load_quantized
from smi_fed.report import load_student

FORMS = "a name of timm, a file of a student (quantized or not), a .json of a model spec, or module:function"


def open_model(
    name: str,
    weights: str = "pretrained",
    num_classes: int | None = None,
    image_size: int | None = None,
    seed: int = 0,
) -> Classifier:
    """A model in evaluation mode.

    Args:
        name: of timm's; the path of a student or of a quantized model that was written here; of a JSON file
            with the fields of a `ModelSpec`; or `module:function`, where the function gives a module and is called
            with nothing. Modules are looked for in the working directory too.
        weights: pretrained (timm's, from the hub), random, or a file of weights; for a name or a spec.
        num_classes: of a name; None is that of the pretrained weights. Of a function's module where it does not tell.
        image_size: in pixels; None is the model's own.
        seed: of what is left random, such as a head that no file has.

    Raises:
        SettingError, FileFormatError: naming what cannot be.
    """
    if Path(name).is_file() and Path(name).suffix != ".json":
        return load_quantized(name) if format_of(name) == QUANTIZED else load_student(name)
    if ":" in name and not Path(name).exists():
        return _called(name, num_classes, image_size)
    spec = _spec_of_file(name) if name.endswith(".json") else _spec_of_name(name, num_classes, image_size)
    start = {"random": None}.get(weights, weights)
    return build_seeded(spec if spec.start else replace(spec, start=start), seed).eval()


def _spec_of_file(name: str) -> ModelSpec:
    fields = read_json(name)
    require(isinstance(fields, dict), "model", name, "a JSON object with the fields of a ModelSpec")
    fields.pop("schema", None)
    return read(ModelSpec, fields)


def _spec_of_name(name: str, num_classes: int | None, image_size: int | None) -> ModelSpec:
    require(timm.is_model(name.split(".", maxsplit=1)[0]), "model", name, FORMS)
    known = timm.get_pretrained_cfg(name)
    classes = num_classes or (known.num_classes if known is not None else 0)
    require(bool(classes), "num_classes", num_classes, "an int >= 1: this name's pretrained weights have no classes")
    return ModelSpec(name, num_classes=classes, image_size=image_size)


def _called(name: str, num_classes: int | None, image_size: int | None) -> Classifier:
    place, _, function = name.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        made = getattr(importlib.import_module(place), function)()
    except (ImportError, AttributeError) as error:
        raise SettingError("model", name, f"{FORMS} ({error})") from error
    finally:
        sys.path.pop(0)
    require(isinstance(made, nn.Module), "model", f"{name}, which gave {type(made).__name__}", "a torch module")
    if isinstance(made, Classifier):
        return made.eval()
    size = image_size or getattr(made, "pretrained_cfg", {}).get("input_size", (0, 0, 0))[1]
    classes = num_classes or getattr(made, "num_classes", 0)
    told = bool(size and classes)
    require(told, "model", name, "a module that tells its classes and size, or --num-classes and --image-size")
    return adapt(made, image_size=size, num_classes=classes).eval()
