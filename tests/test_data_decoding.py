"""What a picture's numbers become: every mode of PIL, orientation, transparency."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageOps

from smi_fed.data import DataConfig
from smi_fed.data.decoding import read_image, to_tensor
from smi_fed.files import FileFormatError

SIZE = 8
COLOUR, GREY = (200, 100, 50), (200 * 299 + 100 * 587 + 50 * 114) / 1000


def config(channels=3, **changes):
    return DataConfig(source="folder", name="x", image_size=SIZE, channels=channels, **changes)


def saved(image, kind, **options):
    """The image as it comes back from a file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return Image.open(io.BytesIO(buffer.getvalue()))


def rgb():
    return Image.new("RGB", (5, 6), COLOUR)


def lab():
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    return ImageCms.profileToProfile(rgb(), *profiles, outputMode="LAB")


EIGHT_BITS = {
    "RGB": rgb, "RGBA": lambda: rgb().convert("RGBA"), "RGBX": lambda: rgb().convert("RGBX"),
    "RGBa": lambda: rgb().convert("RGBA").convert("RGBa"), "CMYK": lambda: rgb().convert("CMYK"),
    "YCbCr": lambda: rgb().convert("YCbCr"), "HSV": lambda: rgb().convert("HSV"), "LAB": lab,
    "P": lambda: rgb().convert("P", palette=Image.Palette.ADAPTIVE),
    "PA": lambda: rgb().convert("P", palette=Image.Palette.ADAPTIVE).convert("PA"),
}  # fmt: skip


@pytest.mark.parametrize("mode", EIGHT_BITS)
@pytest.mark.parametrize("channels", [1, 3])
def test_colour_in_every_mode(mode, channels):
    image = EIGHT_BITS[mode]()
    assert image.mode == mode
    found = to_tensor(image, config(channels))
    assert (found.shape, found.dtype) == ((channels, SIZE, SIZE), torch.float32)
    expected = torch.tensor(COLOUR if channels == 3 else [GREY]) / 255
    torch.testing.assert_close(found.mean((1, 2)), expected, atol=2.5 / 255, rtol=0)


@pytest.mark.parametrize(
    ("image", "value"),
    [
        (Image.new("1", (4, 4), 1), 1.0), (Image.new("1", (4, 4), 0), 0.0), (Image.new("L", (4, 4), 51), 0.2),
        (Image.new("LA", (4, 4), (51, 255)), 0.2), (Image.new("LA", (4, 4), (51, 255)).convert("La"), 0.2),
        (Image.new("I", (4, 4), 16384), 16384 / 65535), (Image.new("F", (4, 4), 0.3), 0.3),
        (Image.new("I;16", (4, 4), 16384), 16384 / 65535), (Image.new("I;16B", (4, 4), 16384), 16384 / 65535),
        (Image.new("I;16", (4, 4), 65535), 1.0), (Image.new("I;16", (4, 4), 255), 255 / 65535),
    ],
)  # fmt: skip
@pytest.mark.parametrize("channels", [1, 3])
def test_grey_in_every_mode(image, value, channels):
    torch.testing.assert_close(to_tensor(image, config(channels)), torch.full((channels, SIZE, SIZE), value))


RAMP = np.arange(64).reshape(8, 8)


@pytest.mark.parametrize(
    ("kind", "order"),
    [("PNG", "<u2"), ("PNG", ">u2"), ("TIFF", "<u2"), ("TIFF", ">u2"), ("PPM", "<u2"), ("JPEG2000", "<u2")],
)
def test_sixteen_bits_keep_their_values(kind, order):
    values = (RAMP * 1000 + 384).astype(order)
    found = to_tensor(saved(Image.fromarray(values), kind), config(1))
    torch.testing.assert_close(found[0], torch.tensor(values.astype(np.float32)) / 65535)
    assert float(found[0, 2, 0]) == pytest.approx(16384 / 65535)


def png_of_sixteen_bits(kind, pixel):
    """PIL writes 16 bits in grey alone."""
    rows = (b"\0" + struct.pack(f">{len(pixel)}H", *pixel) * 8) * 8

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 8, 8, 16, kind, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return Image.open(io.BytesIO(b"\x89PNG\r\n\x1a\n" + body))


