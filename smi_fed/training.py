"""Supervised training and evaluation of one model."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smi_fed.augmentation import augmentation
from smi_fed.data import Images, ImageSet, LazyImages
from smi_fed.muon import Muon
from smi_fed.tokens import roll_images
from smi_fed.training_config import TrainingConfig
from smi_fed.tuning import Best, decayed_groups, only_trained, training_mode

__all__ = [
    "Loss",
    "Optimiser",
    "TrainingConfig",
    "accuracy",
    "cross_entropy",
    "evaluating",
    "predict",
    "seeded_torch",
    "shift_images",
    "train",
]

log = logging.getLogger("smi_fed")


class Optimiser:
    """Muon and AdamW for one model, with warm-up and cosine decay of their rates.

    A small ViT from random weights learns several times faster when its hidden matrices are
    stepped by Muon (Jordan et al., 2024: momentum, then the nearest orthogonal matrix) than
    by AdamW alone; Muon is not meant for vectors, embeddings and the head.
    """

    def __init__(self, model: nn.Module, config: TrainingConfig) -> None:
        self.weights = [weight for weight in model.parameters() if weight.requires_grad]
        self.clip = config.clip
        muon = config.optimiser == "muon"
        named = [each for each in model.named_parameters() if each[1].requires_grad] if muon else []
        hidden = [w for name, w in named if w.ndim == 2 and "blocks." in name and name.endswith(".weight")]
        chosen = {id(weight) for weight in hidden}
        rest: Any = [weight for weight in self.weights if id(weight) not in chosen]
        if config.layer_decay < 1:
            rest = decayed_groups(model, config.learning_rate, config.layer_decay, config.weight_decay)
        adamw = torch.optim.AdamW(rest, lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay)
        self.parts: list[torch.optim.Optimizer] = [adamw]
        if hidden:
            self.parts.append(Muon(hidden, lr=config.muon_learning_rate, weight_decay=config.weight_decay))
        self.schedules = [torch.optim.lr_scheduler.LambdaLR(part, _rate(config)) for part in self.parts]

    def step(self, loss: Tensor) -> None:
        """One step down `loss`, with the gradient's norm clipped."""
        for part in self.parts:
            part.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.weights, self.clip)
        for part in self.parts:
            part.step()
        for schedule in self.schedules:
            schedule.step()


def _rate(config: TrainingConfig) -> Callable[[int], float]:
    """Share of the peak rate at a step: a line up, then half a cosine down to 0."""
    rise = max(1, round(config.warmup * config.steps))

    def rate(step: int) -> float:
        if step < rise:
            return (step + 1) / rise
        return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, config.steps - rise)))

    return rate


def shift_images(images: Tensor, largest: int, generator: torch.Generator) -> Tensor:
    """Each image (b, c, h, w) shifted cyclically by its own draw of at most `largest` pixels per axis."""
    return _shifted(images, draw_shift(len(images), largest, generator))


def _shifted(images: Tensor, shift: Tensor | None) -> Tensor:
    return images if shift is None else roll_images(images, shift.to(images.device))


def draw_shift(count: int, largest: int, generator: torch.Generator) -> Tensor | None:
    """(count, 2) pixels per axis, each from -largest to largest; None, without a draw, where `largest` is 0."""
    return torch.randint(-largest, largest + 1, (2, count), generator=generator).T if largest else None


@contextmanager
def seeded_torch(generator: torch.Generator) -> Iterator[None]:
    """What draws from torch's own state inside, such as dropout, is a function of the state of `generator`.

    Nothing is taken from `generator`: its draws are the same with dropout and without. Torch's
    state, on the CPU and on CUDA devices, is as before afterwards.
    """
    if generator is torch.default_generator:
        yield
        return
    copy = torch.Generator(generator.device)
    copy.set_state(generator.get_state())
    seed = int(torch.randint(2**62, (), generator=copy, device=copy.device))
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also seed devices not yet in use
        if devices:
            torch.cuda.manual_seed_all(seed)
        yield


Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""(model, images (b, c, h, w), labels (b,)) -> scalar."""


def cross_entropy(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy."""
    return F.cross_entropy(model(images), labels)


