"""Tables of `simulations.hostile`, from its JSON lines."""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Callable

from simulations.methods.report import spread
from simulations.runner import Line, Lines, Table, seeds_of

NONE, MEAN = "none", "mean"


def table(lines: Lines) -> list[Table]:
    """Of each skew the students' accuracy, the backdoor's success, and who was weighted down."""
    found = []
    for data, skew in dict.fromkeys((line["data"], line["skew"]) for line in lines):
        here = [line for line in lines if (line["data"], line["skew"]) == (data, skew)]
        title = f"{data}, {_in_words(skew)}, seeds {seeds_of(here)}"
        found.append(_grid(f"{title}: accuracy in % (points lost to no attack under the mean)", here, _accuracy(here)))
        found.append(
            _grid(f"{title}: hostile, and honest, clients that were weighted down", here, _doubted, judged=True)
        )
        if any(line["attack"] == "backdoor" for line in here):
            found.append(Table(f"{title}: the backdoor", _backdoor(here), _shuffling(here)))
    return [each for each in found if len(each.rows) > 1]


def _in_words(skew: float | str) -> str:
    return f"Dirichlet({skew})" if isinstance(skew, float) else str(skew)


def _grid(title: str, lines: Lines, cell: Callable[[Lines], str], judged: bool = False) -> Table:
    """Defences by attacks."""
    attacks = list(dict.fromkeys(line["attack"] for line in lines))
    names = list(dict.fromkeys(line["defence"] for line in lines if not judged or line["judging_seconds"]))
    rows = [["defence", *(each if each != NONE else "no attack" for each in attacks)]]
    for name in names:
        own = [line for line in lines if line["defence"] == name]
        rows.append([name, *(cell([line for line in own if line["attack"] == attack]) for attack in attacks)])
    return Table(title, rows)


def _accuracy(lines: Lines) -> Callable[[Lines], str]:
    clean = {x["seed"]: x["accuracy"] for x in lines if (x["attack"], x["defence"]) == (NONE, MEAN)}

    def cell(here: Lines) -> str:
        if not here:
            return ""
        lost = [100 * (clean[line["seed"]] - line["accuracy"]) for line in here if line["seed"] in clean]
        known = f" ({statistics.fmean(lost):.1f})" if lost else ""
        return spread([100 * line["accuracy"] for line in here]) + known + _fewer(here, lines)

    return cell


def _fewer(here: Lines, lines: Lines) -> str:
    """Which seeds, where they are not all."""
    return "" if seeds_of(here) == seeds_of(lines) else f", seed {', '.join(map(str, seeds_of(here)))}"


def _doubted(here: Lines) -> str:
    if not here:
        return ""
    caught, hostile = (sum(line[key] for line in here) for key in ("caught", "hostile"))
    honest = sum(line["clients"] - line["hostile"] for line in here)
    return f"{caught} of {hostile}, {sum(line['wrongly_doubted'] for line in here)} of {honest}"


def _backdoor(lines: Lines) -> list[list[str]]:
    """By defence how often a trigger makes the student name its class: under attack, and anyway."""
    rows = [["defence", "trigger's success, backdoor, %", "without an attack, %", "seconds judging / distilling"]]
    for name in dict.fromkeys(line["defence"] for line in lines):
        own = [line for line in lines if line["defence"] == name]
        shares = [_success([line for line in own if line["attack"] == attack]) for attack in ("backdoor", NONE)]
        judging, taught = (statistics.fmean(x[key] for x in own) for key in ("judging_seconds", "distillation_seconds"))
        rows.append([name, *shares, f"{judging:.0f} / {taught:.0f}"])
    return rows


def _success(here: Lines) -> str:
    return spread([100 * line["backdoor_success"] for line in here]) if here else ""


def _shuffling(lines: Lines) -> list[str]:
    """What ABD's test would say of the same images."""
    own: list[float] = []
    honest: list[float] = []
    for line in lines:
        for place, shares in enumerate(line.get("surviving", ())):
            if place < line["hostile"]:
                own += [shares[0]] if shares[0] is not None else []
            elif line["attack"] == "backdoor":
                honest += [share for share in shares if share is not None]
    if not own:
        return []
    return [
        f"ABD's shuffling test: {100 * statistics.fmean(own):.0f} % of the backdoored clients' images of the trigger's "
        f"class keep it in shuffled models, and {100 * statistics.fmean(honest):.0f} % of honest clients' images."
    ]


def arguments(lines: Lines) -> str:
    """What was asked for, as far as lines tell; of each kind of data a command."""
    commands = []
    for data in dict.fromkeys(line["data"] for line in lines):
        own = [line for line in lines if line["data"] == data]
        words = ["--data", data, "--seeds", *map(str, seeds_of(own))]
        for option in ("attack", "defence"):
            words += [f"--{option}s", *dict.fromkeys(str(line[option]) for line in own)]
        commands.append(shlex.join([*words, *own[-1].get("changes", [])]))
    return "`, `python -m simulations.hostile ".join(commands)


def note(lines: Lines) -> str:
    """Behind the command."""
    where: Line = lines[-1]["environment"]
    return (
        f": mean ± standard deviation over the seeds, {where['device_name']}, one thread; seconds are those of the "
        "process."
    )
