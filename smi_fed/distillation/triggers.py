"""Triggers of backdoors among synthetic images: what inversion finds in a backdoored model is often its trigger.

A piece of a synthetic image is put on the others' images, at its own place. If it drives a teacher to one class from
almost every image that the teacher knew, and most other teachers seldom, it is a trigger and no part of an object. Who
has seen little but one class is easily driven to it, from images that it did not know most of all. Why inversion finds
triggers, and another test for them (shuffled channels): Hong et al., ICML 2023 (ABD, arXiv 2306.02368).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from smi_fed.alignment import resize
from smi_fed.distillation.ensembles import answer
from smi_fed.lazy import one_by_one
from smi_fed.sparse_images import SparseImages, classes_of
from smi_fed.training import evaluating

PLACES, SIDE = 7, 4
"""A window is 1 / `SIDE` of an image high and wide; it stands at `PLACES` x `PLACES` places, each half of it apart."""
PER_CLASS = 4
"""Images of each class whose windows are tried."""
SCREENED, HOSTS, LEAST_HOSTS = 8, 256, 8
"""Images of others on which all windows are tried, and on which those that look like triggers are, of which a teacher
has to know so many."""
OTHERS = 0.25
"""Largest share of the images from which a trigger may drive the median teacher."""
TRIED = 3
"""Most windows of one teacher that all teachers are asked of."""
BATCH = 128


@dataclass(frozen=True, eq=False)
class Window:
    """A piece of a synthetic image.

    Attributes:
        pixels: (c, h, w).
        rows, columns: where it stands.
        target: the class that the image was made for.
        source: the teacher whose image it is.
        rate: share of the screened images that it drives that teacher to `target`.
    """

    pixels: Tensor
    rows: slice
    columns: slice
    target: int
    source: int
    rate: float

    def on(self, images: Tensor) -> Tensor:
        """Images (n, c, h, w) with it."""
        shown = images.clone()
        shown[:, :, self.rows, self.columns] = self.pixels
        return shown


@torch.no_grad()
def find_triggers(teachers: Sequence[nn.Module], images: Sequence[SparseImages], least: float) -> list[str]:
    """Of each teacher why it is thought to have a backdoor; empty where it is not.

    Args:
        teachers: with the student's classes; one is in memory at a time.
        images: some of each teacher's; targets are the student's classes.
        least: share of the others' images that a window has to drive to its class.
    """
    size = images[0].images.shape[2:]
    sets = [resize(each.images, (size[0], size[1])) for each in images]
    targets = [classes_of(each) for each in images]
    windows = list[Window]()
    for i in range(len(teachers)):
        screened, _ = _others(sets, targets, i, SCREENED)
        windows += suspects(teachers[i], i, sets[i], targets[i], screened, least)
    if not windows:
        return [""] * len(teachers)
    hosts = {source: _others(sets, targets, source, HOSTS) for source in {window.source for window in windows}}
    of_each = one_by_one(teachers, lambda teacher: driven(teacher, windows, hosts))
    rates = torch.tensor(of_each)  # (teachers, windows)
    typical = rates.nanquantile(0.5, dim=0, interpolation="higher")
    # Whoever frames another by its images is found with it: a window has to drive the teacher that it is of.
    sources = torch.tensor([window.source for window in windows])
    true = (rates >= least) & (typical <= OTHERS) & (rates.gather(0, sources[None]) >= least)
    return [_reason(row, own, typical, windows) for row, own in zip(true, rates, strict=True)]


def _reason(true: Tensor, rates: Tensor, typical: Tensor, windows: Sequence[Window]) -> str:
    if not bool(true.any()):
        return ""
    best = int(rates.masked_fill(~true, -1).argmax())
    window = windows[best]
    return (
        f"a piece of a synthetic image drives it to class {window.target} on {float(rates[best]):.0%} of the others' "
        f"images that it knew, and the median teacher on {float(typical[best]):.0%}, like a backdoor's trigger: left "
        "out of the ensemble"
    )


def _others(sets: Sequence[Tensor], targets: Sequence[Tensor], own: int, count: int) -> tuple[Tensor, Tensor]:
    """At most `count` images of all other teachers, taken from them in turn, and what they were made for."""
    turns = sorted((row, place) for place, each in enumerate(sets) for row in range(len(each)) if place != own)[:count]
    rows = [(sets[place][row], targets[place][row]) for row, place in turns]
    return torch.stack([image for image, _ in rows]), torch.stack([target for _, target in rows])


def places(height: int, width: int) -> list[tuple[slice, slice]]:
    """Rows and columns of all windows of an image."""
    parts = []
    for side in (height, width):
        length = max(1, side // SIDE)
        starts = torch.linspace(0, side - length, PLACES).round().long().unique().tolist()
        parts.append([slice(start, start + length) for start in starts])
    return list(itertools.product(*parts))


def suspects(
    teacher: nn.Module, number: int, images: Tensor, targets: Tensor, hosts: Tensor, least: float
) -> list[Window]:
    """The windows of a teacher's own images (n, c, h, w) that drive it most, if at least to `least` of the hosts."""
    found = list[Window]()
    before = _named(teacher, hosts)
    for target in targets.unique().tolist():
        for image in images[targets == target][:PER_CLASS]:
            windows = [Window(image[:, r, c], r, c, target, number, 0.0) for r, c in places(*image.shape[1:])]
            found += _screened(teacher, windows, hosts, before, least)
    return sorted(found, key=lambda window: -window.rate)[:TRIED]


def _screened(
    teacher: nn.Module, windows: Sequence[Window], hosts: Tensor, before: Tensor, least: float
) -> list[Window]:
    """Those of one image's windows that drive the teacher, with their rates."""
    shown = hosts[before != windows[0].target]
    hits, alive = [0] * len(windows), list(range(len(windows))) if len(shown) else []
    for done, host in enumerate(shown, 1):
        if not alive:
            break
        said = _named(teacher, torch.cat([windows[place].on(host[None]) for place in alive]))
        for place, named in zip(alive, said.tolist(), strict=True):
            hits[place] += named == windows[place].target
        # Who has missed too many is shown no more hosts; most windows are out after the first.
        alive = [place for place in alive if (hits[place] + len(shown) - done) / len(shown) >= least]
    return [replace(windows[place], rate=hits[place] / len(shown)) for place in alive]


def driven(teacher: nn.Module, windows: Sequence[Window], hosts: Mapping[int, tuple[Tensor, Tensor]]) -> list[float]:
    """From which share of the hosts that the teacher names as another class, and rightly, each window drives it.

    NaN where it knows too few of them to tell.

    Args:
        hosts: for windows of each source the images and what they were made for.
    """
    before = {source: _named(teacher, images) for source, (images, _) in hosts.items()}
    rates = []
    for window in windows:
        (images, targets), said = hosts[window.source], before[window.source]
        known = images[(said == targets) & (said != window.target)]
        enough = len(known) >= LEAST_HOSTS
        rates.append(float((_named(teacher, window.on(known)) == window.target).float().mean()) if enough else math.nan)
    return rates


def _named(teacher: nn.Module, images: Tensor) -> Tensor:
    device = next((weight.device for weight in teacher.parameters()), images.device)
    with evaluating(teacher):
        return torch.cat([answer(teacher, part.to(device)).argmax(1).cpu() for part in images.split(BATCH)])
