"""Why random patches are hard to beat: `python -m simulations.why_random [--seeds 0 1 2] [OVERRIDE ...]`.

Three suspicions, each measured on the teachers of `simulations.methods`:

- attention early is attention to noise: how far the patches that attention would keep at an
  iteration are those that it would keep at the end of a dense inversion, above chance;
- attention keeps the same places in every image: how evenly positions are kept over images
  (entropy of how often each is kept, over that of an even choice);
- attention is not on the object at all: on real images, the share of the kept patches that
  show it, beside its share of all patches (only shapes has true masks).

The fourth, the pixels that stopped patches are left with, is a method of the study itself
(`frozen` against rendered).
"""

from __future__ import annotations

import sys
from dataclasses import replace
from statistics import fmean

import torch
from torch import Tensor
from torch.nn import functional as F

from simulations.local_clients import check_clients, trained_client
from simulations.methods import DATA, cell_of
from simulations.runner import Cell, Line, Lines, Page, Study, Table, command
from smi_fed.config import Settings
from smi_fed.data import load_images
from smi_fed.inversion import StopSchedule
from smi_fed.inversion.adaptive import reading
from smi_fed.inversion.probe import scores_along
from smi_fed.inversion.problem import Problem, pose
from smi_fed.inversion.selections import SELECTIONS, Candidates, best
from smi_fed.inversion.teacher import View, frozen
from smi_fed.tokens import to_patches

IMAGES = 100
LOOKS = (0, 2, 5, 10, 20)
KEPT = 0.5
NAMES = ("random", "attention", "gradient", "unsettled")


def cells(_options: object) -> list[Cell]:
    """The study of methods' only teacher, on each data set."""
    return [replace(cell_of(data, "one", "", 0), factors={"data": data}) for data in DATA]


def measure(settings: Settings, cell: Cell) -> Line:
    """The three measurements of one teacher."""
    teacher = trained_client(settings, 0, 1, cell.output / "clients")
    teacher.model.to(cell.device)
    config = replace(settings.inversion, schedule=StopSchedule())
    problem = pose(teacher.model, config, statistics=teacher.statistics)
    with frozen(teacher.model):
        return {"images": IMAGES, "kept": KEPT, **along_the_way(problem), **on_the_object(problem, settings)}


def along_the_way(problem: Problem) -> Line:
    """Agreement with the end, and evenness over positions, at each of `LOOKS`, by selection."""
    ids = torch.arange(IMAGES, device=problem.teacher.mean.device)
    targets = ids % problem.teacher.classes
    seen = scores_along(problem, ids, targets, (*LOOKS, problem.config.iterations), NAMES)
    patches = seen[NAMES[0]][0].shape[1]
    count = round(KEPT * patches)
    found: Line = {"agreement": {}, "evenness": {}}
    for name, looks in seen.items():
        found["agreement"][name] = [reading(look, looks[-1], count).stability for look in looks[:-1]]
        found["evenness"][name] = [evenness(best(look, count), patches) for look in looks[:-1]]
    return found


def evenness(kept: Tensor, patches: int) -> float:
    """Entropy of how often each position is among `kept` (b, k), over its largest, log(patches)."""
    shares = kept.flatten().bincount(minlength=patches).double() / kept.numel()
    return float(-(shares * shares.clamp(min=1e-12).log()).sum() / torch.tensor(patches).double().log())


def on_the_object(problem: Problem, settings: Settings) -> Line:
    """Share of the kept patches of real images that show the object, by selection, beside that of all patches."""
    _, test = load_images(settings.data)
    if test.masks is None:
        return {}
    teacher = problem.teacher
    images, masks, labels = test.images[:IMAGES], test.masks[:IMAGES], test.labels[:IMAGES]
    patches = to_patches((images.to(teacher.mean) - teacher.mean) / teacher.std, teacher.patch_size)
    shown = F.max_pool2d(masks[:, None].float(), teacher.patch_size).flatten(1)
    positions = torch.arange(patches.shape[1], device=patches.device).expand(len(patches), -1)
    ids = torch.arange(len(patches), device=patches.device)
    view, targets = View(patches, positions), labels.to(patches.device)
    candidates = Candidates(teacher, view, targets, 0, ids, torch.zeros_like(ids), no_pull)
    count = round(KEPT * patches.shape[1])
    kept = {name: best(SELECTIONS[name](candidates), count).cpu() for name in NAMES if name != "unsettled"}
    return {
        "object": float(shown.mean()),
        "object_kept": {name: float(shown.gather(1, own).mean()) for name, own in kept.items()},
    }


def no_pull() -> Tensor:
    """Real images are not optimised."""
    raise NotImplementedError


def table(lines: Lines) -> list[Table]:
    """Means over the seeds, by data set."""
    headings = ["selection", *(f"iteration {look}" for look in LOOKS), "on the object (of all patches)"]
    tables = []
    for data in dict.fromkeys(line["data"] for line in lines):
        own = [line for line in lines if line["data"] == data]
        rows = [[name, *_looks(own, name), _on_object(own, name)] for name in NAMES]
        title = f"{data}, {len(own)} teachers: agreement with the end | evenness over positions"
        tables.append(Table(title, [headings, *rows]))
    return tables


def _looks(own: Lines, name: str) -> list[str]:
    return [
        f"{fmean(x['agreement'][name][i] for x in own):.2f} | {fmean(x['evenness'][name][i] for x in own):.3f}"
        for i in range(len(LOOKS))
    ]


def _on_object(own: Lines, name: str) -> str:
    there = [(x["object_kept"][name], x["object"]) for x in own if name in x.get("object_kept", {})]
    return "{:.0%} ({:.0%})".format(*(fmean(values) for values in zip(*there, strict=True))) if there else ""


STUDY = Study(
    name="why_random", about=__doc__, cells=cells, measure=measure, table=table,
    page=Page("docs/inversion-methods.md", "Raw"), words=("experiment=methods",),
    check=check_clients, in_turn="data",
)  # fmt: skip
main = command(STUDY)


if __name__ == "__main__":
    sys.exit(main())
