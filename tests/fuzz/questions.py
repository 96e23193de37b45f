"""Doors of other answers than a training's, of Flower's older API, and of what is shown of a client."""

import io
import json
import tempfile
from functools import cache
from pathlib import Path
from random import Random

import safetensors.torch
import torch
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.common import Code, FitRes, Parameters, Status, ndarrays_to_parameters
from flwr.server.client_proxy import ClientProxy
from flwr.server.strategy import FedAvg as LegacyFedAvg
from flwr.serverapp.strategy import FedAvg
from rich.console import Console

from simulations.local_grid import InProcessGrid
from smi_fed.events import Events
from smi_fed.files import write_json
from smi_fed.models import build_seeded
from smi_fed.report import plot_curves, plot_evaluation, plot_images, print_summary
from smi_fed.report_page import page
from smi_fed.strategies import FederatedEvaluation, LegacyDataFreeDistillation, finishing, records
from smi_fed.strategies.beginning import NoStartError
from smi_fed.strategies.evaluation import Counts, Measured, in_words, summary
from smi_fed.strategies.evaluation_records import BY_CLASS, KEYS, pack_evaluation
from smi_fed.strategies.run_state import file_name
from smi_fed.watchers import JsonLines, scalars
from tests.fuzz import messages, mutations, payloads
from tests.fuzz.door import MEBIBYTE, Case, Door, Refused, require_printable
from tests.fuzz.replies import size_of, spec_text
from tests.fuzz.server import NODE, POLICY, SPEC, good, known_statistics, model, require_sound, room
from tests.test_report import REPORT
from tests.test_report import measured as measured_example
from tests.test_report_page import full
from tests.test_sparse_images import sparse

EVALUATION_KEYS = (*KEYS.values(), *(f"{BY_CLASS}{key}" for key in KEYS.values()), records.NAME, records.SCHEMA)
CLASSES = ("cat", "dog", "owl")


@cache
def asked(answer: str):
    """A question that is out, with whoever asked."""
    grid = InProcessGrid(lambda *_: None, {NODE: {}, NODE + 1: {}})  # type: ignore[arg-type]
    arrays = finishing.arrays_of(build_seeded(SPEC, 1))
    strategy = FederatedEvaluation(FedAvg(fraction_evaluate=0.0, min_train_nodes=1), classes=3)
    questions = list(strategy.configure_evaluate(1, arrays, ConfigRecord(), grid))
    grid.push_messages(questions)
    return strategy, questions, answer


@cache
def counted(with_classes: bool) -> RecordDict:
    rows = (Counts(10, 5, 4), Counts(5, 5, 5), Counts(0, 0, 0)) if with_classes else None
    return pack_evaluation(Measured("St Mary", Counts(15, 10, 9), rows))


def evaluation(rng: Random) -> Case:
    """One good answer and one hostile one, put together as the report has them."""
    strategy, (first, second), _ = asked("evaluation")
    content = messages.content(rng, counted(rng.random() < 0.7), EVALUATION_KEYS)

    def enter() -> None:
        replies = [Message(counted(True), reply_to=first), Message(content, reply_to=second)]
        strategy.aggregate_evaluate(1, replies)
        found = summary(strategy.rounds[1], CLASSES)
        json.dumps(found, allow_nan=False)
        require_printable(in_words(found), 2000)
        assert 0 <= found["mean"]["student_accuracy"] <= 1
        for line in found["clients"]:
            require_printable(line["name"], 100)
            require_printable(line["reason"], 1100)
        reason = next(each.reason for each in strategy.rounds[1] if each.node == NODE + 1)
        if reason:
            raise Refused(reason)

    return Case(size_of(content), enter)


class Answered(InProcessGrid):
    """Gives answers that are there already."""

    answers: tuple[RecordDict, ...]

    def send_and_receive(self, messages, *, timeout=None):
        questions = list(messages)
        self.push_messages(questions)
        return [Message(each, reply_to=question) for each, question in zip(self.answers, questions, strict=True)]


