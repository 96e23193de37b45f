"""What a client does differently in later rounds: where it starts, what it learns, what it keeps."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message
from torch import Tensor, nn
from torch.nn import functional as F

from smi_fed.alignment import class_positions, resize
from smi_fed.checks import require
from smi_fed.config import Settings
from smi_fed.distillation import distillation_loss
from smi_fed.files import load_tensors, save_tensors, writable_directory
from smi_fed.models import Classifier, ModelSpec, build_model
from smi_fed.training import Loss, cross_entropy

FORMAT, VERSION = "smi-fed.client", 1
STATE = "smi-fed.own-model"

Weights = dict[str, Tensor]


class Asked:
    """What the server sent: the round, the student's weights, FedProx's mu."""

    def __init__(self, message: Message, student: ModelSpec) -> None:
        config = next(iter(message.content.config_records.values()), ConfigRecord())
        self.round = int(config.get("server-round", 1))  # type: ignore[arg-type]
        self.proximal_mu = float(config.get("proximal-mu", 0.0))  # type: ignore[arg-type]
        self.weights: Weights = next(iter(message.content.array_records.values())).to_torch_state_dict()
        self.student_spec = student

    def student(self) -> Classifier:
        """The global model."""
        with torch.random.fork_rng(devices=[]):
            model = build_model(self.student_spec)
        model.load_state_dict(self.weights)
        return model.eval()

    def fits(self, model: Classifier) -> bool:
        """Whether `model` has the student's architecture and classes, so that it can go on from its weights."""
        own = {key: value.shape for key, value in model.state_dict().items()}
        same = own == {key: value.shape for key, value in self.weights.items()}
        return same and class_positions(model.spec, self.student_spec) == tuple(range(self.student_spec.num_classes))

    def digest(self, *more: object) -> str:
        """A name for what was asked under these settings: the same question, the same name."""
        found = hashlib.sha256(repr((self.round, self.proximal_mu, *more)).encode())
        for key, value in self.weights.items():
            found.update(key.encode() + value.contiguous().numpy().tobytes())
        return found.hexdigest()


def loss_of(settings: Settings, model: Classifier, asked: Asked) -> Loss:
    """What this client minimises in this round.

    From the student's weights: cross-entropy, and FedProx's term where the server asks for
    it (Li et al., 2020). With a model of its own: cross-entropy and, from round 2 on,
    T^2 KL from the student over its own images (mutual learning's half of FML, Shen et al., 2020).
    """
    if asked.fits(model):
        return _proximal(model, asked.proximal_mu) if asked.proximal_mu else cross_entropy
    weight, temperature = settings.client.student_weight, settings.client.student_temperature
    if asked.round == 1 or not weight:  # the first student has random weights
        return cross_entropy
    student = asked.student()
    places = torch.tensor(class_positions(model.spec, asked.student_spec))

    def loss(own: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        logits = own(images)
        with torch.no_grad():
            wanted = (student(resize(images, student.image_size))[:, places] / temperature).softmax(-1)
        taught = distillation_loss(logits, wanted, temperature)
        return (1 - weight) * F.cross_entropy(logits, labels) + weight * taught

    return loss


def _proximal(model: Classifier, mu: float) -> Loss:
    start = [weight.detach().clone() for weight in model.parameters()]

    def loss(own: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        away = sum(((w - s).square().sum() for w, s in zip(own.parameters(), start, strict=True)), torch.zeros(()))
        return cross_entropy(own, images, labels) + 0.5 * mu * away

    return loss


class Keeper:
    """A client's own model between rounds.

    In a directory of the client's own (run config `client-state`, an absolute path) it also
    outlives the run: a server that was killed may ask for a round again, and the client
    answers from what it has. Without one it lives in Flower's context.
    """

    def __init__(self, context: Context, number: int) -> None:
        self.context = context
        asked = str(context.run_config.get("client-state", ""))
        require(not asked or Path(asked).is_absolute(), "client-state", asked, "an absolute path")
        self.directory = writable_directory(Path(asked) / f"client-{number}") if asked else None

    def path(self, server_round: int) -> Path | None:
        """The file of one round."""
        return None if self.directory is None else self.directory / f"round{server_round}.safetensors"

    def before(self, server_round: int) -> Weights | None:
        """The weights after the round before; None where there was none."""
        path = self.path(server_round - 1)
        if path is not None:
            return load_tensors(path, FORMAT, VERSION)[0] if path.exists() else None
        kept = self.context.state.get(STATE)
        return kept.to_torch_state_dict() if isinstance(kept, ArrayRecord) else None

    def answer(self, server_round: int, question: str) -> tuple[Weights, float] | None:
        """Weights and loss if this very question was answered before."""
        path = self.path(server_round)
        if path is None or not path.exists():
            return None
        weights, metadata = load_tensors(path, FORMAT, VERSION)
        return (weights, float(metadata["loss"])) if metadata["question"] == question else None

    def keep(self, server_round: int, question: str, model: Classifier, loss: float) -> None:
        """Keep the model after this round, and in a directory the one before it too."""
        path = self.path(server_round)
        if path is None or self.directory is None:
            self.context.state[STATE] = ArrayRecord(model.state_dict())  # type: ignore[arg-type]
            return
        save_tensors(path, model.state_dict(), FORMAT, VERSION, question=question, loss=repr(loss))
        older = [self.path(each) for each in range(1, server_round - 1)]
        for each in older:
            if each is not None:
                each.unlink(missing_ok=True)
