"""Settings of a federated run, composed by Hydra and checked before anything starts."""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from smi_fed.checks import SettingError, is_integer, is_number, require, require_choice
from smi_fed.data import DataConfig
from smi_fed.distillation import DistillationConfig
from smi_fed.inversion import InversionConfig
from smi_fed.models import ModelSpec
from smi_fed.pool import PoolConfig
from smi_fed.training import TrainingConfig

T = TypeVar("T")

_WORD = re.compile(r"""(?:[^\s'"\[{]|'[^']*'|"[^"]*"|\[[^\]]*\]|\{[^}]*\})+""")
"""One override: up to a space that is not inside quotes or brackets (Hydra wants the quotes kept)."""

_HYDRA_LOCK = threading.RLock()
"""Hydra keeps one global state, and a ServerApp runs in a thread."""


@dataclass(frozen=True)
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


@dataclass(frozen=True)
class ClientConfig:
    """What clients do and tell.

    Args:
        training: of each client's model.
        send_label_counts: tell the server how many examples of each class there are.
        minimum_examples: feature statistics are sent only from this many examples on.
        student_weight: share of the student's opinion in the loss of a client that keeps a
            model of its own, from round 2 on; in [0, 1).
        student_temperature: of both softmaxes there, above 0.
    """

    training: TrainingConfig
    send_label_counts: bool = True
    minimum_examples: int = 64
    student_weight: float = 0.5
    student_temperature: float = 2.0

    def __post_init__(self) -> None:
        least = self.minimum_examples
        require(isinstance(self.send_label_counts, bool), "send_label_counts", self.send_label_counts, "true | false")
        require(is_integer(least) and least >= 2, "minimum_examples", least, "an int >= 2")
        weight, temperature = self.student_weight, self.student_temperature
        require(is_number(weight) and 0 <= weight < 1, "student_weight", weight, "a number in [0, 1)")
        require(is_number(temperature) and temperature > 0, "student_temperature", temperature, "a number > 0")


@dataclass(frozen=True)
class ServerConfig:
    """What the server does.

    Args:
        device: auto | cpu | cuda | cuda:N, for inversion, distillation and evaluation.
        images_per_teacher: synthetic images of each teacher.
        min_teachers: fewer admitted teachers end the run.
        threads: torch's threads for inversion and distillation; 0 leaves torch's choice.
    """

    device: str = "auto"
    images_per_teacher: int = 300
    min_teachers: int = 2
    threads: int = 1

    def __post_init__(self) -> None:
        for key, least in {"images_per_teacher": 1, "min_teachers": 1, "threads": 0}.items():
            value = getattr(self, key)
            require(is_integer(value) and value >= least, key, value, f"an int >= {least}")


STRATEGIES = (
    "FedAvg", "FedProx", "FedAvgM", "FedAdam", "FedYogi", "FedAdagrad", "FedMedian", "FedTrimmedAvg", "Krum",
    "MultiKrum", "Bulyan", "QFedAvg",
)  # fmt: skip


@dataclass(frozen=True)
class StrategyConfig:
    """The inner Flower strategy.

    Args:
        name: a strategy of `flwr.serverapp.strategy`.
        arguments: more keyword arguments of its constructor, such as {proximal_mu: 0.1}.
        distillation: false runs the strategy as it is, for federations of one architecture.
        projection: ensemble | per_teacher, see `smi_fed.strategies.options.Options`.
        refine: distill into what the strategy aggregated, where all have the student's architecture.
        rounds: federated rounds.
        timeout: seconds to wait for the replies of a round.
        min_nodes: nodes to wait for before a round starts.
    """

    name: str = "FedAvg"
    arguments: Mapping[str, Any] | None = None
    distillation: bool = True
    projection: str = "ensemble"
    refine: bool = False
    rounds: int = 1
    timeout: float = 3600.0
    min_nodes: int = 2

    def __post_init__(self) -> None:
        require_choice("name", self.name, STRATEGIES)
        require_choice("projection", self.projection, ("ensemble", "per_teacher"))
        for key in ("distillation", "refine"):
            require(isinstance(getattr(self, key), bool), key, getattr(self, key), "true | false")
        object.__setattr__(self, "arguments", {} if self.arguments is None else self.arguments)
        require(isinstance(self.arguments, Mapping), "arguments", self.arguments, "a mapping")
        for key in ("rounds", "min_nodes"):
            value = getattr(self, key)
            require(is_integer(value) and value >= 1, key, value, "an int >= 1")
        require(is_number(self.timeout) and self.timeout > 0, "timeout", self.timeout, "a number of seconds > 0")


