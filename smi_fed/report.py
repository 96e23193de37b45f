"""What a run leaves behind: report.json, the student and its pictures."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

from smi_fed.checks import require
from smi_fed.files import FileFormatError, load_tensors, read_json, reading, replacing, save_tensors
from smi_fed.models import Classifier, ModelSpec, architecture_of, build_model
from smi_fed.sparse_images import SparseImages
from smi_fed.wrappers import REMEDY, matched, plain_state, unwrapped

SCHEMA_VERSION = 1
STUDENT_FORMAT = "smi-fed.student"
STUDENT_VERSION = 1

COLOURS = {"student": "#0072b2", "ensemble": "#d97a00", "client": "#949494", "rest": "#3b1f5c"}
"""Told apart from each other and from white, whichever kind of cone one lacks."""


def save_student(path: str | os.PathLike[str], student: nn.Module) -> None:
    """Write weights and spec as safetensors, atomically.

    Args:
        student: what `build_model` built, in wrappers or not.

    Raises:
        SettingError: no such model, or one whose layers are no longer those of its spec:
            `load_student` could not build it again.
    """
    own = unwrapped(student)
    require(isinstance(own, Classifier), "student", type(own).__name__, f"what build_model built; {REMEDY}")
    assert isinstance(own, Classifier)
    weights = plain_state(own)
    spec = architecture_of(own.spec)
    with torch.device("meta"):
        expected = build_model(spec).state_dict()
    differ = sorted(weights.keys() ^ expected.keys())
    require(not differ, "student", differ[:3], f"the weights of its spec; {REMEDY}")
    save_tensors(path, weights, STUDENT_FORMAT, STUDENT_VERSION, spec=spec.to_json())


def load_student(path: str | os.PathLike[str]) -> Classifier:
    """The student that `save_student` wrote, in evaluation mode.

    Raises:
        FileNotFoundError, FileFormatError: naming the file and what is wrong with it.
    """
    weights, metadata = load_tensors(path, STUDENT_FORMAT, STUDENT_VERSION)
    with reading(path):
        spec = architecture_of(ModelSpec.from_json(metadata["spec"]))
        with torch.device("meta"):  # no memory for a model that the weights are not of
            shape = build_model(spec)
        weights = matched(weights, shape.state_dict())
        shape.load_state_dict(weights, assign=True)
        model = build_model(spec)
        model.load_state_dict(weights)
    return model.eval()


def read_report(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A run's report.json.

    Raises:
        FileNotFoundError: there is none.
        FileFormatError: not a report, or one of an unknown schema version (both are named).
    """
    found = read_json(path)
    schema = found.get("schema") if isinstance(found, dict) else None
    if schema != SCHEMA_VERSION:
        raise FileFormatError(f"{path}: report version is {schema!r}, this smi-fed reads {SCHEMA_VERSION}")
    return found


