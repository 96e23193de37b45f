"""What clients measured on images of their own, put together; nothing here knows of Flower."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

NOTHING = "nothing is held out at this client, so there is nothing to evaluate"


@dataclass(frozen=True)
class Counts:
    """Over some images: how many there are, and how many of them a model got right.

    Attributes:
        images: how many.
        student: of them right by the student.
        own: of them right by the client's own model; None where it has none.
    """

    images: int
    student: int
    own: int | None = None


@dataclass(frozen=True)
class Measured:
    """What one client counted over its held-out images.

    Attributes:
        name: what the client calls itself.
        total: over all of them.
        classes: for each of the student's classes; None where the client does not tell.
    """

    name: str
    total: Counts
    classes: tuple[Counts, ...] | None = None


@dataclass(frozen=True)
class Evaluated:
    """What came of one node's evaluation.

    Attributes:
        name: how the node calls itself, or did when it last answered; empty where it never said.
        reason: why there is no measurement; empty where there is one.
    """

    node: int
    name: str = ""
    measured: Measured | None = None
    reason: str = ""

    @property
    def counts(self) -> bool:
        """Whether it has a part in the mean."""
        return self.measured is not None and self.measured.total.images > 0


def named(found: Iterable[Evaluated], known: Mapping[int, str]) -> list[Evaluated]:
    """The same in order of their names, no two of which are equal.

    Args:
        known: what nodes are called elsewhere in the report; no other node gets one of these names.
    """
    taken, lines = set(known.values()), []
    for each in sorted(found, key=lambda each: each.node):
        name = known.get(each.node) or each.name or f"node {each.node}"
        if each.node not in known and name in taken:
            name = f"{name} (node {each.node})"
        taken.add(name)
        lines.append(replace(each, name=name))
    return sorted(lines, key=lambda each: each.name)


def summary(found: Sequence[Evaluated], class_names: Sequence[str]) -> dict[str, Any]:
    """What the report says: each client, all together, the worst one, and each class over all clients.

    The mean is weighted by held-out images. The worst is the client at which the student is right
    least often. Where nobody measured anything both are None, and there is no class.

    Args:
        class_names: of the student.
    """
    measured = [each.measured for each in found if each.measured is not None and each.counts]
    lines = [_line(each, class_names) for each in found]
    by_class = [each.classes for each in measured if each.classes is not None]
    classes = zip(class_names, zip(*by_class, strict=True), strict=True) if by_class else ()
    counted = [{key: value for key, value in line.items() if key != "per_class"} for line in lines if line["images"]]
    return {
        "clients": lines,
        "mean": shares([each.total for each in measured]) if measured else None,
        "worst": min(counted, key=lambda line: (line["student_accuracy"], line["name"]), default=None),
        "per_class": [{"class": name, **shares(counts)} for name, counts in classes],
    }


def in_words(found: Mapping[str, Any]) -> str:
    """A `summary` in one line."""
    mean, worst, missing = found["mean"], found["worst"], [each["name"] for each in found["clients"] if each["reason"]]
    without = f"; without {', '.join(missing)}" if missing else ""
    if mean is None:
        return f"no client measured anything{without}"
    own = "" if mean["own_accuracy"] is None else f" (their own models {100 * mean['own_accuracy']:.1f} %)"
    lowest = f"worst at {worst['name']}, {100 * worst['student_accuracy']:.1f} %"
    share = f"student {100 * mean['student_accuracy']:.1f} % of {mean['images']} images that clients hold out"
    return f"{share}{own}; {lowest}{without}"


def shares(counts: Sequence[Counts]) -> dict[str, Any]:
    """Of several counts the images and right answers summed, and the accuracies, in [0, 1], that follow.

    A model's accuracy is over the images that were shown to it, None where there are none.
    """
    images, right = sum(each.images for each in counts), sum(each.student for each in counts)
    owners = [(each.images, each.own) for each in counts if each.own is not None]
    shown, own = sum(each[0] for each in owners), sum(each[1] for each in owners)
    return {
        "images": images,
        "student_right": right,
        "student_accuracy": right / images if images else None,
        "own_right": own if owners else None,
        "own_accuracy": own / shown if shown else None,
    }


def _line(each: Evaluated, class_names: Sequence[str]) -> dict[str, Any]:
    """One client; of the classes those that it has images of."""
    measured = each.measured
    rows = zip(class_names, measured.classes, strict=True) if measured is not None and measured.classes else ()
    return {
        "node": str(each.node),  # 64-bit ids do not survive JSON numbers
        "name": each.name,
        **shares([measured.total] if measured is not None and each.counts else []),
        "per_class": [{"class": name, **shares([counts])} for name, counts in rows if counts.images],
        "reason": each.reason or ("" if each.counts else NOTHING),
    }
