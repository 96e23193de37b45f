"""What `smi_fed.report_page` draws: images of the clients' models beside real ones, and lines."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from smi_fed.alignment import align_targets, kept_pixels
from smi_fed.data import ImageSet
from smi_fed.report import one_per_class
from smi_fed.sparse_images import SparseImages

PICTURED, COLUMNS, SIDE, SMALL = 16, 12, 96, 64
"""Most clients and images of each; most pixels of a side, and up to how many none is lost."""


def pictures(report: Mapping[str, Any], directory: Path, real: ImageSet | None = None) -> list[dict[str, Any]]:
    """Of each client's images, of the first 16 clients, as many classes as fit: whole, kept patches alone, real ones.

    Args:
        directory: of the images that the report names.
        real: shown where a class has the same name.

    Raises:
        FileNotFoundError, FileFormatError: images are not there or damaged.
    """
    told = [client for client in report.get("clients", ()) if client.get("images")]
    return [_of_client(client, report["classes"], directory, real) for client in told[:PICTURED]]


def _of_client(
    client: Mapping[str, Any], class_names: Sequence[str], directory: Path, real: ImageSet | None
) -> dict[str, Any]:
    found = SparseImages.load(directory / Path(client["images"]["file"]).name)
    shown = one_per_class(align_targets(found, client["images"]["classes"]), COLUMNS)
    single = shown.targets.ndim == 1
    labels = [str(class_names[label]) for label in shown.targets.tolist()] if single else [""] * len(shown)
    masks = kept_pixels(shown.mask, shown.patch_size)[:, 0]
    beside = [] if real is None else _real(labels, real)
    return {
        "name": client["name"], "kept": found.kept_fraction, "labels": labels,
        "rows": {
            "synthetic": [_drawn(*each) for each in zip(shown.images, labels, strict=True)],
            "kept patches": [_drawn(*each) for each in zip(shown.images, labels, masks, strict=True)],
            **({"real": beside} if any(beside) else {}),
        },
    }  # fmt: skip


def _real(labels: Sequence[str], real: ImageSet) -> list[dict[str, str] | None]:
    """For each label an image of the class of that name, another one each time; None where there is none."""
    rows = {name: iter((real.labels == place).nonzero()[:, 0].tolist()) for place, name in enumerate(real.class_names)}
    chosen = [next(rows.get(label, iter(())), None) for label in labels]
    return [None if row is None else _drawn(real.images[[row]][0], labels[at]) for at, row in enumerate(chosen)]


def _drawn(image: Tensor, alt: str, mask: Tensor | None = None) -> dict[str, str]:
    """An image (c, h, w) in [0, 1] as the page shows it; transparent where `mask` (h, w) is 0."""
    colour = image.expand(3, -1, -1) if len(image) == 1 else image[:3]
    picture = Image.fromarray((colour * 255).round().byte().permute(1, 2, 0).contiguous().numpy())
    if mask is not None:
        picture.putalpha(Image.fromarray((mask * 255).byte().numpy()))
    picture.thumbnail((SIDE, SIDE))
    small, file = max(picture.size) <= SMALL, io.BytesIO()
    picture.save(file, "WEBP", lossless=small, quality=85)
    uri = f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"
    return {"uri": uri, "alt": alt, "kind": "small" * small + " kept" * (mask is not None)}


def chart(
    title: str, xlabel: str, lines: Mapping[tuple[str, str, str], Sequence[tuple[float, float]]], form: str,
    log: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """What the page draws of lines by (label, colour, dashes), each of at least one point (x, y); y > 0 where `log`."""
    from matplotlib.ticker import LogLocator, MaxNLocator

    left, right, top, bottom = 48, 464, 12, 188
    xs, ys = ([point[axis] for line in lines.values() for point in line] for axis in (0, 1))
    scale = math.log10 if log else float
    low, high, first, width = scale(min(ys)), scale(max(ys)), min(xs), (max(xs) - min(xs)) or 1
    space = 0.05 * (high - low) or 0.5
    low, high = low - space, high + space

    def across(x: float) -> float:
        return round(left + (x - first) / width * (right - left), 1)

    def down(y: float) -> float:
        return round(bottom - (scale(y) - low) / (high - low) * (bottom - top), 1)

    yticks = LogLocator(subs=(1, 2, 5)).tick_values(10**low, 10**high) if log else MaxNLocator(5).tick_values(low, high)
    xticks = MaxNLocator(6, integer=True).tick_values(first, first + width)
    return {
        "title": title, "xlabel": xlabel, "left": left, "right": right, "bottom": bottom,
        "lines": [
            {"label": f"{label}: {form % line[-1][1]}", "colour": colour, "dashes": dashes,
             "points": [(across(x), down(y)) for x, y in line]}
            for (label, colour, dashes), line in lines.items()
        ],
        "xticks": [(across(x), f"{x:g}") for x in xticks if first <= x <= first + width],
        "yticks": [(down(y), f"{y:g}") for y in yticks if (y > 0 or not log) and low <= scale(y) <= high],
    }  # fmt: skip
