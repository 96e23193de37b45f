"""What a client does differently in later rounds: where it starts, what it learns, what it keeps."""

from __future__ import annotations

import hashlib
import logging
import re
from pathlib import Path

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message
from torch import Tensor, nn
from torch.nn import functional as F

from smi_fed.alignment import class_positions, resize
from smi_fed.checks import require
from smi_fed.class_statistics import ClassStatistics, class_statistics, common_classes
from smi_fed.config import Settings
from smi_fed.data import ImageSet
from smi_fed.distillation import distillation_loss
from smi_fed.files import FileFormatError, load_tensors, save_tensors, writable_directory
from smi_fed.models import Classifier, ModelSpec, architecture_of, build_model
from smi_fed.training import Loss, cross_entropy

FORMAT, VERSION = "smi-fed.client", 1
STATE = "smi-fed.own-model"

Weights = dict[str, Tensor]

log = logging.getLogger("smi_fed")


class TrainRequest:
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
            model = build_model(architecture_of(self.student_spec))
        model.load_state_dict(self.weights)
        return model.eval()

    def fits(self, model: Classifier) -> bool:
        """Whether `model` has the student's architecture and classes, so that it can go on from its weights."""
        same = shapes(model.state_dict()) == shapes(self.weights)
        return same and class_positions(model.spec, self.student_spec) == tuple(range(self.student_spec.num_classes))

    def leads(self, model: Classifier) -> bool:
        """Whether `model` goes on from the student: not from random weights if it has a start of its own."""
        known = self.round > 1 or model.spec.start is None or self.student_spec.start is not None
        return known and self.fits(model)

    def digest(self, *more: object) -> str:
        """A name for what was asked under these settings: the same question, the same name."""
        found = hashlib.sha256(repr((self.round, self.proximal_mu, *more)).encode())
        for key, value in self.weights.items():
            found.update(key.encode() + value.contiguous().numpy().tobytes())
        return found.hexdigest()