@dataclass(frozen=True)
class AdmissionConfig:
    """See `smi_fed.strategies.AdmissionPolicy`; an empty list of architectures takes its own."""

    architectures: tuple[str, ...] = ()
    max_parameters: int = 200_000_000
    max_examples: int = 10_000_000
    max_claim_ratio: float = 10.0


@dataclass(frozen=True)
class Settings:
    """Everything a run is configured by; fields are the groups and keys under conf/."""

    seed: int
    model: ModelsConfig
    data: DataConfig
    client: ClientConfig
    server: ServerConfig
    inversion: InversionConfig
    distillation: DistillationConfig
    strategy: StrategyConfig
    admission: AdmissionConfig
    pool: PoolConfig = field(default_factory=PoolConfig)

    def __post_init__(self) -> None:
        require(is_integer(self.seed) and self.seed >= 0, "seed", self.seed, "an int >= 0")
        if self.distillation.ensemble == "class":
            sends = self.client.send_label_counts
            require(sends, "client.send_label_counts", sends, "true, where distillation.ensemble is class")


def load_settings(directory: Path, overrides: str | Sequence[str] = "") -> Settings:
    """Compose and check the configuration below `directory`.

    Args:
        directory: absolute path of conf/.
        overrides: Hydra overrides, one string separated by spaces or a list.

    Raises:
        SettingError: a key or value that cannot be: the key, what was got, what is allowed.
    """
    words = _WORD.findall(overrides) if isinstance(overrides, str) else list(overrides)
    return make(Settings, compose(directory, words), "")


def join_overrides(words: Sequence[str]) -> str:
    """One string of overrides for `load_settings`; values that Hydra would split are quoted."""
    joined = []
    for word in words:
        key, equals, value = word.partition("=")
        plain = not any(sign in value for sign in " ,:") or value[:1] in ("'", "[", "{")
        joined.append(word if plain else f"{key}{equals}'{value}'")
    return " ".join(joined)


def compose(directory: Path, overrides: Sequence[str], name: str = "config") -> dict[str, Any]:
    """Hydra's composition of `name`.yaml below `directory` as plain containers.

    Raises:
        SettingError: an override that Hydra refuses.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import ConfigCompositionException, HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    with _HYDRA_LOCK:
        GlobalHydra.instance().clear()
        try:
            with initialize_config_dir(str(directory), version_base="1.3"):
                config = hydra_compose(name, overrides=list(overrides))
            plain = OmegaConf.to_container(config, resolve=True)
        except (ConfigCompositionException, HydraException, OmegaConfBaseException) as error:
            raise _explain(directory, overrides, name, error) from error
        finally:
            GlobalHydra.instance().clear()
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


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
    known = [*groups, *_known_keys(compose(directory, [], name))]
    if key in known:
        return SettingError(key, value, f"a value that Hydra reads ({error})")
    near = get_close_matches(key, known, n=3, cutoff=0.4) or known
    return SettingError(key, value, f"a key of the configuration: {' | '.join(near)}")


def _known_keys(node: Mapping[str, Any], prefix: str = "") -> list[str]:
    keys = []
    for key, value in node.items():
        keys.append(prefix + key)
        if isinstance(value, Mapping):
            keys += _known_keys(value, f"{prefix}{key}.")
    return keys


def make(cls: type[T], values: Any, path: str) -> T:
    """An instance of the dataclass `cls` from plain containers.

    Raises:
        SettingError: an unknown or missing key, a value of the wrong type, or one that the
            class refuses; with its full path.
    """
    require(isinstance(values, Mapping), path or "configuration", values, "a mapping")
    hints = get_type_hints(cls)
    known = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
    prefix = f"{path}." if path else ""
    for key in values:
        require(key in known, f"{prefix}{key}", values[key], f"a key of {path or 'the configuration'}: {sorted(known)}")
    for name, each in known.items():
        needed = each.default is MISSING and each.default_factory is MISSING
        require(not needed or name in values, f"{prefix}{name}", None, "a value, it has no default")
    arguments = {key: _convert(hints[key], value, f"{prefix}{key}") for key, value in values.items()}
    try:
        return cls(**arguments)
    except SettingError as error:
        raise (error.under(path) if path else error) from error
    except (TypeError, ValueError) as error:
        raise SettingError(path or "configuration", dict(values), str(error)) from error


def _convert(hint: Any, value: Any, path: str) -> Any:
    if is_dataclass(hint) and isinstance(hint, type) and isinstance(value, Mapping):
        return make(hint, value, path)
    if hint == Mapping[str, ModelSpec]:
        require(isinstance(value, Mapping), path, value, "a mapping of names to model specs")
        return {str(name): make(ModelSpec, each, f"{path}.{name}") for name, each in value.items()}
    if isinstance(value, list):
        return tuple(value)
    if hint is float and is_integer(value):
        return float(value)
    return value
