"""How good must attention be? `python -m simulations.attention [--teachers supervised ...] [--seeds 0 1 2]`.

A teacher is of five shapes, whose true masks are known (conf/model/outlines.yaml), or of real pictures of one
style; their masks are what is drawn on their white ground. Which patches go on when most stop is chosen by its
attention, by its attention under noise, at random, by an oracle and by the oracle's opposite. How well a choice
finds the object is measured on held-out images: IoU of the patches that are kept with the mask, and how often the
first of them lies in it (the pointing game). Beside it stands what a student learns from images that were
inverted with this choice, from dense ones, from noise and from the teacher's own images. Each teacher has
images of its own: `registers` has registers; `self-distilled` is DINOv2 with a head, on real pictures, and
`tuned` the same with its last three layers tuned on their labels. Students of real pictures are a new head on
the same frozen backbone.

No synthetic image has a true mask. So the oracle is a linear readout of the teacher's patch tokens, fitted
to the masks of the training images; it says too where the object is in finished synthetic images.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from simulations.attention_report import figure, table
from simulations.convergence import SMOKE
from simulations.latest import Latest
from simulations.masks import coverage, iou, kept, masked, pointing
from simulations.methods import clients_on, control, invert_all, taught
from simulations.methods.report import CONTROLS
from simulations.runner import Cell, Line, Page, Study, command
from simulations.sources import DATA, check, inverted, note, told
from smi_fed.config import Settings
from smi_fed.data import ImageSet, load_images
from smi_fed.inversion import SparseImages, randomness
from smi_fed.inversion.selections import SELECTIONS, Candidates, Selection
from smi_fed.inversion.teacher import Teacher, View, adapt
from smi_fed.models import Classifier
from smi_fed.tokens import to_patches

LEVELS, NOISY = (1.0, 3.0), "attention, noise {:g}".format
RIDGE = 1e-3
BATCH = 250
"""Real images that a teacher is shown at once."""

READ = 1200
"""Training images that the readout is fitted to, at most."""

DENSE, OPPOSITE = "dense", "opposite"


class Kind(NamedTuple):
    """A teacher: by what the patches of its images are chosen or what stands in their place, and what it changes."""

    choices: tuple[str, ...]
    data: str = "shapes"
    images: int = 200  # fewer than in other studies, which have fewer choices to compare
    changes: tuple[str, ...] = ()


SOME = (DENSE, "random", "attention", "oracle")
TEACHERS: dict[str, Kind] = {
    "supervised": Kind((*CONTROLS, DENSE, OPPOSITE, "random", *map(NOISY, LEVELS[::-1]), "attention", "oracle")),
    "registers": Kind(SOME, changes=("+model.clients.vit_p4_w64_d2.kwargs.reg_tokens=4",)),
    "self-distilled": Kind(
        (*CONTROLS, DENSE, OPPOSITE, "random", NOISY(1.0), "attention", "oracle"), "real", DATA["real"].images
    ),
    "tuned": Kind(
        SOME, "real", DATA["real"].images,
        ("client.training.trainable=last:3", "client.training.learning_rate=3e-4"),
    ),
}  # fmt: skip


def noisy(candidates: Candidates, level: float) -> Tensor:
    """Scores (b, k): the importance's logarithm, of mean 0 and deviation 1 in each image, plus normal noise.

    Args:
        level: the noise's standard deviation.
    """
    importance = candidates.teacher.importance(candidates.view, candidates.targets).double()
    logs = importance.clamp(min=torch.finfo(torch.float64).tiny).log()
    wide = logs.std(1, keepdim=True).clamp(min=1e-12)
    ids, age = candidates.ids, candidates.age
    noise = randomness.normal(candidates.key, ids, age, randomness.SELECT, importance.shape[1])
    return (logs - logs.mean(1, keepdim=True)) / wide + level * noise


def choices(readout: Tensor) -> dict[str, Selection]:
    """The selections of this study; the oracle reads the object's share of each patch (b, k) in the tokens."""

    def oracle(candidates: Candidates) -> Tensor:
        return read_tokens(candidates.teacher, candidates.view) @ readout

    return {
        **{NOISY(level): partial(noisy, level=level) for level in LEVELS},
        "oracle": oracle,
        OPPOSITE: lambda candidates: -oracle(candidates),
    }


@contextmanager
def known(selections: dict[str, Selection]) -> Iterator[None]:
    """Selections that an inversion finds by their names meanwhile."""
    SELECTIONS.update(selections)
    try:
        yield
    finally:
        for name in selections:
            del SELECTIONS[name]


def add_options(parser: ArgumentParser) -> None:
    """What of the study is measured."""
    parser.add_argument("--teachers", nargs="+", choices=TEACHERS, default=list(TEACHERS))
    parser.add_argument("--images", type=int, help="that a student learns from; default: 200 of shapes, 100 real ones")
    parser.add_argument("--smoke", action="store_true", help="as little as shows that every cell runs")


