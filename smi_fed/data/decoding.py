"""Image files as tensors: the values, the orientation and the transparency that they have."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

from smi_fed.data.config import DataConfig
from smi_fed.files import FileFormatError

DEEP = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")
"""PIL's modes with more than eight bits a pixel; all of them are grey."""

ROUNDING = 1e-6
"""Float images may leave [0, 1] by this much."""

DICOM = (".dcm", ".dicom")

BITS_PER_SAMPLE = 258
"""TIFF's tag; PIL hands out twelve bits as sixteen without scaling them."""


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Turn whatever a decoder raises for a broken image into an error that says which image it was."""
    try:
        yield
    except (FileFormatError, FileNotFoundError, PermissionError, MemoryError):
        raise
    except Exception as error:  # decoders raise a dozen kinds, down to struct.error
        reason = f"{type(error).__name__}: {error}"
        raise FileFormatError(f"{name}: not a readable image ({reason}); replace it or remove it") from error


def read_image(path: str | os.PathLike[str], config: DataConfig) -> Tensor:
    """The image at `path`, see `to_tensor`.

    Raises:
        FileFormatError: naming a file that is broken, no image or out of range.
    """
    return finished(read_pixels(path, config), config)


def read_pixels(path: str | os.PathLike[str], config: DataConfig) -> Tensor:
    """What the file at `path` holds, see `to_pixels`; raises as `read_image`."""
    name = os.fspath(path)
    with naming(name), opened(name) as image:
        return to_pixels(image, config, name)


def check_header(path: str | os.PathLike[str]) -> None:
    """Read as much of a file as tells that it is an image, and no pixels.

    Raises:
        FileFormatError: naming a file that is no image.
        FileNotFoundError: naming it.
    """
    with naming(os.fspath(path)), opened(os.fspath(path), pixels=False):
        pass


def opened(path: str, pixels: bool = True) -> Image.Image:
    """The file as a PIL image, DICOM too; without `pixels` they may be missing."""
    if Path(path).suffix.lower() in DICOM:
        from smi_fed.data.dicom import dicom_image

        return dicom_image(path, pixels)
    return Image.open(path)


def to_tensor(image: Image.Image, config: DataConfig, name: str = "image") -> Tensor:
    """A PIL image as float32 (c, h, w) in [0, 1] of the configured size and channels.

    White is 255, 65535 for 16-bit and int32 images, and 1 for float images. An orientation
    in EXIF is applied, transparency is put on `config.background`. Of an animation it is the
    first frame.

    Args:
        name: of the image, for messages.

    Raises:
        FileFormatError: values outside of that range.
    """
    return finished(to_pixels(image, config, name), config)


def to_pixels(image: Image.Image, config: DataConfig, name: str = "image") -> Tensor:
    """An upright PIL image at its own size, in as few bytes as hold it exactly.

    Returns:
        uint8 (c, h, w), one channel more where it has transparency; float32 (1, h, w) in
        [0, 1] of an image with more than eight bits. `finished` makes the image of it.

    Raises:
        FileFormatError: as `to_tensor`.
    """
    white = _white(image)
    upright = ImageOps.exif_transpose(image)
    if upright.mode in DEEP:
        return _deep(upright, white, config.background, name)
    return _eight_bits(upright, config.channels == 1)


def finished(pixels: Tensor, config: DataConfig) -> Tensor:
    """What `to_pixels` gave as float32 (c, h, w) in [0, 1] of the configured size and channels."""
    if pixels.dtype == torch.uint8:
        pixels = pixels.float() / 255
        if len(pixels) in (2, 4):
            colours, alpha = pixels[:-1], pixels[-1:]
            pixels = colours * alpha + config.background * (1 - alpha)
    size = (config.image_size, config.image_size)
    resized = F.interpolate(pixels[None], size, mode="bilinear", antialias=True, align_corners=False)[0].clamp(0, 1)
    return resized.expand(config.channels, -1, -1).contiguous()


def resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Images (b, c, h, w) at `size`, bilinear with antialiasing; those of that size as they are."""
    if tuple(images.shape[2:]) == tuple(size):
        return images
    return F.interpolate(images, size, mode="bilinear", align_corners=False, antialias=True)


def _white(image: Image.Image) -> float:
    if image.mode == "F":
        return 1.0
    bits = getattr(image, "tag_v2", {}).get(BITS_PER_SAMPLE, (16,))[0]
    return float(2 ** min(bits, 16) - 1)


def _deep(image: Image.Image, white: float, background: float, name: str) -> Tensor:
    """(1, h, w) of grey values that eight bits do not hold."""
    stored = np.array(image).astype(np.float64)
    values = stored / white
    if not ((values >= -ROUNDING) & (values <= 1 + ROUNDING)).all():  # NaN is neither
        found = f"values from {stored.min():g} to {stored.max():g}"
        raise FileFormatError(f"{name}: {found}, allowed in mode {image.mode}: 0 to {white:g}; scale them before")
    transparent: Any = image.info.get("transparency")
    if isinstance(transparent, int):
        values[stored == transparent] = background
    return torch.from_numpy(values).float()[None]


def _eight_bits(image: Image.Image, grey: bool) -> Tensor:
    """uint8 (1 or 3, h, w) of all other modes, and one channel more where they are transparent."""
    from torchvision.transforms.functional import pil_to_tensor

    if image.mode == "LAB":
        image = _from_lab(image)
    elif image.mode == "La":  # multiplied by its alpha; PIL knows one way out
        image = image.convert("LA")
    if not image.has_transparency_data:
        return pil_to_tensor(image.convert("L" if grey else "RGB"))
    return pil_to_tensor(image.convert("RGBA").convert("LA" if grey else "RGBA"))


def _from_lab(image: Image.Image) -> Image.Image:
    from PIL import ImageCms

    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    converted = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
    assert converted is not None
    return converted