def last_head(rng: Random) -> Case:
    answer = finishing.pack_answer("St Mary", known_statistics()[1])
    content = messages.content(rng, answer, (records.CLASS_STATISTICS, records.MODEL, "counts", "sums", "moments"))
    grid, alone = Answered(lambda *_: None, {NODE: {}, NODE + 1: {}}), rng.random() < 0.2  # type: ignore[arg-type]
    grid.answers = (content, content if alone else answer)

    def enter() -> None:
        student = build_seeded(SPEC, 1)
        done = finishing.finish(student, grid, 1, POLICY)
        assert all(bool(weight.isfinite().all()) for weight in student.state_dict().values())
        for text in (*done.clients, *done.missing.values()):
            require_printable(text, 1100)
        if done.missing:
            raise Refused(next(iter(done.missing.values())))

    return Case(size_of(content), enter)


# Flower's older API


@cache
def fitted(kind: int) -> FitRes:
    features, sums = known_statistics()
    more = ({}, {"label_counts": [2, 3, 1]}, {"statistics": features}, {"class_statistics": sums})[kind]
    arrays, examples, metrics = records.pack_fit(
        SPEC, model().state_dict(), name="St Mary", num_examples=6, train_loss=0.5, **more
    )
    return FitRes(Status(Code.OK, ""), ndarrays_to_parameters(arrays), examples, metrics)


OLD_KEYS = (
    records.SPEC_METRIC, records.SCHEMA_METRIC, records.NAME_METRIC, records.LABEL_COUNTS, records.STATISTICS,
    records.CLASS_STATISTICS, records.TRAIN_LOSS, records.NUM_EXAMPLES,
)  # fmt: skip


def hostile_fit(rng: Random) -> FitRes:
    known = fitted(rng.randrange(4))
    metrics, tensors, examples = dict(known.metrics), list(known.parameters.tensors), known.num_examples
    for _ in range(rng.randrange(1, 4)):
        change, key = rng.randrange(6), rng.choice(OLD_KEYS)
        if change == 0:
            at = rng.randrange(len(tensors))
            tensors[at] = payloads.payload(rng, tensors[at])
        elif change == 1:
            examples = rng.choice(mutations.INTS)
        elif change == 2 and key in (records.STATISTICS, records.CLASS_STATISTICS):
            metrics[key] = payloads.safetensors_file(rng, known.metrics.get(key) or plain_file())
        elif change == 3:
            metrics[records.LABEL_COUNTS] = mutations.as_json(rng, mutations.tree(rng, [2, 3, 1])).encode(
                errors="replace"
            ).decode()  # fmt: skip
        elif change == 4:
            metrics[records.SPEC_METRIC] = spec_text(rng).encode(errors="replace").decode()
        else:
            value = messages.scalar(rng, ConfigRecord())
            metrics[rng.choice((key, mutations.text(rng)))] = value  # type: ignore[assignment]
    return FitRes(known.status, Parameters(tensors, "numpy.ndarray"), examples, metrics)


@cache
def plain_file() -> bytes:
    return safetensors.torch.save({"mean.0": torch.zeros(5, 8), "examples": torch.tensor(6)})


def size_of_fit(reply: FitRes) -> int:
    texts = (len(str(value)) for value in reply.metrics.values())
    return sum(map(len, reply.parameters.tensors)) + sum(texts)


def old_metrics(rng: Random) -> Case:
    reply = hostile_fit(rng)

    def enter() -> None:
        claim = records.read_fit(reply.metrics, reply.num_examples, good(0)[records.ARRAYS])
        require_printable(claim.name, 64)
        assert claim.label_counts is None or all(type(count) is int for count in claim.label_counts)

    return Case(size_of_fit(reply), enter)


class Nobody(ClientProxy):
    """A client that is never called."""

    def fit(self, *_):
        raise NotImplementedError

    get_properties = get_parameters = evaluate = reconnect = fit


@cache
def old_server() -> LegacyDataFreeDistillation:
    return LegacyDataFreeDistillation(LegacyFedAvg(fraction_evaluate=0.0), student=SPEC, start="statistics")


def old_reply(rng: Random) -> Case:
    reply, server = hostile_fit(rng), old_server()

    def enter() -> None:
        server.core.begin(1)
        server._judge_all([(Nobody("7"), reply)], [])
        (verdict,) = server.core.arrivals.verdicts
        require_printable(verdict.reason, 2000)
        if not verdict.admitted:
            raise Refused(verdict.reason)
        require_sound(verdict.teacher.load(verify=True), verdict.architecture)

    return Case(size_of_fit(reply), enter)


