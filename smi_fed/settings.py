"""Settings of a federated run: every group and key below conf/, checked when they are made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field, fields
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from smi_fed.checks import (
    Allowed,
    Count,
    Device,
    Flag,
    Fraction,
    Natural,
    Positive,
    SettingError,
    Text,
    checked,
    one_of,
    require,
)
from smi_fed.data import DataConfig
from smi_fed.distillation import BY_CLASS, DistillationConfig
from smi_fed.inversion import InversionConfig
from smi_fed.models import ModelSpec
from smi_fed.policy import AdmissionPolicy
from smi_fed.pool import PoolConfig
from smi_fed.starts import FROM_CLIENTS, Start, check_start
from smi_fed.training import TrainingConfig
from smi_fed.waiting import WaitingConfig


@checked
class ModelsConfig:
    """Architectures of a federation.

    Args:
        clients: specs by name, which `--node-config arch=...` may ask for; without it they
            are taken in turn by partition.
        student: the spec of the global model.
    """

    clients: Mapping[str, ModelSpec]
    student: ModelSpec

    def __post_init__(self) -> None:
        require(len(self.clients) > 0, "clients", self.clients, "at least one architecture")

    def of_client(self, partition: int, arch: str | None = None) -> ModelSpec:
        """The spec of a client; raises as `name_of_client`."""
        return self.clients[self.name_of_client(partition, arch)]

    def name_of_client(self, partition: int, arch: str | None = None) -> str:
        """What the architecture of a client is called in `clients`.

        Raises:
            SettingError: an architecture that is not there.
        """
        names = list(self.clients)
        require(arch is None or arch in names, "arch", arch, " | ".join(names))
        return names[partition % len(names)] if arch is None else arch


def _no_name(value: Any) -> Any:
    """A preset is a file, and the overrides of single settings come on top of it."""
    require(
        not isinstance(value, str), "", value, "a mapping; a preset is chosen by training=scratch | finetune | head"
    )
    return value


@checked
class ClientConfig:
    """What clients do and tell.

    Args:
        training: of each client's model.
        device: auto | cpu | cuda | cuda:N, for training and evaluation.
        send_label_counts: tell the server how many examples of each class there are.
        minimum_examples: feature statistics are sent only from this many examples on, and class
            statistics of a class only from this many of its images on.
        student_weight: share of the student's opinion in the loss of a client that keeps a
            model of its own, from round 2 on; in [0, 1).
        student_temperature: of both softmaxes there, above 0.
    """

    training: Annotated[TrainingConfig, BeforeValidator(_no_name)]
    device: Device = "auto"
    send_label_counts: Flag = True
    minimum_examples: Annotated[int, Field(strict=True, ge=2), Allowed("an int >= 2")] = 64
    student_weight: Fraction = 0.5
    student_temperature: Positive = 2.0


@checked
class ServerConfig:
    """What the server does.

    Args:
        device: auto | cpu | cuda | cuda:N, for inversion, distillation and evaluation.
        images_per_teacher: synthetic images of each teacher.
        min_teachers: fewer admitted teachers end the run.
        threads: torch's threads for inversion and distillation, in each process that inverts too; 0 is half of the
            cores, see `smi_fed.devices.own_threads`.
        executor: where teachers are inverted: here (in the server's process, one after the other) | pool (in
            processes of their own, side by side) | ray (on a Ray cluster, side by side).
        workers: how many are inverted side by side; 0 is one a GPU, or one for every `threads` cores.
        ray_address: of a Ray cluster that is there, `host:port` from one of its machines and `ray://host:port` from
            elsewhere; empty starts one for this run, on this machine.
    """

    device: Device = "auto"
    images_per_teacher: Count = 300
    min_teachers: Count = 2
    threads: Annotated[int, Field(strict=True, ge=0, le=1024), Allowed("an int from 0 to 1024")] = 0
    executor: Literal["here", "pool", "ray"] = "here"
    workers: Annotated[int, Field(strict=True, ge=0, le=1024), Allowed("an int from 0 to 1024")] = 0
    ray_address: Annotated[
        str,
        Field(strict=True, pattern=r"^((ray://)?[^/:\s]+:[0-9]+)?$"),
        Allowed("empty | host:port | ray://host:port"),
    ] = ""

    def __post_init__(self) -> None:
        several = self.executor != "here"
        require(several or not self.workers, "workers", self.workers, "0, where executor is here")
        mine, allowed = ":" not in self.device, "auto | cpu | cuda, where executor is ray, which chooses among GPUs"
        require(self.executor != "ray" or mine, "device", self.device, allowed)
        at, allowed = self.ray_address, "empty, where executor is not ray"
        require(self.executor == "ray" or not at, "ray_address", at, allowed)


STRATEGIES = (
    "FedAvg", "FedProx", "FedAvgM", "FedAdam", "FedYogi", "FedAdagrad", "FedMedian", "FedTrimmedAvg", "Krum",
    "MultiKrum", "Bulyan", "QFedAvg",
)  # fmt: skip


@checked
class StrategyConfig(WaitingConfig):
    """The inner Flower strategy, and what a round waits for (`WaitingConfig`).

    Args:
        name: a strategy of `flwr.serverapp.strategy`.
        arguments: more keyword arguments of its constructor, such as {proximal_mu: 0.1}.
        distillation: false runs the strategy as it is, for federations of one architecture; with a
            `start` out of what clients sent it is that start alone, for any federation.
        projection: ensemble | per_teacher, see `smi_fed.strategies.options.Options`.
        refine: distill into what the strategy aggregated, where all have the student's architecture.
        start: where the student starts: own (as model.student.start says) | random | pretrained (the
            same, and an error where model.student.start is another) | average (of the clients'
            models of its architecture, by examples) | statistics (as model.student.start says, and its
            head from class statistics of all clients, see `smi_fed.class_statistics`).
        finish: what the last round's student is given: own (nothing) | statistics (a head from class statistics of
            its own features, which every client sends in one more message).
        rounds: federated rounds; where the run is asynchronous, refreshes of the student.
        timeout: seconds to wait for the replies of a round.
        min_nodes: nodes to wait for before a round starts.
    """

    name: Annotated[Text, one_of(STRATEGIES)] = "FedAvg"
    arguments: Mapping[str, Any] | None = None
    distillation: Flag = True
    projection: Literal["ensemble", "per_teacher"] = "ensemble"
    refine: Flag = False
    start: Start = "own"
    finish: Literal["own", "statistics"] = "own"
    rounds: Count = 1
    timeout: Positive = 3600.0
    min_nodes: Count = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "arguments", self.arguments or {})
        allowed = "null, where strategy.distillation is false and nothing is wrapped"
        require(self.quorum is None or self.wraps, "quorum", self.quorum, allowed)

    @property
    def waiting(self) -> WaitingConfig:
        """What a round waits for."""
        return WaitingConfig(**{each.name: getattr(self, each.name) for each in fields(WaitingConfig)})

    @property
    def wraps(self) -> bool:
        """Whether the strategy is inside `DataFreeDistillation`."""
        return self.distillation or self.start in FROM_CLIENTS


@checked
class Settings:
    """Everything a run is configured by; fields are the groups and keys under conf/.

    Args:
        evaluation: who measures, on images that nobody trains on: server | clients | both | none. Not given, it is
            the server, or the clients where `data.source` is none.
        watch: who gets the run's numbers beside the log of events: tensorboard | mlflow | wandb, several or none.
        show_real: whether report.html shows images of the server's test split beside the synthetic ones.
    """

    seed: Natural
    model: ModelsConfig
    data: DataConfig
    client: ClientConfig
    server: ServerConfig
    inversion: InversionConfig
    distillation: DistillationConfig
    strategy: StrategyConfig
    admission: AdmissionPolicy
    pool: PoolConfig = field(default_factory=PoolConfig)
    evaluation: Literal["server", "clients", "both", "none"] | None = None
    watch: tuple[Literal["tensorboard", "mlflow", "wandb"], ...] = ()
    show_real: Flag = False

    def __post_init__(self) -> None:
        blind = self.data.source == "none"
        if self.evaluation is None:
            object.__setattr__(self, "evaluation", "clients" if blind else "server")
        allowed = "clients | none, since data.source is none; with data.source and data.name the server has images"
        require(not (blind and self.server_evaluates), "evaluation", self.evaluation, allowed)
        shows, allowed = self.show_real, "false, where the server has no test split that it evaluates on"
        require(not shows or self.server_evaluates, "show_real", shows, allowed)
        require(len(set(self.watch)) == len(self.watch), "watch", list(self.watch), "each at most once")
        if self.distillation.ensemble in BY_CLASS:
            sends, allowed = (
                self.client.send_label_counts,
                f"true, where distillation.ensemble is {self.distillation.ensemble}",
            )
            require(sends, "client.send_label_counts", sends, allowed)
        strategy = self.strategy
        try:
            check_start(strategy.start, self.model.student, strategy.refine)
        except SettingError as error:
            raise error.under("strategy") from error
        least, quorum = self.server.min_teachers, strategy.quorum
        allowed = f"null, or at least server.min_teachers ({least})"
        require((quorum or least) >= least, "strategy.quorum", quorum, allowed)
        changes = self.distills or strategy.refine or not strategy.wraps
        allowed = "1, since without distillation no round after the start changes the student"
        require(changes or strategy.rounds == 1, "strategy.rounds", strategy.rounds, allowed)

    @property
    def distills(self) -> bool:
        """Whether teachers are inverted and a student is taught by them."""
        return self.strategy.distillation and self.distillation.steps > 0

    @property
    def clients_train(self) -> bool:
        """Whether anybody needs what clients learn; where their class statistics are all that counts nobody does."""
        return self.distills or self.strategy.start != "statistics"

    @property
    def server_evaluates(self) -> bool:
        """Whether the server measures on its test split."""
        return self.evaluation in ("server", "both")

    @property
    def clients_evaluate(self) -> bool:
        """Whether each client measures on what it holds out."""
        return self.evaluation in ("clients", "both")
