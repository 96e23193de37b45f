"""One federated run from settings to artefacts."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp import strategy as strategies
from flwr.serverapp.strategy import Strategy

from server import reporting
from server.checks import check_models
from server.images import test_images
from smi_fed import report
from smi_fed.checks import SettingError, require
from smi_fed.config import Settings
from smi_fed.devices import choose_device
from smi_fed.events import Events
from smi_fed.executors import Executor, open_executor
from smi_fed.files import writable_directory, write_json
from smi_fed.layers import dotted
from smi_fed.models import architecture_of, build_model, build_seeded
from smi_fed.pipeline import PipelineConfig
from smi_fed.report_page import write_page
from smi_fed.starts import naming_start
from smi_fed.strategies import DataFreeDistillation, FederatedEvaluation
from smi_fed.strategies.evaluation import in_words, summary
from smi_fed.strategies.finishing import arrays_of, finish
from smi_fed.strategies.soundness import require_sound
from smi_fed.strategies.watching_grid import WatchingGrid
from smi_fed.training import accuracy
from smi_fed.watchers import JsonLines, writers

log = logging.getLogger("smi_fed")


class FederatedRun:
    """Builds everything that can fail before a client is asked, then runs.

    Args:
        settings: checked settings.
        output: artefact directory; it is created. A run that was killed there goes on.

    Raises:
        SettingError: models and data that do not fit each other, a strategy that cannot be, a device that is not
            there, or a watcher or executor that is not installed or does not answer.
        FileFormatError: an unfinished run of other settings stands in the directory.
        OSError: the artefact directory cannot be written.
    """

    def __init__(self, settings: Settings, output: Path) -> None:
        self.settings = settings
        self.output = writable_directory(output.expanduser().absolute())
        self.image_directory = writable_directory(self.output / "synthetic")
        self.device, reason = choose_device(settings.server.device, "server.device")
        log.info("device: %s (%s)", self.device, reason)
        check_models(settings)
        self.test = test_images(settings)
        self.inner = build_inner(settings)
        self.events = self._events()
        self.executor = self._executor()
        try:
            with naming_start("model.student"):
                self.strategy = self._wrap() if settings.strategy.wraps else None
        except BaseException:
            self.executor.close()
            raise
        outer, most = self.strategy or self.inner, settings.admission.max_examples
        asks = settings.clients_evaluate
        self.evaluation = FederatedEvaluation(outer, settings.model.student.num_classes, most) if asks else None
        self.started = time.perf_counter()
        self.scores: list[dict[str, Any]] = self._earlier_scores()
        self.finished: dict[str, Any] | None = None
        self.earlier = self.scores[-1]["seconds"] if self.scores else 0.0

    @property
    def state_directory(self) -> Path:
        """What a killed run goes on from; gone when a run ends."""
        return self.output / "unfinished"

    def _events(self) -> Events:
        """Named by the directory; a run that goes on goes on with its log."""
        log_of_events = JsonLines(self.output / "events.jsonl", append=self.state_directory.exists())
        about = dict(dotted(reporting.plain(self.settings)))
        return Events(self.output.name, [log_of_events, *writers(self.settings.watch, self.output)], about)

    def _executor(self) -> Executor:
        """Opened before anybody trains, so that its processes are ready when the first model comes."""
        server, inverts = self.settings.server, self.settings.distills and self.settings.strategy.wraps
        return open_executor(
            server.executor if inverts else "here", self.device, asked=server.device != "auto",
            workers=server.workers, threads=server.threads, ray_address=server.ray_address,
        )  # fmt: skip

    def _wrap(self) -> DataFreeDistillation:
        settings = self.settings
        steps = settings.distillation.steps if settings.distills else 0
        distillation = replace(settings.distillation, steps=steps)
        return DataFreeDistillation(
            self.inner,
            waiting=settings.strategy.waiting,
            student=settings.model.student,
            pipeline=PipelineConfig(settings.server.images_per_teacher, settings.inversion, distillation),
            policy=settings.admission,
            min_teachers=settings.server.min_teachers,
            projection=settings.strategy.projection,
            refine=settings.strategy.refine,
            start=settings.strategy.start,
            pool=settings.pool,
            seed=settings.seed,
            device=self.device,
            image_directory=self.image_directory,
            state_directory=self.state_directory,
            identity=_identity(settings),
            known_starts=(settings.model.student, *settings.model.clients.values()),
            events=self.events,
            executor=self.executor,
        )

    def _earlier_scores(self) -> list[dict[str, Any]]:
        """Scores of the rounds that were finished before a crash."""
        path = self.state_directory / "scores.json"
        known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
        known = [{"evaluation": None, **score} for score in known]  # what an earlier version wrote has none
        return known[: len(self.strategy.rounds)] if self.strategy is not None else []

    def execute(self, grid: Grid) -> dict[str, Any]:
        """Run all rounds and write the artefacts; returns the report.

        A run that fails leaves a report.json with status 'failed' and no student, and can go on.
        """
        for name in ("report.json", "report.html", "student.safetensors", "evaluation.png"):
            (self.output / name).unlink(missing_ok=True)
        with self.events, self.executor:
            try:
                grid = WatchingGrid(grid)
                self._rounds(grid)
                if not self.scores:
                    raise RuntimeError(f"{self.settings.strategy.name} aggregated no round; its own log says why")
                if self.settings.strategy.finish == "statistics":
                    self._finish(grid)
                finished = self._report()
                self._write(finished)
            except BaseException as error:
                self._fail(error)
                raise
        shutil.rmtree(self.state_directory, ignore_errors=True)
        log.info("artefacts: %s", self.output)
        return finished

    def _fail(self, error: BaseException) -> None:
        """What a failed run leaves."""
        (self.output / "student.safetensors").unlink(missing_ok=True)
        reason = f"{type(error).__name__}: {error}"
        write_json(self.output / "report.json", {"schema": report.SCHEMA_VERSION, "status": "failed", "reason": reason})

    def _rounds(self, grid: Grid) -> None:
        rounds, timeout = self.settings.strategy.rounds, self.settings.strategy.timeout
        if self.strategy is None:
            with naming_start("model.student"):
                student = build_seeded(self.settings.model.student, self.settings.seed)
            arrays = ArrayRecord(student.state_dict())  # type: ignore[arg-type]
            (self.evaluation or self.inner).start(
                grid=grid, initial_arrays=arrays, num_rounds=rounds, timeout=timeout, evaluate_fn=self._evaluate
            )
            return
        arrays = self.strategy.initial_arrays
        if self.strategy.rounds:
            self._evaluate_last(arrays, grid)
        (self.evaluation or self.strategy).start(
            grid=grid,
            initial_arrays=arrays,
            num_rounds=self.strategy.remaining_rounds(rounds),
            timeout=timeout,
            evaluate_fn=self._evaluate,
        )

    def _finish(self, grid: Grid) -> None:
        """Give the last round's student its last head, and measure it again."""
        before, timeout = self.scores[-1], self.settings.strategy.timeout
        done = finish(self.student, grid, before["round"], self.settings.admission, timeout)
        arrays = arrays_of(self.student)
        if self.evaluation is not None:
            self.evaluation.again(before["round"], arrays, grid, timeout)
        self._score(before["round"], arrays)
        after = self.scores.pop()
        self.finished = {"head": "statistics", "clients": list(done.clients), "missing": done.missing, "after": after}

    def _evaluate_last(self, arrays: ArrayRecord, grid: Grid) -> None:
        """The student of the round after which the run was killed, which may not have been scored any more."""
        assert self.strategy is not None
        done = len(self.strategy.rounds)
        known = self.scores[done - 1]["evaluation"] if len(self.scores) == done else None
        self.scores = self.scores[: done - 1]
        if self.evaluation is not None and known is None:
            self.evaluation.again(done, arrays, grid, self.settings.strategy.timeout)
        self._score(done, arrays, known)

    def _evaluate(self, server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        if server_round == 0:
            return None
        done = 0 if self.strategy is None else self.strategy.done_before
        score = self._score(done + server_round, arrays)
        return None if score is None else MetricRecord({"test_accuracy": score})

    def _score(self, server_round: int, arrays: ArrayRecord, known: dict[str, Any] | None = None) -> float | None:
        """Score the student after a round; `known` is what clients measured of it before a crash."""
        student = build_model(architecture_of(self.settings.model.student)).to(self.device)
        student.load_state_dict(arrays.to_torch_state_dict())
        self.events.round = server_round
        require_sound(student, f"round {server_round}")
        score = None if self.test is None else accuracy(student, self.test)
        self.student = student.eval()
        self.scores.append({
            "round": server_round,
            "student_test_accuracy": score,
            "seconds": self.earlier + time.perf_counter() - self.started,
            "evaluation": known or self._measured(server_round),
        })  # fmt: skip
        self.events.tell("evaluation", "ended", student_test_accuracy=score)
        if score is not None:
            log.info("round %d: student %.1f %% of the test split", server_round, 100 * score)
        if self.strategy is not None:
            write_json(self.state_directory / "scores.json", self.scores)
        return score

    def _measured(self, server_round: int) -> dict[str, Any] | None:
        """What clients measured after a round; None where they are not asked."""
        if self.evaluation is None:
            return None
        found = summary(self.evaluation.rounds[server_round], self._class_names())
        for each in found["clients"]:
            known = {key: each[key] for key in ("images", "student_accuracy", "own_accuracy", "reason")}
            about = {key: value for key, value in known.items() if value not in (None, "")}
            self.events.tell("evaluation", "measured" if each["images"] else "missed", each["name"], **about)
        log.info("round %d: %s", server_round, in_words(found))
        return found

    def _report(self) -> dict[str, Any]:
        total = self.earlier + time.perf_counter() - self.started
        records = [] if self.strategy is None else self.strategy.rounds
        device, names = str(self.device), self._class_names()
        scores, finish = self.scores, self.finished
        found = reporting.build(self.settings, records, scores, self.student, self.test, device, total, names)
        return found if finish is None else reporting.with_finish(found, finish)

    def _write(self, finished: dict[str, Any]) -> None:
        report.save_student(self.output / "student.safetensors", self.student)
        measured = finished["evaluation"]
        if measured is not None and measured["mean"] is not None:
            report.plot_evaluation(self.output / "evaluation.png", measured)
        if self.strategy is not None:
            reporting.draw(self.output, self.strategy.rounds[-1], finished, self._class_names())
        write_json(self.output / "report.json", finished)
        write_page(self.output, self.test if self.settings.show_real else None)

    def _class_names(self) -> Sequence[str]:
        """Of the student's classes: the settings', the test split's, the clients', or numbers."""
        student, last = self.settings.model.student, self.strategy.rounds[-1:] if self.strategy is not None else []
        own = self.test.class_names if self.test is not None else None
        theirs = next((teacher.spec.class_names for record in last for teacher in record.teachers), None)
        return student.class_names or own or theirs or [str(label) for label in range(student.num_classes)]


def _identity(settings: Settings) -> dict[str, str]:
    """What decides the student beyond the strategy's own settings: data, clients and their models, by key."""
    groups = {"data": settings.data, "client": settings.client, "model": settings.model}
    known = {f"{group}.{f.name}": repr(getattr(each, f.name)) for group, each in groups.items() for f in fields(each)}
    shared = settings.data.source != "none" and not settings.data.nodes
    if shared and settings.clients_evaluate:  # then a client trains on less of its part
        known["evaluation"] = "clients hold out"
    return {key: value for key, value in known.items() if key not in ("data.memory", "data.workers")}


def build_inner(settings: Settings) -> Strategy:
    """The Flower strategy that the settings name.

    Raises:
        SettingError: arguments that it does not take.
    """
    config = settings.strategy
    asks = (config.arguments or {}).get("fraction_evaluate", 0)
    require(not asks, "strategy.arguments.fraction_evaluate", asks, "0; evaluation=clients asks every client")
    nodes = config.min_nodes
    common = {"fraction_evaluate": 0.0, "min_train_nodes": nodes, "min_available_nodes": nodes}
    try:
        return getattr(strategies, config.name)(**{**common, **(config.arguments or {})})
    except (TypeError, ValueError) as error:
        allowed = f"what {config.name} takes ({error})"
        raise SettingError("strategy.arguments", dict(config.arguments or {}), allowed) from error
