"""When a student has learned enough: what it says on synthetic images that it is not taught."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from smi_fed.distillation.config import START, DistillationConfig
from smi_fed.distillation.shown import distillation_loss
from smi_fed.distillation.views import Draw, show
from smi_fed.lazy import one_by_one
from smi_fed.sparse_images import SparseImages, classes_of
from smi_fed.training import computing, even_shares, held_out, predict
from smi_fed.tuning import Best


def divide(
    sets: Sequence[SparseImages], config: DistillationConfig, shares: Tensor | None, generator: torch.Generator
) -> tuple[Tensor | None, Tensor]:
    """How often each image is shown, None for evenly, and the places of those that are held out."""
    if not config.balanced and not config.validation:
        return shares, torch.empty(0, dtype=torch.long)
    targets = torch.cat(one_by_one(sets, classes_of))
    _, held = held_out(targets, config.validation, generator)
    shown = torch.ones(len(targets)) if shares is None else shares.clone()
    if config.balanced:
        shown *= even_shares(targets)
    shown[held] = 0
    return shown, held


Ask = Callable[[Sequence[Draw], Sequence[Tensor]], list[Tensor]]


class Watch:
    """Compares the student with the ensemble on the images of `held`; without any it never stops anything.

    The start is compared too, so that what is kept never agrees less than it. Patience does not count it: a new
    student may get worse before it gets better.

    Args:
        held: the images, as `unchanged` draws them.
        ask: draws and their views to the ensemble's probabilities (b, classes) of each.
        size: of the student's images.
    """

    def __init__(
        self, student: nn.Module, sets: Sequence[SparseImages], held: Draw, config: DistillationConfig, ask: Ask,
        size: tuple[int, int],
    ) -> None:  # fmt: skip
        self.student, self.config, self.device = student, config, next(student.parameters()).device
        self.start, self.best, self.step = Best(student, 1), Best(student, config.patience), 0
        self.views, self.answers = torch.empty(0), torch.empty(0)
        self.every = max(1, math.ceil((sum(one_by_one(sets, len)) - len(held.rows)) / config.batch_size))
        if len(held.rows):
            (self.views,) = show(sets, [held], size, self.device)
            self.answers = ask([held], [self.views])[0].cpu()

    def done(self, step: int) -> bool:
        """Whether, at the end of an epoch or of the last step, the loss has not fallen for as long as patience says."""
        if not len(self.views) or (step % self.every and step != self.config.steps):
            return False
        before = self.best.loss
        enough = self.best.done(self._loss())
        if self.best.loss < before:
            self.step = step
        return enough

    def begin(self) -> None:
        """Look at the student before its first step."""
        if len(self.views):
            loss = self._loss()
            self.start.done(loss if math.isfinite(loss) else sys.float_info.max)

    def keep(self, steps: int) -> str:
        """Put the weights back that agree best, after `steps` steps; says which, see `DistillationRecord.kept`."""
        if not len(self.views):
            return f"step {steps}"
        better = self.best.loss < self.start.loss
        (self.best if better else self.start).restore()
        return f"step {self.step}" if better else START

    def _loss(self) -> float:
        with computing(self.config, self.device):
            logits = predict(self.student, self.views)
        return float(distillation_loss(logits, self.answers, self.config.temperature))