@pytest.mark.parametrize(("kind", "alpha"), [(2, ()), (6, (65535,)), (4, (65535,))])
def test_sixteen_bits_of_colour_are_read_as_eight(kind, alpha):
    pixel = (16384, 32768, 65535) if kind != 4 else (16384,)
    found = to_tensor(png_of_sixteen_bits(kind, (*pixel, *alpha)), config())
    expected = (torch.tensor(pixel) / 65535).expand(3)
    torch.testing.assert_close(found.mean((1, 2)), expected, atol=1 / 255, rtol=0)


def test_float_and_int_tiff_keep_their_values():
    for values, white in ((RAMP.astype(np.float32) / 63, 1), (RAMP.astype(np.int32) * 1000, 65535)):
        found = to_tensor(saved(Image.fromarray(values), "TIFF"), config())
        torch.testing.assert_close(found, torch.tensor(values / white, dtype=torch.float32).expand(3, -1, -1))


def test_twelve_bits_of_a_microscope():
    """PIL hands these out as sixteen bits up to 4095."""
    pairs = bytes((1024 >> 4, (1024 & 15) << 4 | 4095 >> 8, 4095 & 255)) * 32
    tags = {256: 8, 257: 8, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: 8, 279: len(pairs)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    end = struct.pack("<H", len(tags)) + entries + bytes(4)
    file = b"II*\0" + struct.pack("<I", 8 + len(pairs)) + pairs + end
    found = to_tensor(Image.open(io.BytesIO(file)), config(1))
    torch.testing.assert_close(found[0], torch.tensor([1024 / 4095, 1.0]).repeat(8, 4))


@pytest.mark.parametrize(
    ("dtype", "low", "high"),
    [
        (np.float32, -1, 1), (np.float32, 0, 255), (np.float32, 0, float("nan")), (np.float32, 0, float("inf")),
        (np.int32, -1, 1), (np.int32, 0, 65536), (np.int32, 0, 2**31 - 1),
    ],
)  # fmt: skip
def test_values_out_of_range_are_refused_by_name(tmp_path, dtype, low, high):
    Image.fromarray(np.array([[low, high]] * 2, dtype)).save(tmp_path / "scan.tiff")
    with pytest.raises(
        FileFormatError, match=r"scan.tiff: values from .* to .*, allowed in mode [IF]: 0 to (1|65535);"
    ):
        read_image(tmp_path / "scan.tiff", config())


def test_rounding_is_no_fault():
    found = to_tensor(Image.fromarray(np.array([[-1e-7, 1 + 2e-7]] * 2, np.float32)), config(1))
    assert (float(found.min()), float(found.max())) == (0, 1)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    ("mode", "kind"), [("RGB", "JPEG"), ("RGB", "PNG"), ("RGB", "TIFF"), ("I;16", "PNG"), ("I;16", "TIFF")]
)
def test_every_orientation_is_applied(orientation, mode, kind):
    """A corner of its own brightness goes where a camera's viewer shows it."""
    turns = {1: (0, 0), 2: (0, 1), 3: (1, 1), 4: (1, 0), 5: (0, 0), 6: (0, 1), 7: (1, 1), 8: (1, 0)}
    values = np.zeros((16, 32), np.uint16)
    values[:8, :8] = 255
    stored = (
        Image.fromarray(values * 257) if mode == "I;16" else Image.fromarray(values.astype(np.uint8)).convert("RGB")
    )
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = to_tensor(saved(stored, kind, exif=exif), config(1))[0]
    corners = found[::7, ::7]
    assert divmod(int(corners.argmax()), 2) == turns[orientation]
    assert float(corners.max()) > 0.9
    wide = float(found[0 if turns[orientation][0] == 0 else 7].sum())  # along the longer side it covers a quarter
    high = float(found[:, 0 if turns[orientation][1] == 0 else 7].sum())
    assert (wide < high) == (orientation < 5)


def test_orientation_is_not_applied_twice():
    exif = Image.Exif()
    exif[0x0112] = 6
    image = saved(Image.effect_noise((8, 8), 90), "PNG", exif=exif)
    upright = ImageOps.exif_transpose(image)
    assert torch.equal(to_tensor(image, config(1)), to_tensor(upright, config(1)))


