"""Watchers that write: a log of events, and what TensorBoard, MLflow and Weights & Biases read.

None of them sends anything unless its own environment variable says where to.
"""

from __future__ import annotations

import json
import math
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

from smi_fed.checks import SettingError
from smi_fed.events import Event, Value, Watcher

ENDS = ("ended", "failed")


class JsonLines:
    """One line of JSON for each event, written at once: what stands there survives whatever ends the process.

    Args:
        path: is begun, or gone on with where `append`; a last line that a crash tore is taken away.
    """

    def __init__(self, path: str | os.PathLike[str], append: bool = True) -> None:
        self.path, self.append, self.opened = Path(path), append, False

    def _open(self) -> None:
        known = self.path.read_bytes() if self.append and self.path.exists() else b""
        whole = known.rfind(b"\n") + 1
        with self.path.open("r+b" if whole else "wb") as file:
            file.truncate(whole)
        self.opened = True

    def __call__(self, event: Event, /) -> None:
        """Write one line."""
        if not self.opened:
            self._open()
        line = asdict(event) | {"values": {key: _plain(value) for key, value in event.values.items()}}
        with self.path.open("a", encoding="utf-8", errors="backslashreplace") as file:  # half a character may come
            file.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")


def _plain(value: Value) -> Value:
    """JSON has no NaN and no infinities: they are texts."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def scalars(event: Event) -> tuple[dict[str, float], int]:
    """The numbers of an event by `stage/name/value` (`/node`), and where they belong on the axis of steps.

    Progress is at its step or iteration, those of the rounds before counted too; all else is at its round.
    """
    numbers = {key: each for key, each in event.values.items() if isinstance(each, int | float)}
    done, total = numbers.pop("done", None), numbers.pop("total", 0)
    step = event.round if done is None else max(0, event.round - 1) * total + done
    tail = f"/{event.node}" if event.node else ""
    return {f"{event.stage}/{event.name}/{key}{tail}": float(each) for key, each in numbers.items()}, int(step)


class Writer(ABC):
    """A watcher that writes numbers into somebody's format; opened by the first event, closed by the run's end."""

    opened = False

    def __call__(self, event: Event, /) -> None:
        """Write the event's numbers."""
        begins = (event.stage, event.name) == ("run", "started")
        if not self.opened:
            self.begin(event.run, event.values if begins else {})
            self.opened = True
        numbers, step = scalars(event)
        if numbers and not begins:
            self.write(numbers, step)
        if event.stage == "run" and event.name in ENDS:
            self.finish(event.name == "ended")

    @abstractmethod
    def begin(self, run: str, about: Mapping[str, Value]) -> None:
        """Open it for a run of these settings."""

    @abstractmethod
    def write(self, numbers: Mapping[str, float], step: int) -> None:
        """Write what `scalars` found."""

    @abstractmethod
    def finish(self, good: bool) -> None:
        """Close it after a run that came to its end, or failed."""


class TensorBoard(Writer):
    """Scalars for TensorBoard.

    Args:
        directory: of event files: `tensorboard --logdir` reads it.

    Raises:
        SettingError: the extra `tensorboard` is not installed.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory, self.library = Path(directory), _library("tensorboard", "torch.utils.tensorboard")

    def begin(self, run: str, about: Mapping[str, Value]) -> None:  # noqa: D102
        self.writer = self.library.SummaryWriter(str(self.directory))
        self.writer.add_text("run", "\n".join([f"# {run}", "", *(f"    {key}: {each}" for key, each in about.items())]))

    def write(self, numbers: Mapping[str, float], step: int) -> None:  # noqa: D102
        for key, number in numbers.items():
            self.writer.add_scalar(key, number, step)

    def finish(self, good: bool) -> None:  # noqa: D102
        self.writer.close()


class MLflow(Writer):
    """Metrics and parameters of a run in MLflow's experiment smi-fed.

    Args:
        directory: of the database `mlflow.db`: `mlflow ui --backend-store-uri sqlite:///PATH` reads it. Not used where
            `MLFLOW_TRACKING_URI` names a server.

    Raises:
        SettingError: the extra `mlflow` is not installed.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        self.directory, self.library = Path(directory), _library("mlflow", "mlflow")

    def begin(self, run: str, about: Mapping[str, Value]) -> None:  # noqa: D102
        self.directory.mkdir(parents=True, exist_ok=True)
        local = f"sqlite:///{self.directory.absolute()}/mlflow.db"
        self.client = self.library.MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or local)
        known = self.client.get_experiment_by_name("smi-fed")
        experiment = known.experiment_id if known is not None else self.client.create_experiment("smi-fed")
        self.run = self.client.create_run(experiment, run_name=run).info.run_id
        for key, value in about.items():
            self.client.log_param(self.run, _mlflow_name(key), value)

    def write(self, numbers: Mapping[str, float], step: int) -> None:  # noqa: D102
        for key, number in numbers.items():
            self.client.log_metric(self.run, _mlflow_name(key), number, step=step)

    def finish(self, good: bool) -> None:  # noqa: D102
        self.client.set_terminated(self.run, "FINISHED" if good else "FAILED")


def _mlflow_name(key: str) -> str:
    """MLflow takes letters, digits and few signs."""
    return re.sub(r"[^\w./ :-]", "_", key)


class WandB(Writer):
    """Metrics and settings of a run in the project smi-fed of Weights & Biases.

    Args:
        directory: of the run's files: `wandb sync` sends them. Not used where `WANDB_MODE` is online.

    Raises:
        SettingError: the extra `wandb` is not installed.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        self.directory, self.library = Path(directory), _library("wandb", "wandb")

    def begin(self, run: str, about: Mapping[str, Value]) -> None:  # noqa: D102
        self.directory.mkdir(parents=True, exist_ok=True)
        self.run = self.library.init(
            project="smi-fed", name=run, dir=str(self.directory), config=dict(about), reinit="create_new",
            mode=os.environ.get("WANDB_MODE", "offline"),
            settings=self.library.Settings(console="off", silent=True),
        )  # fmt: skip
        self.run.define_metric("*", step_metric="step")  # its own steps only count calls

    def write(self, numbers: Mapping[str, float], step: int) -> None:  # noqa: D102
        self.run.log({**numbers, "step": step})

    def finish(self, good: bool) -> None:  # noqa: D102
        self.run.finish(exit_code=0 if good else 1)


WRITERS: dict[str, Callable[[Path], Writer]] = {"tensorboard": TensorBoard, "mlflow": MLflow, "wandb": WandB}
"""By the name in the setting `watch`, which is the extra's and the directory's too."""


def writers(names: Sequence[str], directory: Path) -> list[Watcher]:
    """A writer for each of `names`, in directories of these names below `directory`.

    Raises:
        SettingError: one whose extra is not installed.
    """
    return [WRITERS[name](directory / name) for name in names]


def _library(extra: str, module: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise SettingError("watch", extra, f"what is installed; pip install 'smi-fed[{extra}]'") from error
