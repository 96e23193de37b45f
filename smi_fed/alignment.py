"""Teachers that know other classes and other image sizes than the student, in the student's terms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from smi_fed.checks import SettingError, require
from smi_fed.data.decoding import resize
from smi_fed.models import Classifier, ModelSpec
from smi_fed.sparse_images import SparseImages


class Aligned(nn.Module):
    """A teacher that takes images of any size and answers in the student's classes.

    Args:
        model: takes images in [0, 1] of its own size.
        classes: for each of the model's classes its index among the student's.
        num_classes: the student's.
    """

    def __init__(self, model: Classifier, classes: Sequence[int], num_classes: int) -> None:
        super().__init__()
        self.model, self.num_classes = model, num_classes
        self.same = list(classes) == list(range(num_classes))
        self.register_buffer("classes", torch.tensor(list(classes)), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (b, num_classes); minus infinity for classes that the model does not know."""
        logits = self.model(resize(images, self.model.image_size))
        if self.same:
            return logits
        known: Tensor = self.classes  # type: ignore[assignment]
        everything = logits.new_full((len(logits), self.num_classes), -torch.inf)
        return everything.index_copy(1, known.to(logits.device), logits)


def kept_pixels(mask: Tensor, patch_size: tuple[int, int], size: tuple[int, int] | None = None) -> Tensor:
    """Share (b, 1, h, w) of each pixel that is kept, of images of `mask` (b, rows, columns) shown at `size`."""
    pixels = mask.float().repeat_interleave(patch_size[0], 1).repeat_interleave(patch_size[1], 2)[:, None]
    return pixels if size is None else resize(pixels, size)


def align_targets(images: SparseImages, classes: Sequence[int] | None) -> SparseImages:
    """`images` with targets (b,) in the student's classes; multi-label targets stay as they are.

    Args:
        classes: for each class of the teacher its index among the student's; None where they are the same.
    """
    if classes is None or images.targets.ndim != 1:
        return images
    return replace(images, targets=torch.tensor(list(classes))[images.targets])


def class_positions(own: ModelSpec, student: ModelSpec) -> tuple[int, ...]:
    """For each class of `own` its index among the student's classes, by name.

    A model without class names has the student's classes in the student's order.

    Raises:
        SettingError: classes that the student does not have.
    """
    if own.class_names is None or student.class_names is None:
        count = student.num_classes
        require(own.num_classes == count, "num_classes", own.num_classes, f"{count}, where classes have no names")
        return tuple(range(count))
    once = len(set(own.class_names)) == len(own.class_names)
    require(once, "class_names", own.class_names, "different names")
    places = {name: i for i, name in enumerate(student.class_names)}
    unknown = [name for name in own.class_names if name not in places]
    if unknown:
        raise SettingError("class_names", unknown, f"the student's classes, {student.class_names}")
    return tuple(places[name] for name in own.class_names)


def union_of_classes(specs: Sequence[ModelSpec]) -> tuple[str, ...]:
    """All class names of `specs`, in the order in which they first come: a student's label space."""
    return tuple(dict.fromkeys(name for spec in specs for name in spec.class_names or ()))


def interchangeable(first: Classifier, second: Classifier) -> bool:
    """Whether weights mean the same in both models: equal shapes alone would let other heads or normalisation pass."""
    kinds = [
        (m.spec.name, dict(m.spec.kwargs), m.image_size, m.mean.flatten().tolist(), m.std.flatten().tolist())
        for m in (first, second)
    ]
    return kinds[0] == kinds[1]