def loss_of(settings: Settings, model: Classifier, request: TrainRequest) -> Loss:
    """What this client minimises in this round.

    From the student's weights: cross-entropy, and FedProx's term where the server asks for
    it (Li et al., 2020). With a model of its own: cross-entropy and, from round 2 on,
    T^2 KL from the student over its own images (mutual learning's half of FML, Shen et al., 2020).
    """
    if request.fits(model):
        return _proximal(model, request.proximal_mu) if request.proximal_mu else cross_entropy
    weight, temperature = settings.client.student_weight, settings.client.student_temperature
    if request.round == 1 or not weight:  # the first student has random weights
        return cross_entropy
    device = next(model.parameters()).device
    student = request.student().to(device)
    places = torch.tensor(class_positions(model.spec, request.student_spec), device=device)

    def loss(own: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        logits = own(images)
        with torch.no_grad():
            probabilities = (student(resize(images, student.image_size))[:, places] / temperature).softmax(-1)
        taught = distillation_loss(logits, probabilities, temperature)
        return (1 - weight) * F.cross_entropy(logits, labels) + weight * taught

    return loss


def statistics_of_start(
    settings: Settings, request: TrainRequest, spec: ModelSpec, images: ImageSet, device: torch.device
) -> ClassStatistics | None:
    """In round 1 what the student that came sees in this client's images, where the run starts from that."""
    if settings.strategy.start != "statistics" or request.round > 1:
        return None
    return statistics_of_student(settings, request, spec, images, device)


def statistics_of_student(
    settings: Settings, request: TrainRequest, spec: ModelSpec, images: ImageSet, device: torch.device
) -> ClassStatistics | None:
    """What the student that came sees in this client's images; None where no class has enough of them.

    Classes of fewer than `client.minimum_examples` images are left out: their sums would tell of single images.

    Args:
        spec: of the client's model, whose classes label the images.
        images: at any size.
    """
    least = settings.client.minimum_examples
    rows = common_classes(images.labels, least)
    if not len(rows):
        log.warning("no class has client.minimum_examples (%d) images: no class statistics are sent", least)
        return None
    student = request.student().to(device)
    shown = images.select(rows).resized(student.image_size)
    labels = torch.tensor(class_positions(spec, request.student_spec))[shown.labels]
    return class_statistics(student, zip(shown.images.split(256), labels.split(256), strict=True))


def _proximal(model: Classifier, mu: float) -> Loss:
    start = [weight.detach().clone() for weight in model.parameters()]

    def loss(own: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        away = sum(((w - s).square().sum() for w, s in zip(own.parameters(), start, strict=True)), images.new_zeros(()))
        return cross_entropy(own, images, labels) + 0.5 * mu * away

    return loss


class OwnModels:
    """A client's own models between rounds.

    In a directory of the client's own (run config `client-state`, an absolute path) they also
    outlive the run: a server that was killed may ask for a round again, and the client
    answers from what it has. Without one the newest lives in Flower's context.

    Raises:
        SettingError: a relative path.
        FileFormatError: from the methods that read, a file that is damaged or of another
            model; the message names it.
    """

    def __init__(self, context: Context, number: int) -> None:
        self.context = context
        place = str(context.run_config.get("client-state", ""))
        require(not place or Path(place).is_absolute(), "client-state", place, "an absolute path")
        self.directory = writable_directory(Path(place) / f"client-{number}") if place else None

    def newest_before(self, server_round: int, model: Classifier) -> Weights | None:
        """The weights after the last round before this one in which the client was asked; None if there was none.

        Args:
            model: what the weights are for.
        """
        if self.directory is None:
            kept = self.context.state.get(STATE)
            return kept.to_torch_state_dict() if isinstance(kept, ArrayRecord) else None
        earlier = [each for each in self._rounds() if each < server_round]
        return self._read(self._path(max(earlier)), model)[0] if earlier else None

    def answer(self, server_round: int, question: str, model: Classifier) -> tuple[Weights, float] | None:
        """Weights and loss if this very question was answered before."""
        if self.directory is None or server_round not in self._rounds():
            return None
        weights, metadata = self._read(self._path(server_round), model)
        return (weights, float(metadata["loss"])) if metadata["question"] == question else None

    def save(self, server_round: int, question: str, model: Classifier, loss: float) -> None:
        """Keep the model after this round, and in a directory the newest one before it.

        Models of later rounds go too: the server has gone back, and they are not what it goes on from.
        """
        if self.directory is None:
            self.context.state[STATE] = ArrayRecord(model.state_dict())  # type: ignore[arg-type]
            return
        save_tensors(self._path(server_round), model.state_dict(), FORMAT, VERSION, question=question, loss=repr(loss))
        rounds = self._rounds()
        before = max((each for each in rounds if each < server_round), default=None)
        for each in rounds:
            if each not in (server_round, before):
                self._path(each).unlink(missing_ok=True)

    def _path(self, server_round: int) -> Path:
        assert self.directory is not None
        return self.directory / f"round{server_round}.safetensors"

    def _rounds(self) -> list[int]:
        """Rounds of which a model stands in the directory."""
        assert self.directory is not None
        found = (re.fullmatch(r"round(\d+)\.safetensors", path.name) for path in self.directory.iterdir())
        return sorted(int(each[1]) for each in found if each)

    def _read(self, path: Path, model: Classifier) -> tuple[Weights, dict[str, str]]:
        remedy = "; remove it or choose another client-state"
        try:
            weights, metadata = load_tensors(path, FORMAT, VERSION)
        except FileFormatError as error:
            raise FileFormatError(f"{error}{remedy}") from error
        if shapes(weights) != shapes(model.state_dict()):
            raise FileFormatError(f"{path}: weights of another model than {model.spec.name}{remedy}")
        return weights, metadata


def shapes(weights: Weights) -> dict[str, torch.Size]:
    """The shape of each tensor by name."""
    return {key: value.shape for key, value in weights.items()}
