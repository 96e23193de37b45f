"""What a run leaves behind: report.json, the student and two pictures."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from smi_fed.files import FileFormatError, load_tensors, replacing, save_tensors
from smi_fed.models import Classifier, ModelSpec, build_model
from smi_fed.sparse_images import SparseImages

SCHEMA_VERSION = 1
STUDENT_FORMAT = "smi-fed.student"
STUDENT_VERSION = 1


def save_student(path: str | os.PathLike[str], student: Classifier) -> None:
    """Write weights and spec as safetensors, atomically."""
    save_tensors(path, student.state_dict(), STUDENT_FORMAT, STUDENT_VERSION, spec=student.spec.to_json())


def load_student(path: str | os.PathLike[str]) -> Classifier:
    """The student that `save_student` wrote, in evaluation mode.

    Raises:
        FileNotFoundError, FileFormatError: naming the file and what is wrong with it.
    """
    weights, metadata = load_tensors(path, STUDENT_FORMAT, STUDENT_VERSION)
    try:
        model = build_model(ModelSpec.from_json(metadata["spec"]))
        model.load_state_dict(weights)
    except (KeyError, ValueError, RuntimeError) as error:
        raise FileFormatError(f"{path}: {error}") from error
    return model.eval()


def plot_curves(path: str | os.PathLike[str], losses: Sequence[float], rounds: Sequence[dict[str, Any]],
                clients: Sequence[dict[str, Any]], ensemble_accuracy: float) -> None:  # fmt: skip
    """Distillation loss beside the accuracies of clients, ensemble and student."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(range(1, len(losses) + 1), losses, color="tab:blue", linewidth=1)
    left.set(xlabel="distillation step", ylabel="temperature KL to the ensemble", title="Student's loss", yscale="log")
    names = [str(client["name"]) for client in clients if client["admitted"]]
    values = [client["test_accuracy"] for client in clients if client["admitted"]]
    names += ["ensemble", *(f"student, round {each['round']}" for each in rounds)]
    values += [ensemble_accuracy, *(each["student_test_accuracy"] for each in rounds)]
    colours = ["tab:gray"] * (len(names) - len(rounds) - 1) + ["tab:green"] + ["tab:blue"] * len(rounds)
    bars = right.barh(names[::-1], [100 * value for value in values[::-1]], color=colours[::-1])
    right.bar_label(bars, fmt="%.1f", padding=3)
    right.set(xlabel="test accuracy in %", xlim=(0, 112), title="Held-out test split")
    with replacing(path) as part:
        figure.savefig(part, dpi=120)


def plot_images(path: str | os.PathLike[str], found: Sequence[SparseImages], names: Sequence[str],
                class_names: Sequence[str], columns: int = 10) -> None:  # fmt: skip
    """Per teacher a row of images, and below it the same with only the patches that were kept."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(columns * 0.9, 2 * len(found) * 0.98 + 0.6), layout="constrained")
    axes = figure.subplots(2 * len(found), columns, squeeze=False)
    for row, (images, name) in enumerate(zip(found, names, strict=True)):
        shown = _one_per_class(images, columns)
        for part, pixels in enumerate((shown.images, shown.masked(0.5))):
            for column, axis in enumerate(axes[2 * row + part]):
                axis.axis("off")
                if column < len(shown):
                    _show(axis, pixels[column])
                    if part == 0 and shown.targets.ndim == 1:
                        axis.set_title(class_names[int(shown.targets[column])], fontsize=8, pad=2)
        axes[2 * row, 0].text(
            0.0, 1.35, f"{name}: images, and below them the patches kept to the end ({images.kept_fraction:.0%})",
            transform=axes[2 * row, 0].transAxes, fontsize=8, weight="bold",
        )  # fmt: skip
    with replacing(path) as part_path:
        figure.savefig(part_path, dpi=120)


def _one_per_class(images: SparseImages, count: int) -> SparseImages:
    """Up to `count` images, as many classes as there are, ordered by class."""
    if images.targets.ndim != 1:
        return images.select(slice(0, count))
    seen: dict[int, list[int]] = {}
    for index, target in enumerate(images.targets.tolist()):
        seen.setdefault(target, []).append(index)
    turns = max(map(len, seen.values()))
    order = [rows[turn] for turn in range(turns) for rows in seen.values() if turn < len(rows)][:count]
    order.sort(key=lambda index: int(images.targets[index]))
    return images.select(torch.tensor(order))


def _show(axis: Any, image: Tensor) -> None:
    if image.shape[0] == 1:
        axis.imshow(image[0].numpy(), cmap="gray", vmin=0, vmax=1)
    else:
        axis.imshow(image[:3].permute(1, 2, 0).numpy())


def print_summary(report: dict[str, Any], console: Console | None = None) -> None:
    """The closing table of a run."""
    console = console or Console(width=110)
    table = Table(title=f"smi-fed: {report['status']}, seed {report['seed']}, on {report['device']}")
    for heading in ("", "architecture", "examples", "test accuracy"):
        table.add_column(heading, justify="right" if heading in ("examples", "test accuracy") else "left")
    for client in report["clients"]:
        architecture = client["architecture"] if client["admitted"] else f"refused: {client['reason']}"
        table.add_row(client["name"], architecture, str(client["num_examples"]), _percent(client["test_accuracy"]))
    table.add_section()
    table.add_row("ensemble", f"weighted by {report['ensemble']['weights']}", "",
                  _percent(report["ensemble"]["test_accuracy"]))  # fmt: skip
    student = report["student"]
    table.add_row("student", student["architecture"], "", _percent(student["test_accuracy"]), style="bold")
    console.print(table)
    seconds, inversion = report["seconds"], report["inversion"]
    console.print("seconds: " + ", ".join(f"{stage} {value:.1f}" for stage, value in seconds.items()))
    saved = 1 - inversion["flops"] / inversion["dense_flops"] if inversion["dense_flops"] else 0.0
    console.print(
        f"inversion: {inversion['images']} images, {inversion['method']}; {1 - inversion['kept_fraction']:.0%} of the "
        f"patches stopped by the end, {saved:.0%} of dense FLOPs saved"
    )


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"
