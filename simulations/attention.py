"""How good must attention be? `python -m simulations.attention [--teachers supervised registers] [--seeds 0 1 2]`.

One teacher, trained on all shapes, whose true masks are known. Which patches go on when most stop is
chosen by its attention, by its attention under noise, at random, by an oracle and by the oracle's opposite.
How well a choice finds the object is measured on held-out images: IoU of the patches that are kept with
the true mask, and how often the first of them lies in it (the pointing game). Beside it stands what a
student learns from images that were inverted with this choice. A teacher with registers is another one,
with dense, random and oracle images of its own.

No synthetic image has a true mask. So the oracle is a linear readout of the teacher's patch tokens, fitted
to the true masks of the training images; it says too where the object is in finished synthetic images.
A self-distilled teacher is left out: 2,250 images of 32 pixels are too few for one worth the name.
"""

from __future__ import annotations

import statistics
import sys
from argparse import ArgumentParser, Namespace
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from simulations.convergence import RATE, SHAPES, SMOKE
from simulations.local_clients import check_clients
from simulations.methods import clients_on, invert_all, taught
from simulations.methods.report import spread
from simulations.runner import Cell, Line, Lines, Page, Study, Table, command, seeds_of
from smi_fed.config import Settings
from smi_fed.data import ImageSet, load_images
from smi_fed.inversion import SparseImages, randomness
from smi_fed.inversion.selections import SELECTIONS, Candidates, best
from smi_fed.inversion.teacher import Teacher, View, adapt
from smi_fed.models import Classifier
from smi_fed.tokens import to_patches

ITERATIONS, STOP, IMAGES, STEPS = 20, "5:0.77", 200, 200
NOISE = (0.5, 1.0, 2.0, 4.0)
RIDGE = 1e-3
BATCH = 250
"""Real images that a teacher is shown at once."""

DENSE, OPPOSITE = "dense", "opposite"
TEACHERS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "supervised": (
        (),
        (DENSE, OPPOSITE, "random", *(f"noise {level}" for level in NOISE[::-1]), "attention", "oracle"),
    ),
    "registers": (
        ("+model.clients.vit_p4_w64_d2.kwargs.reg_tokens=4",),
        (DENSE, "random", "attention", "oracle"),
    ),
}
"""Of each teacher what it changes, and by what the patches of its images are chosen."""


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


def oracle(candidates: Candidates) -> Tensor:
    """Share of each patch (b, k) that the object covers, as `READOUTS` has it of this teacher."""
    return read_tokens(candidates.teacher, candidates.view) @ READOUTS[candidates.teacher.backbone]


READOUTS: WeakKeyDictionary[nn.Module, Tensor] = WeakKeyDictionary()
"""By backbone, what `fitted` found."""

SELECTIONS |= {f"noise {level}": partial(noisy, level=level) for level in NOISE}
SELECTIONS |= {"oracle": oracle, OPPOSITE: lambda candidates: -oracle(candidates)}


def add_options(parser: ArgumentParser) -> None:
    """What of the study is measured."""
    parser.add_argument("--teachers", nargs="+", choices=TEACHERS, default=list(TEACHERS))
    parser.add_argument("--images", type=int, default=IMAGES, help="that each student learns from")
    parser.add_argument("--smoke", action="store_true", help="as little as shows that every cell runs")


def cells(options: Namespace) -> list[Cell]:
    """Each choice of each teacher."""
    return [
        Cell(
            {"teacher": teacher, "choice": choice, "smoke": options.smoke},
            ("inversion.schedule=''",) if choice == DENSE else (f"inversion.selection='{choice}'",),
            (*changes, f"server.images_per_teacher={options.images}", f"inversion.iterations={ITERATIONS}",
             f"inversion.schedule='{STOP}'", f"inversion.learning_rate={RATE}", f"distillation.steps={STEPS}",
             *(SMOKE if options.smoke else ())),
        )
        for teacher in options.teachers
        for changes, choices in [TEACHERS[teacher]]
        for choice in choices
    ]  # fmt: skip


def measure(settings: Settings, cell: Cell) -> Line:
    """How well one choice finds the object, and one student."""
    teachers = clients_on(settings, cell, 1)
    model = teachers[0].model
    train, test = load_images(settings.data)
    READOUTS[model.backbone] = fitted(model, train)
    (found,), inverted = invert_all(settings, teachers, settings.inversion.iterations, 1, cell.device)
    line = {**inverted, **taught(settings, cell, teachers, [found])}
    if cell["choice"] == DENSE:
        return line
    count = int(found.mask[0].sum())
    return {**line, **looked(model, test, cell["choice"], count), "synthetic_iou": synthetic_iou(model, found)}


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