def cells(options: Namespace) -> list[Cell]:
    """Each choice of each teacher."""
    return [
        Cell(
            {"teacher": name, "choice": choice, "data": kind.data, "smoke": options.smoke},
            ("inversion.schedule=''",) if choice == DENSE else (),
            (*DATA[kind.data].words, *kind.changes, *inverted(kind.data, options.images or kind.images),
             "inversion.selection=random", *(SMOKE if options.smoke else ())),
        )
        for name, kind in ((name, TEACHERS[name]) for name in options.teachers)
        for choice in kind.choices
    ]  # fmt: skip


def measure(settings: Settings, cell: Cell) -> Line:
    """How well one choice finds the object, and one student."""
    teachers, choice = clients_on(settings, cell, 1), cell["choice"]
    if choice in CONTROLS:
        return taught(settings, cell, teachers, list(control(choice, settings, teachers)))
    model = teachers[0].model
    train, test = (each.of_classes(model.spec.class_names) for each in load_images(settings.data))
    readout = _READOUTS.of(
        teachers[0].digest, lambda: fitted(model, masked(train.select(spread_out(len(train), READ))))
    )
    with known(choices(readout)):
        if choice != DENSE:
            settings = replace(settings, inversion=replace(settings.inversion, selection=choice))
        (found,), inverted = invert_all(settings, teachers, settings.inversion.iterations, 1, cell.device)
        line = {**inverted, **taught(settings, cell, teachers, [found])}
        if choice == DENSE:
            return line
        count = int(found.mask[0].sum())
        return {**line, **looked(model, masked(test), choice, count), "synthetic_iou": synthetic_iou(model, found)}


_READOUTS = Latest[Tensor]()


def spread_out(count: int, most: int) -> Tensor:
    """At most so many of `count` places, with equal steps between them."""
    return torch.arange(0, count, -(-count // most))


def looked(model: Classifier, images: ImageSet, choice: str, count: int) -> Line:
    """How well a choice of `count` patches finds the object of real images, and what is the least and the most."""
    assert images.masks is not None
    covered = coverage(images.masks, adapt(model).patch_size)
    scores, chance = (scored(model, images, each).cpu() for each in (choice, "random"))
    return {
        "iou": iou(kept(scores, count), covered),
        "pointing": pointing(scores, covered),
        "iou_by_chance": iou(kept(chance, count), covered),
        "pointing_by_chance": float((covered >= 0.5).float().mean()),
        "iou_of_masks": iou(kept(covered, count), covered),
    }


@torch.no_grad()
def scored(model: Classifier, images: ImageSet, choice: str) -> Tensor:
    """What a selection says of every patch (n, patches) of whole images."""
    teacher, rows = adapt(model), torch.arange(len(images), device=model.mean.device)
    found = []
    for ids in rows.split(BATCH):
        view, targets = shown(model, teacher, images.images[ids.cpu()]), images.labels[ids.cpu()].to(ids.device)
        found.append(SELECTIONS[choice](Candidates(teacher, view, targets, 0, ids, torch.zeros_like(ids), _no_pull)))
    return torch.cat(found)


def _no_pull() -> Tensor:
    raise NotImplementedError("real images have no objective")


def shown(model: Classifier, teacher: Teacher, images: Tensor) -> View:
    """Whole images (b, c, h, w) in [0, 1], as a teacher sees them."""
    patches = to_patches(model.normalised(images.to(model.mean.device)), teacher.patch_size)
    return View(patches, torch.arange(patches.shape[1], device=patches.device).expand(len(patches), -1))


def read_tokens(teacher: Teacher, view: View) -> Tensor:
    """A row of features of each patch (b, k, features) float64: its tokens of every layer, and 1."""
    _, layers = teacher.features(view)
    tokens = torch.cat([layer[:, teacher.prefix_tokens :] for layer in layers], dim=2).double()
    return torch.cat([tokens, torch.ones_like(tokens[:, :, :1])], dim=2)


@torch.no_grad()
def fitted(model: Classifier, images: ImageSet) -> Tensor:
    """The ridge regression (features,) of the mask's share of a patch on the patch's tokens."""
    assert images.masks is not None
    teacher = adapt(model)
    covered = coverage(images.masks, teacher.patch_size)
    gram = right = torch.zeros((), dtype=torch.float64, device=model.mean.device)
    for rows in torch.arange(len(images)).split(BATCH):
        features = read_tokens(teacher, shown(model, teacher, images.images[rows])).flatten(0, 1)
        gram = gram + features.T @ features
        right = right + features.T @ covered[rows].flatten().to(features)
    return torch.linalg.solve(gram + RIDGE * gram.diagonal().mean() * torch.eye(len(gram)).to(gram), right)


def synthetic_iou(model: Classifier, found: SparseImages) -> float:
    """IoU of the patches that were kept with the object of the finished images, as the oracle sees it there."""
    images = ImageSet(found.images, found.targets, tuple(map(str, range(model.spec.num_classes))))
    return iou(found.mask.flatten(1), scored(model, images, "oracle").clamp(0, 1).cpu())


STUDY = Study(
    name="attention", about=__doc__, cells=cells, measure=measure, table=table, figure=figure,
    picture="attention.png", options=add_options, check=check, in_turn="", apart="data",
    page=Page("docs/study.md", markdown=True, note=note, arguments=told("--teachers", "teacher")),
)  # fmt: skip
main = command(STUDY)


if __name__ == "__main__":
    sys.exit(main())
