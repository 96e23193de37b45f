"""Training from scratch as the digits demo does it, written down plainly: `train` has to take the very same steps."""

import math

import torch
from torch.nn import functional as F

from smi_fed.muon import Muon


def train_plainly(model, data, config, generator):
    """The mean loss of the last tenth of the steps; the model is trained in place."""
    hidden, rest = [], []
    for name, weight in model.named_parameters():
        matrix = weight.ndim == 2 and "blocks." in name and name.endswith(".weight")
        (hidden if matrix and config.optimiser == "muon" else rest).append(weight)
    decay = config.weight_decay
    parts = [torch.optim.AdamW(rest, lr=config.learning_rate, betas=config.betas, weight_decay=decay)]
    parts += [Muon(hidden, lr=config.muon_learning_rate, weight_decay=decay)] if hidden else []
    peaks = [config.learning_rate, config.muon_learning_rate]
    rise, losses = max(1, round(config.warmup * config.steps)), []
    model.train()
    for step in range(config.steps):
        falling = 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, config.steps - rise)))
        rate = (step + 1) / rise if step < rise else falling
        for part, peak in zip(parts, peaks, strict=False):
            part.param_groups[0]["lr"] = peak * rate
        rows = torch.randint(len(data), (config.batch_size,), generator=generator)
        shift = torch.randint(-config.jitter, config.jitter + 1, (2, config.batch_size), generator=generator).T
        batch = torch.stack([
            image.roll(tuple(each.tolist()), (1, 2)) for image, each in zip(data.images[rows], shift, strict=True)
        ])  # fmt: skip
        loss = F.cross_entropy(model(batch), data.labels[rows])
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        for part in parts:
            part.step()
        losses.append(loss.detach())
    model.eval()
    return float(torch.stack(losses[-max(1, config.steps // 10) :]).mean())