def train(
    model: nn.Module,
    data: ImageSet,
    config: TrainingConfig,
    *,
    generator: torch.Generator,
    loss: Loss = cross_entropy,
    progress: Callable[[int, Tensor], None] | None = None,
) -> float:
    """Train in place on the model's own device; leaves it in evaluation mode.

    Args:
        generator: source of every random choice, those of dropout and stochastic depth too. Of lazy images the
            next batch is drawn before a step: after an early stop it has given one batch more.
        loss: what is minimised.

    Returns:
        The mean loss of the last tenth of the steps.

    Raises:
        ValueError: there is no image to train on.
        SettingError: more layers to train than the model has.
    """
    if not len(data):
        raise ValueError("cannot train on an empty partition: got 0 images")
    device = next(model.parameters()).device
    shown, held = held_out(data.labels, config.validation, generator)
    config = config.over(len(shown))
    epoch = math.ceil(len(shown) / config.batch_size)
    shares = even_shares(data.labels[shown]) if config.balanced else None
    views, losses = augmentation(config.augmentation), []
    with only_trained(model, config.trainable), seeded_torch(generator):
        optimiser, best = Optimiser(model, config), Best(model, config.patience)
        training_mode(model, config.trainable)
        for step, (rows, shift, images) in enumerate(_batches(data.images, shown, shares, config, generator), 1):
            batch = _shifted(views(images).to(device), shift)
            with computing(config, device):
                now = loss(model, batch, data.labels[rows].to(device))
            optimiser.step(now)
            losses.append(now.detach())
            if progress is not None:
                progress(step, losses[-1])
            if len(held) and (step % epoch == 0 or step == config.steps):
                with computing(config, device):
                    worst = best.done(loss_over(model, data, held))
                if worst:
                    log.info("early stop after %d of %d steps", step, config.steps)
                    break
        best.restore()
    model.eval()
    return float(torch.stack(losses[-max(1, len(losses) // 10) :]).mean())


def _batches(
    images: Images, shown: Tensor, shares: Tensor | None, config: TrainingConfig, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor | None, Tensor]]:
    """For each step the rows (b,) of a batch, how far each image is to be shifted, and the images (b, c, h, w).

    Of lazy images the next batch is decoded while its predecessor is in use; not where the generator is torch's own,
    from which dropout draws in between.
    """
    drawn = deque[tuple[Tensor, Tensor | None]]()

    def draw() -> Iterator[Tensor]:
        for _ in range(config.steps):
            rows = shown[draw_rows(len(shown), config.batch_size, shares, generator)]
            drawn.append((rows, draw_shift(len(rows), config.jitter, generator)))
            yield rows

    if isinstance(images, LazyImages) and generator is not torch.default_generator:
        found = images.batches(draw())
    else:
        found = (images[rows] for rows in draw())
    for batch in found:
        yield *drawn.popleft(), batch


def computing(config: TrainingConfig, device: torch.device) -> torch.autocast:
    """Where a model computes in the precision that is asked for."""
    return torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bfloat16")


def draw_rows(count: int, size: int, shares: Tensor | None, generator: torch.Generator) -> Tensor:
    """(size,) places among `count`, evenly or in the proportions of `shares` (count,)."""
    if shares is None:
        return torch.randint(count, (size,), generator=generator)
    return torch.multinomial(shares, size, replacement=True, generator=generator)


def even_shares(labels: Tensor) -> Tensor:
    """(n,) how often each image is drawn, so that each class that is there is drawn as often as any other."""
    return 1 / torch.bincount(labels)[labels].float()


def held_out(labels: Tensor, share: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Places of the images that are trained on, and of `share` of each class that are not, rounded down.

    Without a share nothing is drawn.
    """
    order = torch.randperm(len(labels), generator=generator) if share else torch.arange(len(labels))
    held = torch.zeros(len(labels), dtype=torch.bool)
    for name in labels.unique() if share else ():
        own = order[labels[order] == name]
        held[own[: int(share * len(own))]] = True
    return (~held).nonzero()[:, 0], held.nonzero()[:, 0]


@torch.no_grad()
def loss_over(model: nn.Module, data: ImageSet, rows: Tensor, batch_size: int = 256) -> float:
    """Mean cross-entropy over the images at `rows`, in evaluation mode; the model's mode is as before afterwards."""
    logits = predict(model, data.select(rows).images, batch_size)
    return float(F.cross_entropy(logits, data.labels[rows]))


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; every module's own mode is as before afterwards."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


@torch.no_grad()
def predict(model: nn.Module, images: Images, batch_size: int = 256) -> Tensor:
    """Logits (n, classes) on the CPU, in evaluation mode; the model's mode is as before afterwards."""
    device = next(model.parameters()).device
    with evaluating(model):
        return torch.cat([model(batch.to(device)).float().cpu() for batch in images.split(batch_size)])


def accuracy(model: nn.Module, data: ImageSet) -> float:
    """Share of images whose class the model names; in [0, 1]."""
    return float((predict(model, data.images).argmax(1) == data.labels).float().mean())
