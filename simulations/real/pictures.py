"""Real pictures in 9 classes and four artists' styles: the emoji of four public packages.

A quarter of the emoji of each class is held out for test, the same ones in every style: a test
picture shows something that no client has seen in any style.
"""

from __future__ import annotations

import hashlib
import io
import json
import random
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from simulations.real.packages import MakingError, Package
from smi_fed.files import replacing

PACKAGES = {
    "google": Package(
        "npm", "emoji-datasource-google", "16.0.0", "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438"
    ),
    "twitter": Package(
        "npm", "emoji-datasource-twitter", "16.0.0", "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877"
    ),
    "openmoji": Package(
        "npm", "openmoji", "17.0.0", "55ee7d13485dec86e9f38c1f3a645a13382d33ff97c0cd845ee824b0aef45e68"),
    "fluent": Package(
        "npm", "@lobehub/fluent-emoji-3d", "1.1.0", "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58"
    ),
}  # fmt: skip
NEEDED = {
    "google": ("package/img/google/64/", "package/emoji.json"), "twitter": ("package/img/twitter/64/",),
    "openmoji": ("package/color/svg/",), "fluent": ("package/assets/",),
}  # fmt: skip
"""What is taken out of each package."""
CLASSES = {
    "People & Body": "people", "Flags": "flags", "Objects": "objects", "Symbols": "symbols",
    "Travel & Places": "travel", "Smileys & Emotion": "smileys", "Animals & Nature": "animals",
    "Food & Drink": "food", "Activities": "activities",
}  # fmt: skip
HELD_OUT = 4
"""One emoji of so many is for test."""
SIZE, QUALITY = 112, 90

Emoji = Mapping[str, Any]


def require_cairo() -> None:
    """Refuse early what only OpenMoji's SVG files would need later.

    Raises:
        MakingError: saying what is missing.
    """
    try:
        import cairosvg  # type: ignore[import-not-found]  # noqa: F401
    except ImportError as error:
        raise MakingError("got no package cairosvg; it is in the extra `real`: pip install 'smi-fed[real]'") from error
    except OSError as error:
        remedy = "Debian and Ubuntu: apt-get install libcairo2; macOS: brew install cairo"
        raise MakingError(f"got no system library libcairo2, which draws SVG pictures; {remedy}") from error


def unpack(file: Path, style: str, into: Path) -> Path:
    """Take what is needed out of a style's package; returns where it lies."""
    with tarfile.open(file) as archive:
        members = [member for member in archive if member.name.startswith(NEEDED[style])]
        archive.extractall(into, members=members, filter="data")
    return into / "package"


def in_order(emoji: list[Emoji]) -> Iterator[tuple[Emoji, str, str]]:
    """Each emoji of the 9 classes with its class and its split, train or test; always the same."""
    shuffler = random.Random(0)
    for category, name in sorted(CLASSES.items(), key=lambda pair: pair[1]):
        members = sorted((each for each in emoji if each["category"] == category), key=lambda each: each["unified"])
        shuffler.shuffle(members)
        held = len(members) // HELD_OUT
        yield from ((each, name, "test" if place < held else "train") for place, each in enumerate(members))


def picture(root: Path, style: str, emoji: Emoji) -> Image.Image | None:
    """One emoji as this style draws it; None where it does not."""
    if style in ("google", "twitter"):
        path = root / "img" / style / "64" / emoji["image"]
        return Image.open(path) if emoji[f"has_img_{style}"] and path.exists() else None
    code = emoji["unified"]
    for each in (code, code.replace("-FE0F", "")):  # some files leave the variation selector out
        if style == "fluent" and (path := root / "assets" / f"{each.lower()}.webp").exists():
            return Image.open(path)
        if style == "openmoji" and (path := root / "color" / "svg" / f"{each}.svg").exists():
            import cairosvg  # type: ignore[import-not-found]

            drawn: Any = cairosvg.svg2png(url=str(path), output_width=SIZE, output_height=SIZE)
            return Image.open(io.BytesIO(drawn))
    return None


def on_white(image: Image.Image) -> Image.Image:
    """The picture in colour at `SIZE`, with white where it is transparent."""
    image = image.convert("RGBA").resize((SIZE, SIZE), Image.Resampling.LANCZOS)
    white = Image.new("RGBA", (SIZE, SIZE), "white")
    white.alpha_composite(image)
    return white.convert("RGB")


def draw(roots: Mapping[str, Path], out: Path) -> dict[str, dict[str, Any]]:
    """Write OUT/STYLE/{train,test}/CLASS/CODE.webp; of each style how many, and the sha256 of all pixels."""
    emoji = json.loads((roots["google"] / "emoji.json").read_text(encoding="utf-8"))
    made: dict[str, dict[str, Any]] = {}
    for style, root in roots.items():
        counts, digest = {"train": 0, "test": 0}, hashlib.sha256()
        for each, name, split in in_order(emoji):
            drawn = picture(root, style, each)
            if drawn is None:
                continue
            image = on_white(drawn)
            path = out / style / split / name / f"{each['unified'].lower()}.webp"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path, quality=QUALITY)
            digest.update(path.name.encode() + image.tobytes())
            counts[split] += 1
        made[style] = {**counts, "sha256": digest.hexdigest()}
    return made


def list_all(directory: Path) -> None:
    """Write DIRECTORY/all.csv: the path, class and split of every style's pictures, for owners who share them."""
    paths = sorted(path.relative_to(directory) for path in directory.glob("*/*/*/*.webp"))
    rows = [f"{path.as_posix()},{path.parts[2]},{path.parts[1]}\n" for path in paths]
    with replacing(directory / "all.csv") as part:
        part.write_text("path,label,split\n" + "".join(rows), encoding="utf-8")
