"""`smi-fed quantize`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from smi_fed.checks import require
from smi_fed.cli.inverting import AsJson, Classes, Device, Model, Size, Weights
from smi_fed.cli.models import open_model
from smi_fed.cli.output import tell
from smi_fed.cli.teaching import measured, test_images, warn_of
from smi_fed.devices import choose_device
from smi_fed.files import writable_directory
from smi_fed.quantization import Bits, save_quantized
from smi_fed.quantization import quantize as quantized
from smi_fed.sparse_images import SparseImages


def quantize(
    model: Model,
    images: Annotated[list[Path] | None, typer.Option(help="a file that invert wrote; once for each")] = None,
    bits: Annotated[str, typer.Option(help="w8a8, w4a8, w4a4: widths of weights and of activations")] = "w8a8",
    output: Annotated[Path | None, typer.Option(help="where it goes; MODEL-BITS.safetensors by default")] = None,
    data: Annotated[str, typer.Option(help="as of evaluate: measures the model before and after")] = "",
    weights: Weights = "",
    num_classes: Classes = None,
    image_size: Size = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Quantize a model after its training, calibrated on synthetic images. Integers are simulated: nothing is faster.

    MODEL is as that of invert.

    Example: smi-fed quantize student.safetensors --images images.safetensors --bits w4a8 --data digits
    """
    require(bool(images), "--images", None, "a file that invert wrote, at least one")
    widths = Bits.parse(bits)
    where, _ = choose_device(device)
    opened = open_model(model, weights, num_classes, image_size).to(where)
    test = test_images(data, opened) if data else None
    path = output or Path(f"{Path(model.replace(':', '-')).stem}-{widths}.safetensors")
    writable_directory(path.absolute().parent)
    shown = torch.cat([SparseImages.load(each).images for each in images or []])
    made = quantized(opened, shown, widths)
    save_quantized(path, made)
    found: dict[str, object] = {"bits": str(widths), "calibrated_on": len(shown), "file": str(path)}
    if test is not None:
        before, after = (measured(each, test)["accuracy"] for each in (opened, made))
        warn_of(opened, before)
        found |= {"accuracy_before": before, "accuracy": after}
    tell(found, as_json)