RED = (255, 0, 0)


def palette():
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 255, 0, *RED, 0, 0, 255])
    return image


CLEAR = {
    "RGBA": lambda: Image.new("RGBA", (4, 4), (*RED, 0)),
    "LA": lambda: Image.new("LA", (4, 4), (90, 0)),
    "RGBa": lambda: Image.new("RGBA", (4, 4), (*RED, 0)).convert("RGBa"),
    "La": lambda: Image.new("LA", (4, 4), (90, 0)).convert("La"),
    "RGB": lambda: saved(Image.new("RGB", (4, 4), RED), "PNG", transparency=RED),
    "L": lambda: saved(Image.new("L", (4, 4), 9), "PNG", transparency=9),
    "1": lambda: saved(Image.new("1", (4, 4), 1), "PNG", transparency=1),
    "I;16": lambda: saved(Image.fromarray(np.full((4, 4), 500, np.uint16)), "PNG", transparency=500),
    "P": lambda: saved(palette(), "PNG", transparency=1),
    "P, bytes": lambda: saved(palette(), "PNG", transparency=b"\xff\x00\xff"),
    "P, GIF": lambda: saved(palette(), "GIF", transparency=1),
    "RGBA, WebP": lambda: saved(Image.new("RGBA", (4, 4), (*RED, 0)), "WEBP", lossless=True),
    "RGBA, TIFF": lambda: saved(Image.new("RGBA", (4, 4), (*RED, 0)), "TIFF"),
}


@pytest.mark.parametrize("background", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", CLEAR)
def test_transparency_is_put_on_the_background(kind, background, channels):
    image = CLEAR[kind]()
    assert image.mode == kind.partition(",")[0]
    found = to_tensor(image, config(channels, background=background))
    torch.testing.assert_close(found, torch.full((channels, SIZE, SIZE), background))


def test_half_transparent_is_half_of_each_and_opaque_is_left_alone():
    half = to_tensor(Image.new("RGBA", (4, 4), (255, 0, 102, 51)), config(background=0.5))
    torch.testing.assert_close(half.mean((1, 2)), torch.tensor([0.2 + 0.4, 0.4, 0.08 + 0.4]))
    solid = to_tensor(saved(Image.new("RGB", (4, 4), (255, 0, 0)), "PNG", transparency=(0, 255, 0)), config())
    torch.testing.assert_close(solid.mean((1, 2)), torch.tensor([1.0, 0.0, 0.0]))
    grey = to_tensor(Image.new("RGBA", (4, 4), (*COLOUR, 51)), config(1, background=1.0))
    torch.testing.assert_close(grey, torch.full((1, 8, 8), 0.2 * GREY / 255 + 0.8), atol=0.002, rtol=0)


def test_the_default_background_is_white():
    assert float(to_tensor(Image.new("RGBA", (4, 4), (0, 0, 0, 0)), config()).min()) == 1


def test_what_shows_through_does_not_bleed_over_the_edge():
    """Colour under transparent pixels is nobody's: it must not reach the others when the image gets smaller."""
    values = np.zeros((32, 32, 4), np.uint8)
    values[:, :, 1] = 255  # green everywhere, seen in the left half only
    values[:, :16, 3] = 255
    values[:, 16:, :3] = (255, 0, 255)
    found = to_tensor(Image.fromarray(values), config(background=0.0))
    assert float(found[0].max()) == float(found[2].max()) == 0


def test_an_animation_is_its_first_frame():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    for kind in ("GIF", "TIFF"):
        found = to_tensor(saved(frames[0], kind, save_all=True, append_images=frames[1:]), config())
        torch.testing.assert_close(found.mean((1, 2)), torch.tensor([1.0, 0.0, 0.0]), atol=0.02, rtol=0)


def test_an_image_too_large_to_open_is_named(tmp_path, monkeypatch):
    Image.new("L", (64, 64)).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(FileFormatError, match="large.png: not a readable image .DecompressionBombError"):
        read_image(tmp_path / "large.png", config())


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone.png"):
        read_image(tmp_path / "gone.png", config())
