"""Models as a command line names them."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
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
    weights: str = "",
    num_classes: int | None = None,
    image_size: int | None = None,
    seed: int = 0,
    otherwise: str = "pretrained",
) -> Classifier:
    """A model in evaluation mode.

    Args:
        name: of timm's; the path of a student or of a quantized model that was written here; of a JSON file
            with the fields of a `ModelSpec`; or `module:function`, where the function gives a module and is called
            with nothing. Modules are looked for in the working directory too.
        weights: pretrained (timm's, from the hub), random, or a file of weights; for a name, or a spec without a start.
        num_classes: of a name; None is that of the pretrained weights. Of a function's module where it does not tell.
        image_size: in pixels; None is the model's own.
        seed: of what is left random, such as a head that no file has.
        otherwise: the weights where none are named.

    Raises:
        SettingError, FileFormatError: naming what cannot be.
    """
    asked = {"--weights": weights, "--num-classes": num_classes, "--image-size": image_size}
    if Path(name).is_file() and Path(name).suffix != ".json":
        _refuse(asked, "the file says it")
        return load_quantized(name) if format_of(name) == QUANTIZED else load_student(name)
    if ":" in name and not Path(name).exists():
        _refuse({"--weights": weights}, "the function does it")
        return _called(name, num_classes, image_size)
    if name.endswith(".json"):
        _refuse(asked | {"--weights": ""}, "the spec says it")
        spec = _spec_of_file(name)
        _refuse({"--weights": weights if spec.start else ""}, "the spec's start says it")
    else:
        spec = _spec_of_name(name, num_classes, image_size)
    named = weights or otherwise
    return build_seeded(spec if spec.start else replace(spec, start={"random": None}.get(named, named)), seed).eval()


def _refuse(asked: Mapping[str, object], why: str) -> None:
    """Nothing that is asked for is left aside in silence."""
    for option, value in asked.items():
        require(not value, option, value, f"nothing: {why}")


def _spec_of_file(name: str) -> ModelSpec:
    fields = read_json(name)
    require(isinstance(fields, dict), "model", name, "a JSON object with the fields of a ModelSpec")
    fields.pop("schema", None)
    return read(ModelSpec, fields)


def _spec_of_name(name: str, num_classes: int | None, image_size: int | None) -> ModelSpec:
    require(timm.is_model(name.split(".", maxsplit=1)[0]), "model", name, FORMS)
    try:
        known = timm.get_pretrained_cfg(name)
    except RuntimeError as error:  # no such weights of a model that there is
        raise SettingError("model", name, f"{FORMS} ({error})") from error
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
