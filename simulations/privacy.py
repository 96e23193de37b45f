"""What do models, images and students tell of training examples? `python -m simulations.privacy [--seeds 0 1 2]`.

In many worlds a client's model is trained on half of the digits, inverted and distilled, and each world is
attacked with what is known of the others (`smi_fed.audit`). Modes are what a client sends: feature
statistics and label counts, one of them, neither, or an update that is clipped and noised as Flower's `LocalDpMod`
does. The picture is how many members are found where a hundredth of the others is taken for members.

Worlds are kept in the output directory. `--share 1/4` makes a quarter of them and judges nothing, so that the worlds
of an audit can be made side by side; the same command without it then judges.
"""

from __future__ import annotations

import statistics
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from simulations.methods.report import spread
from simulations.runner import Cell, Line, Lines, Page, Study, Table, command, seeds_of
from simulations.runner.ledger import digest, sources_digest
from smi_fed.audit import HELD_BY, AuditConfig, Leak, LocalPrivacy, Recipe, World, judged, marked, world
from smi_fed.checks import require
from smi_fed.config import Settings
from smi_fed.data import load_images
from smi_fed.files import read_json, write_json
from smi_fed.pipeline import PipelineConfig

ARCH = "vit_p8_w64_d4"
WORLDS, CANARIES = 16, 50
NORM = 20.0
"""Largest norm of an update: a little below that of most, which costs no accuracy."""


class Mode(NamedTuple):
    """What a client sends."""

    statistics: bool = False
    counts: bool = False
    privacy: LocalPrivacy | None = None


def noised(epsilon: float) -> Mode:
    """An update of which any two are apart by twice the norm at most, with noise for this epsilon."""
    return Mode(privacy=LocalPrivacy(NORM, 2 * NORM, epsilon))


MODES: dict[str, Mode] = {
    "statistics and counts": Mode(True, True),
    "without statistics": Mode(counts=True),
    "without counts": Mode(statistics=True),
    "weights alone": Mode(),
    "clipped": Mode(privacy=LocalPrivacy(NORM, 0.0, 1.0)),
    "epsilon 20000": noised(20_000.0),
    "epsilon 10000": noised(10_000.0),
    "epsilon 5000": noised(5_000.0),
    "epsilon 8": noised(8.0),
}
SMOKE = (
    "client.training.steps=5", "distillation.steps=3", "server.images_per_teacher=8", "inversion.batch_size=8",
    "inversion.iterations=2", "inversion.schedule='1:0.5'", "data.test_fraction=0.8",
)  # fmt: skip
RATES = {"at_0.1%": 0.001, "at_1%": 0.01}
COLOURS = dict(zip(HELD_BY, ("tab:blue", "tab:orange", "tab:green"), strict=True))


class NotJudgedError(RuntimeError):
    """Worlds of an audit are made, and it is not judged."""


def add_options(parser: ArgumentParser) -> None:
    """What of the study is measured."""
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--worlds", type=int, default=WORLDS, help="of each audit, at least 4")
    parser.add_argument("--share", default="1/1", help="2/4: make the second of four shares of the worlds, no more")
    parser.add_argument("--smoke", action="store_true", help="as little as shows that every cell runs")


def cells(options: Namespace) -> list[Cell]:
    """One audit for each mode."""
    worlds = 4 if options.smoke else options.worlds
    return [
        Cell(
            {"mode": mode, "worlds": worlds, "share": options.share, "smoke": options.smoke},
            (f"client.send_label_counts={str(MODES[mode].counts).lower()}",
             *(() if MODES[mode].counts else ("distillation.ensemble=uniform",)),
             *(() if MODES[mode].statistics else ("inversion.statistics=0.0",)), *(SMOKE if options.smoke else ())),
        )
        for mode in options.modes
    ]  # fmt: skip


def share_of(cell: Cell) -> range:
    """Numbers of the worlds that this cell makes.

    Raises:
        SettingError: a share that cannot be.
    """
    part, _, parts = cell["share"].partition("/")
    good = part.isdecimal() and parts.isdecimal() and 1 <= int(part) <= int(parts)
    require(good, "--share", cell["share"], "I/N with 1 <= I <= N")
    return range(int(part) - 1, cell["worlds"], int(parts))


def check(_settings: Settings, cell: Cell) -> None:
    """Raise SettingError for what cannot be."""
    share_of(cell)
    AuditConfig(cell["worlds"])


def measure(settings: Settings, cell: Cell) -> Line:
    """One audit, from worlds that are kept and those that are missing.

    Raises:
        NotJudgedError: a share of several is asked for.
    """
    mode = MODES[cell["mode"]]
    data, test = load_images(settings.data)
    pipeline = PipelineConfig(settings.server.images_per_teacher, settings.inversion, settings.distillation)
    recipe = Recipe(
        settings.model.of_client(0, ARCH), settings.model.student, settings.client.training, pipeline, *mode
    )
    config = AuditConfig(cell["worlds"], CANARIES)
    name = digest(settings, recipe, config, str(cell.device), sources_digest())
    home = cell.output / "worlds" / f"{cell['mode'].replace(' ', '-')}-{settings.seed}-{name}"
    home.mkdir(parents=True, exist_ok=True)
    made = lambda number: world(recipe, data, test, config, settings.seed, number, cell.device)  # noqa: E731
    kept = [_kept(home / f"{number}.json", number, made) for number in share_of(cell)]
    if len(kept) < config.worlds:
        raise NotJudgedError(f"{len(kept)} of {config.worlds} worlds are in {home}; without --share they are judged")
    found = judged([World.read(each["world"]) for each in kept], marked(data, config, settings.seed)[1])
    return {
        "examples": {held: told(leak) for held, leak in found.examples.items()},
        "canaries": {held: told(leak) for held, leak in found.canaries.items()},
        "ssim": asdict(found.ssim), "features": asdict(found.features), "accuracy": found.accuracy,
        "noise": mode.privacy.deviation if mode.privacy else 0.0, "seconds": [each["seconds"] for each in kept],
    }  # fmt: skip