def plot_curves(path: str | os.PathLike[str], losses: Sequence[float], rounds: Sequence[dict[str, Any]],
                clients: Sequence[dict[str, Any]], ensemble_accuracy: float | None) -> None:  # fmt: skip
    """Distillation loss beside the accuracies of clients, ensemble and student; where none was measured, their data."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(range(1, len(losses) + 1), losses, color=COLOURS["student"], linewidth=1)
    left.set(xlabel="distillation step", ylabel="T² KL to the ensemble", title="Student's loss", yscale="log")
    admitted = [client for client in clients if client["admitted"]]
    scores = [(client["name"], client["test_accuracy"], COLOURS["client"]) for client in admitted]
    scores.append(("ensemble", ensemble_accuracy, COLOURS["ensemble"]))
    scores += [(f"student, round {r['round']}", r["student_test_accuracy"], COLOURS["student"]) for r in rounds]
    if bars := [(name, 100 * score, colour) for name, score, colour in scores if score is not None]:
        _bars(right, bars, "%.1f", xlabel="test accuracy in %", xlim=(0, 112), title="Held-out test split")
    else:
        bars = [(client["name"], client["num_examples"], COLOURS["client"]) for client in admitted]
        _bars(right, bars, "%d", xlabel="clients' images", title="Clients' images; nothing was tested")
    with replacing(path) as part:
        figure.savefig(part, dpi=120)


def plot_evaluation(path: str | os.PathLike[str], measured: dict[str, Any]) -> None:
    """Each client's accuracies on its own held-out images, their mean and the worst; beside them each class.

    Args:
        measured: `evaluation` of a report in which at least one client measured something.
    """
    from matplotlib.figure import Figure

    clients = [(f"{each['name']} ({each['images']})", each) for each in _measured_lines(measured)]
    classes = [(f"{each['class']} ({each['images']})", each) for each in measured["per_class"] if each["images"]]
    rows = max(len(clients), len(classes))
    figure = Figure(figsize=(10, max(4.0, 0.4 * rows + 1.5)), layout="constrained")
    left, right = figure.subplots(1, 2)
    _pairs(left, clients, title="Clients, with their held-out images")
    _pairs(right, classes, title="Classes, over all clients")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    with replacing(path) as part:
        figure.savefig(part, dpi=120)


def _measured_lines(measured: dict[str, Any]) -> list[dict[str, Any]]:
    """The clients that measured something, the weighted mean and the worst, as they are shown."""
    lines = [each for each in measured["clients"] if each["images"]]
    worst = {**measured["worst"], "name": f"worst: {measured['worst']['name']}"}
    return [*lines, {**measured["mean"], "name": "weighted mean"}, worst]


def _pairs(axes: Any, lines: Sequence[tuple[str, dict[str, Any]]], title: str) -> None:
    """Two horizontal bars for each named line, the student's and the own model's accuracy, from the top."""
    for offset, kind, key, label in (
        (-0.2, "student", "student_accuracy", "student"), (0.2, "client", "own_accuracy", "own model"),
    ):  # fmt: skip
        shown = [(place + offset, 100 * line[key]) for place, (_, line) in enumerate(lines) if line[key] is not None]
        if shown:
            places, lengths = zip(*shown, strict=True)
            bars = axes.barh(places, lengths, height=0.4, color=COLOURS[kind], label=label)
            axes.bar_label(bars, fmt="%.1f", padding=3, fontsize=7)
    axes.set_yticks(range(len(lines)), [name for name, _ in lines], parse_math=False)
    axes.invert_yaxis()
    axes.set(xlabel="accuracy in %", xlim=(0, 112), title=title)


def _bars(axes: Any, bars: Sequence[tuple[str, float, str]], form: str, **labels: Any) -> None:
    """A horizontal bar for each (name, length, colour), from the top."""
    names, lengths, colours = zip(*bars[::-1], strict=True)
    axes.bar_label(axes.barh(range(len(bars)), lengths, color=colours), fmt=form, padding=3)
    axes.set_yticks(range(len(bars)), [str(name) for name in names], parse_math=False)
    axes.margins(x=0.12)
    axes.set(**labels)


def plot_images(
    path: str | os.PathLike[str],
    found: Sequence[SparseImages],
    names: Sequence[str],
    class_names: Sequence[str],
    columns: int = 12,
) -> None:
    """Per teacher a row of images, and below it the same with only the patches that were kept."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(columns * 0.75, len(found) * 2.1), layout="constrained")
    axes = figure.subplots(len(found), squeeze=False)[:, 0]
    for axis, images, name in zip(axes, found, names, strict=True):
        shown = one_per_class(images, columns)
        rows = [_side_by_side(pixels) for pixels in (shown.images, shown.masked(0.5))]
        axis.imshow(torch.cat(rows).numpy(), vmin=0, vmax=1)
        axis.set_title(
            f"{name}: images, and below the patches kept to the end ({images.kept_fraction:.0%})", fontsize=9
        )
        width = rows[0].shape[1] / len(shown)
        labels = [class_names[int(target)] for target in shown.targets] if shown.targets.ndim == 1 else []
        axis.set_xticks([(i + 0.5) * width for i in range(len(labels))], labels, fontsize=8, parse_math=False)
        axis.tick_params(length=0)
        axis.set_yticks([])
        axis.spines[:].set_visible(False)
    with replacing(path) as part:
        figure.savefig(part, dpi=120)


def _side_by_side(images: Tensor, gap: int = 2) -> Tensor:
    """Images (n, c, h, w) as one RGB picture (h + gap, n (w + gap), 3) with white gaps."""
    colour = images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images[:, :3]
    framed = torch.nn.functional.pad(colour, (0, gap, 0, gap), value=1.0)
    return torch.cat(list(framed), dim=2).permute(1, 2, 0)