# What is shown


@cache
def log_file() -> JsonLines:
    return JsonLines(room() / "events.jsonl", append=False)


def name(rng: Random) -> Case:
    text = "".join(mutations.text(rng) for _ in range(rng.randrange(1, 4)))

    def enter() -> None:
        shown, log = records.clean_name(text), log_file()
        require_printable(shown, 64)
        assert not set(shown) & set('<>&"/\\[]{}$`|:;*?\n') - {"&"}, shown
        assert not shown or shown.strip() == shown
        assert shown == records.clean_name(shown)
        stem = file_name(shown)
        assert stem.isascii()
        assert set(stem) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-")
        assert len(stem) < 60
        log.opened = False
        log.append = False
        Events("run", [log, lambda event: scalars(event)]).tell("reply", "admitted", shown, claimed=text)
        (line,) = log.path.read_text(encoding="utf-8").split("\n")[:-1]
        assert json.loads(line)["node"] == shown

    return Case(len(text), enter)


def hostile_report(rng: Random) -> tuple[dict, str]:
    """A report of a run in which a client chose whatever a client can choose."""
    shown, reason = records.clean_name(mutations.text(rng)) or "node 11", mutations.text(rng)
    reason = str(records.BadReplyError(reason + mutations.text(rng)))
    report = full()
    numbers = {"num_examples": rng.choice((0, 1, 2**53)), "train_loss": rng.choice((0.0, 1e6, 5e-324))}
    for client in report["clients"]:
        client.update(numbers, name=shown, reason="" if client["admitted"] else reason)
    for line in report["rounds"]:
        line["admitted"] = [shown]
        line["refused"] = [{"node": "3", "name": shown, "reason": reason}]
    for each in report["evaluation"]["clients"]:
        each["name"] = shown
    report["evaluation"]["worst"]["name"] = shown
    return report, shown


def shown_report(rng: Random) -> Case:
    report, _ = hostile_report(rng)

    def enter() -> None:
        html = page(report, "run")
        assert "<script" not in html
        html.encode("utf-8")
        console = Console(file=io.TextIOWrapper(io.BytesIO(), encoding="utf-8"), width=110)
        print_summary({**report, "seconds": REPORT["seconds"]}, console)
        with tempfile.TemporaryDirectory() as directory:
            write_json(Path(directory) / "report.json", report)

    return Case(len(json.dumps(report)), enter)


def plots(rng: Random) -> Case:
    report, shown = hostile_report(rng)
    labels = [mutations.text(rng)[:200] for _ in range(5)]
    labels = [label if label.isprintable() else "class" for label in labels]  # others are not let in

    def enter() -> None:
        with tempfile.TemporaryDirectory() as directory:
            path, untested = Path(directory) / "x.png", [
                {**client, "test_accuracy": None, "admitted": True} for client in report["clients"]
            ]  # fmt: skip
            rounds = [{**line, "student_test_accuracy": None} for line in report["rounds"]]
            plot_curves(path, [2.0, 1.0], rounds, untested, None)
            told = measured_example()
            told["per_class"] = [
                {**each, "class": label} for each, label in zip(told["per_class"], labels, strict=False)
            ]
            for each in told["clients"]:
                each["name"] = shown
            plot_evaluation(path, told)
            plot_images(path, [sparse(5)], [shown], labels)

    return Case(len(json.dumps(report)), enter)


DOORS = (
    Door("evaluation", "an answer to an evaluation, and what the report makes of it", evaluation, 700),
    Door("last head", "an answer to the question for class statistics", last_head, 25, (NoStartError, Refused)),
    Door("old metrics", "what a reply of Flower's older API says beside its arrays", old_metrics, 600),
    Door("old reply", "a whole reply of Flower's older API", old_reply, 6, memory=64 * MEBIBYTE),
    Door("name", "a client's name, as far as files and logs", name, 900),
    Door("report", "what a client chose, on the page and in the closing table", shown_report, 3, (), 32 * MEBIBYTE),
    Door("pictures", "what a client chose, in pictures", plots, 0.3, (), 128 * MEBIBYTE, seconds=10.0),
)