def _kept(path: Path, number: int, made: Callable[[int], World]) -> dict[str, Any]:
    """A world from its file, made where it is not there."""
    if not path.exists():
        begin = time.process_time()
        plain = made(number).plain()
        write_json(path, {"seconds": time.process_time() - begin, "world": plain})
    return read_json(path)


def told(leak: Leak) -> Line:
    """As a line has it."""
    rates = {name: leak.found[rate] for name, rate in RATES.items()}
    return {"auc": leak.auc, **rates, "members": leak.members, "others": leak.others}


def table(lines: Lines) -> list[Table]:
    """Who is found; and how good models are, and how near images."""
    by_mode = [(mode, own) for mode in MODES if (own := [line for line in lines if line["mode"] == mode])]
    found = [["a client sends", "attacked", "found at 0.1 %, %", "at 1 %, %", "AUC",
              "canaries: at 0.1 %, %", "at 1 %, %", "AUC"]]  # fmt: skip
    beside = [["a client sends", "noise", "model on its own, %", "on test, %", "student, %",
               "nearer to training, SSIM, %", "by features, %", "nearest SSIM: training", "held out"]]  # fmt: skip
    for mode, own in by_mode:
        found += [[mode if held == HELD_BY[0] else "", held, *_leaks(own, held)] for held in HELD_BY]
        beside.append([mode, *_beside(own)])
    worlds, ways = lines[0]["worlds"], lines[0]["examples"]["model"]
    note = (
        f"Seeds {seeds_of(lines)}, {worlds} worlds each. Found: members that are found where so many of the others are "
        f"taken for members; an audit has {ways['members']:,} decisions on members, and on canaries "
        f"{lines[0]['canaries']['model']['members']:,}. Guessing finds 0.1 % and 1 %, and has an AUC of 0.5."
    )
    return [Table("who is found", found, [note]), Table("accuracy, and what images resemble", beside)]


def _leaks(own: Lines, held: str) -> list[str]:
    return [
        cell
        for kind in ("examples", "canaries")
        for cell in (
            *(spread([100 * line[kind][held][rate] for line in own]) for rate in RATES),
            f"{statistics.fmean(line[kind][held]['auc'] for line in own):.3f}",
        )
    ]


def _beside(own: Lines) -> list[str]:
    mean = lambda kind, key: statistics.fmean(line[kind][key] for line in own)  # noqa: E731
    return [
        f"{own[0]['noise']:.2g}" if own[0]["noise"] else "none",
        *(spread([100 * line["accuracy"][key] for line in own]) for key in ("model on its own", "model", "student")),
        *(spread([100 * line[kind]["nearer"] for line in own]) for kind in ("ssim", "features")),
        f"{mean('ssim', 'training'):.3f}", f"{mean('ssim', 'held_out'):.3f}",
    ]  # fmt: skip


def figure(lines: Lines) -> Any:
    """Members found at 1 % by mode, for all examples and for canaries; a mark for each seed, a bar for the mean."""
    from matplotlib.figure import Figure

    modes = [mode for mode in MODES if any(line["mode"] == mode for line in lines)]
    drawn = Figure(figsize=(10, 1.2 + 0.55 * len(modes)), layout="constrained")
    for axis, kind in zip(drawn.subplots(1, 2, sharey=True), ("examples", "canaries"), strict=True):
        for place, held in enumerate(HELD_BY):
            values = [[100 * x[kind][held]["at_1%"] for x in lines if x["mode"] == mode] for mode in modes]
            rows = [row + 0.27 * (place - 1) for row in range(len(modes))]
            axis.barh(rows, [statistics.fmean(each) for each in values], 0.25, color=COLOURS[held], label=held)
            for row, each in zip(rows, values, strict=True):
                axis.plot(each, [row] * len(each), "k.", markersize=3)
        axis.axvline(1, color="tab:gray", linestyle="--", linewidth=1)
        axis.set(title=kind, xlabel="members found at 1 % false positives, in %", yticks=range(len(modes)))
        axis.set_yticklabels(modes)
    drawn.axes[0].invert_yaxis()
    drawn.axes[0].legend(loc="lower right")
    return drawn


STUDY = Study(
    name="privacy", about=__doc__, cells=cells, measure=measure, table=table, figure=figure, picture="privacy.png",
    words=("experiment=privacy",), options=add_options, check=check, in_turn="mode",
    page=Page("docs/privacy.md", "Raw audits", lambda _: ", digits, on one thread of a CPU.", markdown=True),
)  # fmt: skip
main = command(STUDY)


if __name__ == "__main__":
    sys.exit(main())
