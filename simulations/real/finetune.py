"""`python -m simulations.real.finetune`: one owner by itself, a pretrained ViT fine-tuned on one style's pictures.

It tells the accuracy on each style's held-out pictures, and the seconds of a step.
"""

from __future__ import annotations

import argparse
import logging
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from simulations.real.__main__ import VIT, default_directory
from simulations.runner.ledger import environment
from smi_fed.data import DataConfig, load_images
from smi_fed.devices import choose_device
from smi_fed.files import write_json
from smi_fed.models import ModelSpec, build_seeded
from smi_fed.training import TrainingConfig, accuracy, train

SIZE = 112
log = logging.getLogger("smi_fed")


def finetune(directory: Path, style: str, config: TrainingConfig, device: str, seed: int) -> dict[str, Any]:
    """Fine-tune the pretrained ViT on one style; what came out."""
    sources = {path.name: path for path in sorted((directory / "pictures").iterdir()) if path.is_dir()}
    data, _ = load_images(_source(sources[style]))
    start = directory / "dinov2" / f"{VIT}.safetensors"
    model = build_seeded(ModelSpec(VIT, len(data.class_names), SIZE, start=str(start)), seed)
    place, reason = choose_device(device)
    log.info("training: %s; device: %s (%s)", config.summary, place, reason)
    ends = [time.perf_counter()]

    def tell(step: int, now: Tensor) -> None:
        ends.append(time.perf_counter())
        if step % 20 == 0:
            log.info("step %d: loss %.3f", step, float(now))

    loss = train(model.to(place), data, config, generator=torch.Generator().manual_seed(seed), progress=tell)
    tests = {name: accuracy(model, load_images(_source(path))[1]) for name, path in sources.items()}
    seconds = torch.tensor(ends).double().diff()
    return {
        "environment": environment(place), "style": style, "seed": seed, "images": len(data), "config": asdict(config),
        "steps": len(seconds), "seconds_per_step": float(seconds.median()), "loss": loss, "test_accuracy": tests,
        "mean_accuracy": sum(tests.values()) / len(tests),
    }  # fmt: skip


def _source(path: Path) -> DataConfig:
    return DataConfig(source="folder", name=str(path), image_size=SIZE, channels=3)


def main(words: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m simulations.real.finetune", description=__doc__)
    parser.add_argument("--directory", type=Path, default=default_directory(), help="what `make real-data` made")
    parser.add_argument("--style", default="google")
    parser.add_argument("--preset", default="finetune", choices=("finetune", "head", "scratch"))
    parser.add_argument("--trainable", default="last:3")
    parser.add_argument("--epochs", type=float, default=5.0)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="a JSON file of what came out")
    asked = parser.parse_args(words)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    preset = getattr(TrainingConfig, asked.preset)
    changes = {key: getattr(asked, key) for key in ("trainable", "epochs", "batch_size", "precision")}
    found = finetune(asked.directory, asked.style, preset(**changes), asked.device, asked.seed)
    print(", ".join(f"{name} {100 * value:.1f} %" for name, value in found["test_accuracy"].items()))
    print(f"mean {100 * found['mean_accuracy']:.1f} %, {found['steps']} steps of {found['seconds_per_step']:.2f} s")
    if asked.output:
        write_json(asked.output, found)


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "0")) or torch.get_num_threads())
    main()
