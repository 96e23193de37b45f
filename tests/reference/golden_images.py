"""Images of every method, kept in a file: `python -m tests.reference.golden_images` writes it anew.

Teachers are in float64, so that what another processor rounds otherwise is far below the
float32 of the images. On the kind of machine that wrote the file they are equal bit for bit.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smi_fed.inversion import (
    InversionConfig,
    InversionProgress,
    PyramidConfig,
    SparseImages,
    feature_statistics,
    invert,
)
from smi_fed.inversion.flops import spent_flops
from smi_fed.inversion.selections import SELECTIONS
from smi_fed.models import Classifier
from tests.models import masked_model, small_vit

FILE = Path(__file__).with_name("golden_images.safetensors")
CLASSES = torch.tensor([0, 1, 2, 3, 4, 1, 3])
SPARSE = InversionConfig.paper(iterations=12, schedule="3:0.25,6:0.4", jitter=4, batch_size=3)
PYRAMID = replace(SPARSE, parametrisation=PyramidConfig((2, 4)), learning_rate=0.1, learning_rate_decay="cosine")
EARLY = replace(
    SPARSE, iterations=24, learning_rate=0.1, leaving={"kind": "converged", "patience": 3, "tolerance": 0.02}
)
HASTY = {"kind": "converged", "patience": 2, "tolerance": 0.2}


@dataclass(frozen=True)
class Case:
    """One inversion, with the small teacher of that kind."""

    config: InversionConfig
    teacher: str = "vit"
    targets: Tensor = CLASSES
    more: Callable[[Classifier], dict[str, Any]] = field(default=lambda _model: {})


def known(model: Classifier) -> dict[str, Any]:
    """Feature statistics of images that are nobody's."""
    images = torch.rand(6, len(model.mean), *model.image_size, generator=torch.Generator().manual_seed(1))
    return {"statistics": feature_statistics(model, [images])}


def warm(model: Classifier) -> dict[str, Any]:
    """Starts for three of the images."""
    found = invert(model, CLASSES[:3], replace(SPARSE, iterations=4, schedule=""), generator=seeded(5))
    return {"warm": replace(found, ids=torch.tensor([5, 0, 2]))}


def seeded(seed: int) -> torch.Generator:
    """A generator of that seed."""
    return torch.Generator().manual_seed(seed)


CASES: dict[str, Case] = {
    "dense": Case(replace(SPARSE, schedule="")),
    **{f"sparse, {name}": Case(replace(SPARSE, selection=name)) for name in SELECTIONS},
    "stop at 0": Case(replace(SPARSE, schedule="0:0.5,6:0.4")),
    "float64 alone": Case(replace(SPARSE, batch_size=1)),
    "pyramid, frozen": Case(PYRAMID),
    "pyramid, rendered": Case(replace(PYRAMID, background="rendered")),
    "adaptive": Case(replace(SPARSE, planning="adaptive"), teacher="peaked"),
    "adaptive, multi-label": Case(
        replace(SPARSE, planning="adaptive"), teacher="peaked", targets=torch.eye(5)[CLASSES]
    ),
    "early stop": Case(EARLY),
    "early stop, dense": Case(replace(EARLY, schedule="")),
    "early stop, adaptive": Case(replace(EARLY, planning="adaptive"), teacher="peaked"),
    "rebirth": Case(replace(SPARSE, stopping="rebirth")),
    "rebirth, early stop, rendered": Case(
        replace(PYRAMID, iterations=24, background="rendered", stopping="rebirth", leaving=HASTY)
    ),
    "statistics": Case(replace(SPARSE, statistics=10.0, flip=False, jitter=2), more=known),
    "statistics, early stop": Case(replace(EARLY, statistics=10.0, flip=False, jitter=2, leaving=HASTY), more=known),
    "warm": Case(SPARSE, more=warm),
    "warm pyramid": Case(PYRAMID, more=warm),
    "masked": Case(SPARSE, teacher="swin", targets=CLASSES[:4]),
    "masked, rebirth": Case(replace(SPARSE, stopping="rebirth"), teacher="swin", targets=CLASSES[:4]),
    "masked, early stop": Case(EARLY, teacher="swin", targets=CLASSES[:4]),
    "BatchNorm": Case(replace(SPARSE, batchnorm=1.0), teacher="resnet", targets=CLASSES[:4]),
}


def teacher(kind: str) -> Classifier:
    """A small model in float64; of one channel where it can be."""
    model = (small_vit(in_chans=1) if kind in ("vit", "peaked") else masked_model(kind)).double()
    if kind == "peaked":  # attention that an adaptive schedule follows part of the way
        for block in model.backbone.blocks:
            block.attn.qkv.weight.data *= 4
    return model


def inverted(case: Case) -> tuple[SparseImages, list[InversionProgress], Classifier]:
    """The images, what was said on the way, and the model."""
    model, seen = teacher(case.teacher), []
    found = invert(model, case.targets, case.config, generator=seeded(0), progress=seen.append, **case.more(model))
    return found, seen, model


def facts(name: str) -> dict[str, Tensor]:
    """What the file has of a case: pixels, when patches stopped, ids, and what it took."""
    case = CASES[name]
    found, seen, model = inverted(case)
    statistics = case.more(model).get("statistics")
    spent = torch.tensor(sorted(seen[-1].spent.items()))
    flops = spent_flops(model, case.config, seen[-1].spent, len(case.targets), statistics)
    return {"images": found.images, "stopped_at": found.stopped_at, "ids": found.ids, "spent": spent,
            "flops": torch.tensor(flops)}  # fmt: skip


def machine() -> str:
    """What rounding depends on: processor and torch."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return json.dumps([platform.machine(), *names[:1], torch.backends.cpu.get_cpu_capability(), torch.__version__])


def main() -> None:
    """Write the file."""
    from safetensors.torch import save_file

    torch.set_num_threads(1)
    tensors = {f"{name}/{key}": value.contiguous() for name in CASES for key, value in facts(name).items()}
    save_file(tensors, FILE, {"machine": machine()})
    print(f"{FILE.name}: {len(CASES)} methods, {FILE.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
