"""A server with its questions out, and good replies to them."""

import json
import tempfile
from functools import cache
from pathlib import Path

import torch
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp.strategy import FedAvg

from simulations.local_grid import InProcessGrid
from smi_fed.class_statistics import class_statistics
from smi_fed.files import save_tensors
from smi_fed.inversion import feature_statistics
from smi_fed.models import ModelSpec, build_seeded
from smi_fed.policy import AdmissionPolicy
from smi_fed.strategies import DataFreeDistillation, records
from smi_fed.strategies.allow_list import Expectation
from smi_fed.strategies.watching_grid import WatchingGrid
from tests.fuzz.door import Refused, require_printable

torch.set_num_threads(1)
CPU, POLICY = torch.device("cpu"), AdmissionPolicy()
SPEC = ModelSpec(
    "vit_tiny_patch16_224", 3,
    kwargs={"img_size": 16, "patch_size": 8, "embed_dim": 8, "depth": 1, "num_heads": 2, "mlp_ratio": 1.0},
)  # fmt: skip
NODE = 11
EXPECTED = Expectation(SPEC, channels=3, features=8)


@cache
def model():
    return build_seeded(SPEC, 1).eval()


@cache
def known_statistics():
    images = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 0, 1, 1, 1, 2])
    return feature_statistics(model(), [images]), class_statistics(model(), [(images, labels)])


@cache
def good(kind: int) -> RecordDict:
    """A reply that is let in, with more or less in it."""
    features, sums = known_statistics()
    more = {
        0: {}, 1: {"label_counts": [2, 3, 1]}, 2: {"statistics": features}, 3: {"class_statistics": sums},
        4: {"label_counts": [2, 3, 1], "statistics": features, "class_statistics": sums},
    }[kind]  # fmt: skip
    weights = model().state_dict()
    left = records.digests({"backbone.cls_token": weights["backbone.cls_token"]}).values() if kind == 4 else ()
    return records.pack_reply(
        SPEC, weights, name="St Mary", num_examples=6, train_loss=0.5, known=frozenset(left), **more
    )


@cache
def room() -> Path:
    """Where files stand while they are tried; goes with the process."""
    return Path(_temporary().name)


@cache
def _temporary() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="smi-fed-fuzz-", ignore_cleanup_errors=True)


class Server:
    """A round that goes on for ever: a real strategy, whose questions are out, and its verdicts."""

    def __init__(self) -> None:
        self.temporary = tempfile.TemporaryDirectory(prefix="smi-fed-fuzz-")
        start = Path(self.temporary.name) / "start.safetensors"
        save_tensors(start, dict(model().backbone.state_dict()), "start", 1)
        student = ModelSpec(SPEC.name, SPEC.num_classes, kwargs=SPEC.kwargs, start=str(start))
        inner = FedAvg(fraction_evaluate=0.0, min_train_nodes=1, min_available_nodes=1)
        self.strategy = DataFreeDistillation(inner, student=student, start="statistics", known_starts=[student])
        grid = WatchingGrid(InProcessGrid(lambda *_: None, {NODE: {}}))  # type: ignore[arg-type]
        (self.question,) = self.strategy.configure_train(1, self.strategy.initial_arrays, ConfigRecord(), grid)
        grid.push_messages([self.question])
        self.known, self.verdicts = self.strategy._questions.known, self.strategy.core.arrivals.verdicts

    def close(self) -> None:
        """Remove its files."""
        self.strategy.core.state._temporary.cleanup()
        self.temporary.cleanup()

    def judge(self, reply: Message) -> None:
        """The way of a reply that has arrived; raises Refused with the verdict's reason."""
        self.strategy._questions.begin(1, [self.question], (), self.known)  # it has no answer yet
        self.strategy._arrived(reply)
        (verdict,) = self.verdicts
        self.verdicts.clear()
        require_printable(verdict.called, 100)
        require_printable(verdict.reason, 2000)
        json.dumps([verdict.name, verdict.num_examples, verdict.train_loss, dict(verdict.metrics)], allow_nan=False)
        if not verdict.admitted:
            raise Refused(verdict.reason)
        require_sound(verdict.teacher.load(verify=True), verdict.architecture)


def require_sound(teacher, architecture: str) -> None:
    """What may be let in: finite, allowed, and small enough to be counted."""
    assert teacher.spec.name in POLICY.architectures
    assert all(bool(weight.isfinite().all()) for weight in teacher.model.state_dict().values())
    assert 1 <= teacher.num_examples <= 2**53, teacher.num_examples
    assert teacher.label_counts is None or sum(teacher.label_counts) == teacher.num_examples
    require_printable(architecture, 300)
    for text in (teacher.name, *(teacher.spec.class_names or ())):
        require_printable(text, 300)
    features, sums = teacher.statistics, teacher.class_statistics
    assert features is None or all(bool(t.isfinite().all()) for t in (*features.mean, *features.std))
    assert features is None or all(bool((t >= 0).all()) for t in features.std)
    assert sums is None or all(bool(t.isfinite().all()) for t in vars(sums).values())
    assert bool(teacher.model(torch.rand(2, len(teacher.model.mean), *teacher.model.image_size)).isfinite().all())


_server: list[Server] = []
RENEWED = 400
_used = [0]


def server() -> Server:
    """A server that is not yet full of names and files."""
    _used[0] += 1
    if not _server or _used[0] % RENEWED == 0:
        for old in _server:
            old.close()
        _server[:] = [Server()]
    return _server[0]
