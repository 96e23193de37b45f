"""Settings of a federated run, composed by Hydra and checked before anything starts."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError

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
    nearest,
    one_of,
    read,
    require,
)
from smi_fed.data import DataConfig
from smi_fed.distillation import BY_CLASS, DistillationConfig
from smi_fed.inversion import InversionConfig
from smi_fed.layers import ABSENT, choice_paths, dotted_keys, nested, settled
from smi_fed.models import ModelSpec
from smi_fed.policy import AdmissionPolicy
from smi_fed.pool import PoolConfig
from smi_fed.starts import FROM_CLIENTS, Start, check_start
from smi_fed.training import TrainingConfig

_PIECE = re.compile(r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*"|\s+|.""", re.DOTALL)
"""Of overrides in one text: what stands in quotes, space, or one other sign."""

_HYDRA_LOCK = threading.RLock()
"""Hydra keeps one global state, and a ServerApp runs in a thread."""


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
        """The spec of a client.

        Raises:
            SettingError: an architecture that is not in `clients`.
        """
        if arch is not None:
            require(arch in self.clients, "arch", arch, " | ".join(self.clients))
            return self.clients[arch]
        return list(self.clients.values())[partition % len(self.clients)]


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
        threads: torch's threads for inversion and distillation; 0 leaves torch's choice.
    """

    device: Device = "auto"
    images_per_teacher: Count = 300
    min_teachers: Count = 2
    threads: Annotated[int, Field(strict=True, ge=0, le=1024), Allowed("an int from 0 to 1024")] = 1


STRATEGIES = (
    "FedAvg", "FedProx", "FedAvgM", "FedAdam", "FedYogi", "FedAdagrad", "FedMedian", "FedTrimmedAvg", "Krum",
    "MultiKrum", "Bulyan", "QFedAvg",
)  # fmt: skip


@checked
class StrategyConfig:
    """The inner Flower strategy.

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
        rounds: federated rounds.
        timeout: seconds to wait for the replies of a round.
        min_nodes: nodes to wait for before a round starts.
    """

    name: Annotated[Text, one_of(STRATEGIES)] = "FedAvg"
    arguments: Mapping[str, Any] | None = None
    distillation: Flag = True
    projection: Literal["ensemble", "per_teacher"] = "ensemble"
    refine: Flag = False
    start: Start = "own"
    rounds: Count = 1
    timeout: Positive = 3600.0
    min_nodes: Count = 2

    def __post_init__(self) -> None:
        object.__setattr__(self, "arguments", self.arguments or {})

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

    def __post_init__(self) -> None:
        blind = self.data.source == "none"
        if self.evaluation is None:
            object.__setattr__(self, "evaluation", "clients" if blind else "server")
        allowed = "clients | none, since data.source is none; with data.source and data.name the server has images"
        require(not (blind and self.server_evaluates), "evaluation", self.evaluation, allowed)
        if self.distillation.ensemble in BY_CLASS:
            sends = self.client.send_label_counts
            require(
                sends,
                "client.send_label_counts",
                sends,
                f"true, where distillation.ensemble is {self.distillation.ensemble}",
            )
        strategy = self.strategy
        try:
            check_start(strategy.start, self.model.student, strategy.refine)
        except SettingError as error:
            raise error.under("strategy") from error
        changes = self.distills or strategy.refine or not strategy.wraps
        allowed = "1, since without distillation no round after the start changes the student"
        require(changes or strategy.rounds == 1, "strategy.rounds", strategy.rounds, allowed)

    @property
    def distills(self) -> bool:
        """Whether teachers are inverted and a student is taught by them."""
        return self.strategy.distillation and self.distillation.steps > 0

    @property
    def server_evaluates(self) -> bool:
        """Whether the server measures on its test split."""
        return self.evaluation in ("server", "both")

    @property
    def clients_evaluate(self) -> bool:
        """Whether each client measures on what it holds out."""
        return self.evaluation in ("clients", "both")


def load_settings(directory: Path, overrides: str | Sequence[str] = "") -> Settings:
    """Compose and check the configuration below `directory`.

    Args:
        directory: absolute path of conf/.
        overrides: Hydra overrides: a list, a JSON list in one text (`join_overrides` writes it),
            or one text separated by spaces.

    Raises:
        SettingError: keys or values that cannot be: the key, what was got, what is allowed.
    """
    words = split_overrides(overrides) if isinstance(overrides, str) else list(overrides)
    return read(Settings, compose(directory, words))


def join_overrides(words: Sequence[str]) -> str:
    """One text of overrides for `load_settings`, which finds each as it is here, whatever stands in it."""
    return json.dumps(list(words))


def split_overrides(text: str) -> list[str]:
    """The overrides in one text: a JSON list, or separated by spaces outside of quotes and brackets.

    Raises:
        SettingError: neither of both.
    """
    if not text.lstrip().startswith("["):
        words, depth = [""], 0
        for piece in _PIECE.findall(text):
            depth = max(0, depth + (piece in ("[", "{", "(")) - (piece in ("]", "}", ")")))
            if piece.isspace() and not depth:
                words.append("")
            else:
                words[-1] += piece
        require(depth == 0, "overrides", text, "overrides separated by spaces, each bracket closed, or a JSON list")
        return list(filter(None, words))
    try:
        return TypeAdapter(list[str]).validate_json(text, strict=True)
    except ValidationError as error:
        raise SettingError("overrides", text, "a JSON list of overrides, or overrides separated by spaces") from error


def quoted(text: str) -> str:
    """`text` as a value that Hydra reads as this text; ${...} in it stays an interpolation."""
    return "'" + re.sub(r"(\\*)('|\Z)", lambda m: 2 * m[1] + ("\\'" if m[2] else ""), text) + "'"


def _readable(override: str) -> str:
    """The same, or with its value in quotes where Hydra would not read it or take it for several."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    key, equals, value = override.partition("=")
    try:
        if not equals or not OverridesParser.create().parse_override(override).is_sweep_override():
            return override
    except HydraException:
        pass
    return f"{key}={quoted(value)}"


