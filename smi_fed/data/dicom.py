"""DICOM files as PIL images, by pydicom (`pip install smi-fed[dicom]`)."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from smi_fed.files import FileFormatError


def dicom_image(path: str, pixels: bool = True) -> Image.Image:
    """The first frame: RGB as it is, or grey as float in [0, 1].

    Grey values go through the file's own rescaling and window. Without a window white is the
    largest value that the file's bits can hold.

    Args:
        pixels: without them an empty image of the same size, for a look at the header.

    Raises:
        FileFormatError: pydicom is not installed, or the file has neither grey values nor colours.
    """
    try:
        from pydicom import dcmread
        from pydicom.pixels import apply_modality_lut, apply_windowing, convert_color_space
    except ImportError as error:
        raise FileFormatError(f"{path}: DICOM is read by pydicom, pip install 'smi-fed[dicom]'") from error
    file: Any = dcmread(path, stop_before_pixels=not pixels)
    kind = str(file.PhotometricInterpretation)
    if not pixels:
        return Image.new("L", (int(file.Columns), int(file.Rows)))
    values = file.pixel_array
    values = values[0] if int(file.get("NumberOfFrames", 1)) > 1 else values
    if int(file.SamplesPerPixel) == 3:
        return Image.fromarray(values if kind == "RGB" else convert_color_space(values, kind, "RGB"))
    if kind not in ("MONOCHROME1", "MONOCHROME2"):
        raise FileFormatError(f"{path}: its pixels are {kind}, allowed: MONOCHROME1 | MONOCHROME2 | colours")
    grey = apply_windowing(apply_modality_lut(values, file), file)
    low, high = _ends(file)
    shares = ((grey.astype(np.float64) - low) / (high - low)).clip(0, 1)
    return Image.fromarray((1 - shares if kind == "MONOCHROME1" else shares).astype(np.float32))


def _ends(file: Any) -> tuple[float, float]:
    """What pydicom maps the window's ends to: the range of the bits, after the file's rescaling."""
    if file.get("ModalityLUTSequence"):
        return 0.0, 2.0 ** int(file.ModalityLUTSequence[0].LUTDescriptor[2]) - 1
    bits = int(file.BitsStored)
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if file.PixelRepresentation else (0, 2**bits - 1)
    slope, intercept = float(file.get("RescaleSlope", 1)), float(file.get("RescaleIntercept", 0))
    return low * slope + intercept, high * slope + intercept