def one_per_class(images: SparseImages, count: int) -> SparseImages:
    """Up to `count` images, as many classes as there are, ordered by class.

    A second image of a trajectory comes after all others' first, since it looks much like the first.
    """
    targets = images.targets.tolist() if images.targets.ndim == 1 else [0] * len(images)
    siblings, turns, order = Counter[int](), Counter[tuple[int, int]](), []
    for index, (trajectory, target) in enumerate(zip(images.ids.tolist(), targets, strict=True)):
        rank = siblings[trajectory]
        order.append((rank, turns[rank, target], index))
        siblings[trajectory] += 1
        turns[rank, target] += 1
    chosen = [index for *_, index in sorted(order)[:count]]
    return images.select(torch.tensor(sorted(chosen, key=lambda index: targets[index])))


def print_summary(report: dict[str, Any], console: Console | None = None) -> None:
    """The closing table of a run."""
    console = console or Console(width=110)
    table = Table(title=f"smi-fed: {report['status']}, seed {report['seed']}, on {report['device']}")
    numbers = ("examples", "test accuracy", "received")
    for heading in ("", "architecture", "start", *numbers):
        table.add_column(heading, justify="right" if heading in numbers else "left")
    for client in report["clients"]:
        late = f", {lateness(client['age'])}" if client.get("age") else ""
        architecture = client["architecture"] + late if client["admitted"] else f"refused: {client['reason']}"
        architecture = "; ".join(filter(None, [architecture, client.get("doubt")]))
        # A reason quotes what a client sent: brackets in it are no markup.
        name, architecture, start = escape(client["name"]), escape(architecture), _started(client.get("start"))
        received = decimal(client["bytes_from_client"]) if "bytes_from_client" in client else ""
        examples, accuracy = str(client["num_examples"]), _percent(client["test_accuracy"])
        table.add_row(name, architecture, start, examples, accuracy, received)
    table.add_section()
    if report["ensemble"]:
        table.add_row("ensemble", f"weighted by {report['ensemble']['weights']}", "", "",
                      _percent(report["ensemble"]["test_accuracy"]))  # fmt: skip
    student = report["student"]
    start, accuracy = _started(student.get("start"), report.get("start")), _percent(student["test_accuracy"])
    if report.get("finish"):
        before = _percent(report["rounds"][-1]["student_test_accuracy"])
        table.add_row("as distilled", student["architecture"], start, "", before)
        start = "its last head by class statistics"
    table.add_row("student", student["architecture"], start, "", accuracy, style="bold")
    console.print(table)
    if report.get("evaluation"):
        console.print(_evaluation_table(report["evaluation"]))
    seconds, inversion = report["seconds"], report["inversion"]
    console.print("seconds: " + ", ".join(f"{stage} {value:.1f}" for stage, value in seconds.items()))
    if not inversion:
        return
    saved = 1 - inversion["flops"] / inversion["dense_flops"] if inversion["dense_flops"] else 0.0
    console.print(
        f"inversion: {inversion['images']} images, {inversion['method']}; {1 - inversion['kept_fraction']:.0%} of the "
        f"patches stopped by the end, {saved:.0%} of dense FLOPs saved"
    )


def lateness(age: int) -> str:
    """How old a client's model is, in words; empty where it is of this round."""
    return f"of {age} round{'s' * (age > 1)} ago" if age else ""


def _started(own: str | None, start: str | None = None) -> str:
    """Where a model started, in words.

    Args:
        own: what its weights were, see `smi_fed.starts.start_of`; None where nobody knows.
        start: the run's `strategy.start`, for the student.
    """
    words = {"pretrained": "pretrained (timm)", "file": "pretrained (file)"}.get(own or "", own or "")
    return {"average": "clients' average", "statistics": f"{words}, head by class statistics"}.get(start or "", words)


def _evaluation_table(measured: dict[str, Any]) -> Table:
    """What each client measured, the weighted mean and the worst; or why a client measured nothing."""
    table = Table(title="on what clients hold out of their own images")
    for heading in ("", "images", "student", "own model"):
        table.add_column(heading, justify="right" if heading else "left")
    for each in measured["clients"]:
        name = each["name"] + (f": {each['reason']}" if each["reason"] else "")
        _add_accuracies(table, name, each)
    if measured["mean"]:
        table.add_section()
        _add_accuracies(table, "weighted mean", measured["mean"])
        _add_accuracies(table, f"worst: {measured['worst']['name']}", measured["worst"])
    return table


def _add_accuracies(table: Table, name: str, line: dict[str, Any]) -> None:
    table.add_row(escape(name), str(line["images"]), _percent(line["student_accuracy"]), _percent(line["own_accuracy"]))


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"