def compose(directory: Path, overrides: Sequence[str], name: str = "config") -> dict[str, Any]:
    """Hydra's composition of `name`.yaml below `directory` as plain containers.

    Raises:
        SettingError: an override that Hydra refuses.
    """
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import OmegaConf

    with _HYDRA_LOCK:
        GlobalHydra.instance().clear()
        try:
            with initialize_config_dir(str(directory), version_base="1.3"):
                config = _composed(name, [_readable(each) for each in overrides])
            plain = OmegaConf.to_container(config, resolve=True)
        except Exception as error:  # Hydra and OmegaConf raise many kinds, ValueError among them
            raise _explain(directory, overrides, name, error) from error
        finally:
            GlobalHydra.instance().clear()
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def _composed(name: str, overrides: list[str]) -> Any:
    """Hydra's composition, but for choices: Hydra would leave keys of one kind in another, and refuse new ones."""
    from hydra import compose as hydra_compose
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from omegaconf import OmegaConf

    paths = tuple(choice_paths(Settings))
    parsed = [each for each in OverridesParser.create().parse_overrides(overrides) if each.package is None]
    own = [each for each in parsed if f"{each.key_or_group}.".startswith(tuple(f"{path}." for path in paths))]
    own = {each.input_line for each in own if not (each.is_delete() and each.key_or_group in paths)}
    others = [each for each in overrides if each not in own]
    config = hydra_compose(name, overrides=others)
    said = [nested(each.key_or_group, ABSENT if each.is_delete() else each.value()) for each in parsed]
    for path, value in settled(paths, [*_files(name, others), *said]):
        OmegaConf.update(config, path, value, merge=False, force_add=True)
    return config


def _files(name: str, overrides: list[str]) -> Iterator[Any]:
    """What the files say that Hydra merges, in their order."""
    from hydra.core.global_hydra import GlobalHydra
    from hydra.types import RunMode
    from omegaconf import OmegaConf

    loader = GlobalHydra.instance().config_loader()
    for each in loader.compute_defaults_list(name, overrides, RunMode.RUN).defaults:
        source = next(source for source in loader.get_sources() if source.is_config(each.config_path))
        yield nested(each.package or "", OmegaConf.to_container(source.load_config(each.config_path).config))


def _explain(directory: Path, overrides: Sequence[str], name: str, error: Exception) -> SettingError:
    """Which of the overrides Hydra refused, and what it could have been."""
    if len(overrides) != 1:
        for override in overrides:
            try:
                compose(directory, [override], name)
            except SettingError as found:
                return found
        return SettingError("overrides", " ".join(overrides), f"Hydra overrides ({error})")
    key, _, value = overrides[0].partition("=")
    key = key.lstrip("+~")
    groups = sorted(path.name for path in directory.iterdir() if path.is_dir())
    if key in groups:
        return SettingError(key, value, " | ".join(sorted(path.stem for path in (directory / key).glob("*.yaml"))))
    known = [*groups, *dotted_keys(compose(directory, [], name))]
    if key in known:
        return SettingError(key, value, f"a value that Hydra reads ({error})")
    return SettingError(key, value, f"a key of the configuration: {nearest(key, known)}")