def coverage(masks: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """Share (n, patches) of each patch that is in the mask (n, h, w)."""
    return to_patches(masks[:, None].float(), patch_size).mean((2, 3, 4))


def kept(scores: Tensor, count: int) -> Tensor:
    """Which patches (n, patches) bool are the `count` best of each image."""
    return torch.zeros_like(scores, dtype=torch.bool).scatter(1, best(scores, count), value=True)


def iou(kept: Tensor, covered: Tensor) -> float:
    """Mean over images of the pixels that patches and mask share over those of either.

    Args:
        kept: (n, patches) bool.
        covered: (n, patches), see `coverage`; no image without an object and without a patch.
    """
    both = (kept * covered).sum(1)
    return float((both / (kept.sum(1) + covered.sum(1) - both)).mean())


def pointing(scores: Tensor, covered: Tensor) -> float:
    """Share of images of whose best patch at least half is the object (n, patches)."""
    return float((covered.gather(1, scores.argmax(1, keepdim=True)) >= 0.5).float().mean())


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


def table(lines: Lines) -> list[Table]:
    """A row of each teacher and choice; IoU and pointing are on real images."""
    rows = [["teacher", "patches chosen by", "IoU with the mask, %", "pointing, %", "IoU in synthetic images, %",
             "student accuracy, %", "inversion seconds"]]  # fmt: skip
    for own in groups(lines):
        looks = [spread(percent(own, key)) if key in own[0] else "" for key in ("iou", "pointing", "synthetic_iou")]
        seconds = statistics.fmean(line["inversion_seconds"] for line in own)
        rows.append([own[0]["teacher"], own[0]["choice"], *looks,
                     spread(percent(own, "student_test_accuracy")), f"{seconds:.1f}"])  # fmt: skip
    return [Table(f"attention on shapes, seeds {seeds_of(lines)}", rows, [*_bounds(lines), _teachers(lines)])]


def groups(lines: Lines) -> list[list[Line]]:
    """Lines by teacher and choice, a line for each seed."""
    found: dict[tuple[str, str], list[Line]] = {}
    for line in lines:
        found.setdefault((line["teacher"], line["choice"]), []).append(line)
    return list(found.values())


def percent(lines: Lines, key: str) -> list[float]:
    """Values of lines in %."""
    return [100 * line[key] for line in lines]


def _bounds(lines: Lines) -> list[str]:
    looks = [line for line in lines if "iou" in line]
    if not looks:
        return []
    keys = ("iou_by_chance", "pointing_by_chance", "iou_of_masks")
    chance, pointed, most = (statistics.fmean(percent(looks, key)) for key in keys)
    return [
        f"By chance IoU is {chance:.1f} % and pointing {pointed:.1f} %; as many patches that the mask itself chooses "
        f"have an IoU of {most:.1f} %."
    ]


def _teachers(lines: Lines) -> str:
    said = []
    for teacher in dict.fromkeys(line["teacher"] for line in lines):
        by_seed = {x["seed"]: 100 * x["ensemble_test_accuracy"] for x in lines if x["teacher"] == teacher}
        said.append(f"{teacher} {spread(list(by_seed.values()))} %")
    return f"The teachers' own accuracy: {', '.join(said)}."


def figure(lines: Lines) -> Any:
    """Student accuracy over IoU, a point for each teacher and choice; dense is a line."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(8, 5), layout="constrained")
    axis = drawn.subplots()
    for own in groups(lines):
        colour = "tab:blue" if own[0]["teacher"] == "supervised" else "tab:orange"
        mean, deviation = _moments(percent(own, "student_test_accuracy"))
        if "iou" not in own[0]:
            axis.axhline(mean, color=colour, linestyle="--", linewidth=1, label=f"{own[0]['teacher']}, dense")
            continue
        place, wide = _moments(percent(own, "iou"))
        axis.errorbar(place, mean, deviation, wide, marker="o", color=colour, capsize=2, elinewidth=0.6)
        axis.annotate(own[0]["choice"], (place, mean), xytext=(4, 4), textcoords="offset points", fontsize=8)
    if chance := [100 * line["iou_by_chance"] for line in lines if "iou_by_chance" in line]:
        axis.axvline(statistics.fmean(chance), color="black", linestyle=":", linewidth=1, label="chance")
    axis.set(xlabel="IoU of the patches that are kept with the true mask, real images, %",
             ylabel="student test accuracy in %", title=f"shapes, seeds {seeds_of(lines)}")  # fmt: skip
    axis.grid(alpha=0.3)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=8)
    return drawn


def _moments(values: list[float]) -> tuple[float, float]:
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


STUDY = Study(
    name="attention", about=__doc__, cells=cells, measure=measure, table=table, figure=figure,
    picture="attention.png", words=("experiment=convergence", *SHAPES, "data.scheme=iid", "evaluation=none"),
    options=add_options, check=check_clients, in_turn="",
    page=Page(
        "docs/study.md", markdown=True,
        note=lambda _: ": mean ± standard deviation over the seeds; seconds of the process, on one thread.",
    ),
)  # fmt: skip
main = command(STUDY)


if __name__ == "__main__":
    sys.exit(main())
