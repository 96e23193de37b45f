"""A Vision Transformer, a Swin Transformer and a ResNet in one federation, through the whole app."""

import logging

import pytest
import torch

from clients.app import own_statistics
from server.checks import check_models
from smi_fed.config import load_settings
from smi_fed.data import digits
from smi_fed.models import build_model
from smi_fed.report import load_student
from smi_fed.sparse_images import SparseImages
from smi_fed.strategies.run_state import client_number
from tests.e2e.test_app import CONF, SMOKE, nodes, run

OVERRIDES = f"model=mixed inversion=sparse {SMOKE}"
ARCHITECTURES = [
    "vit_tiny_patch16_224 (patch 4, width 64, depth 2, heads 4)",
    "swin_tiny_patch4_window7_224 (patch 4, window 4, width 24, depths 1+1, heads 2+4)",
    "resnet10t",
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(report, artefacts, log) of a run with both priors."""
    output = tmp_path_factory.mktemp("mixed")
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append
    log = logging.getLogger("smi_fed")
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        report = run(output, f"{OVERRIDES} inversion.batchnorm=0.1", nodes(3))
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
    return report, output / "out", [record.getMessage() for record in records]


def test_all_three_are_admitted_and_inverted(finished):
    report, output, _ = finished
    assert report["status"] == "completed"
    assert [client["architecture"] for client in report["clients"]] == ARCHITECTURES
    assert all(client["admitted"] and client["reason"] == "" for client in report["clients"])
    assert all(0 <= client["test_accuracy"] <= 1 for client in report["clients"])
    stored = [SparseImages.load(path) for path in sorted((output / "synthetic").iterdir())]
    assert [each.teachers.unique().tolist() for each in stored] == [[client_number(f"client {i}")] for i in range(3)]
    assert [tuple(each.images.shape) for each in stored] == [(4, 1, 32, 32)] * 3
    assert report["inversion"]["images"] == 12


def test_the_student_is_finite(finished):
    _, output, _ = finished
    student = load_student(output / "student.safetensors")
    assert all(bool(weight.isfinite().all()) for weight in student.state_dict().values())
    assert bool(student(digits()[1].images[:8]).isfinite().all())


def test_each_prior_is_for_those_that_can_have_it(finished):
    _, _, lines = finished
    said = [line for line in lines if "inverted without" in line]
    assert said == [
        "client 0 has no BatchNorm: inverted without that prior",
        "client 1 sent no feature statistics: inverted without that prior",
        "client 1 has no BatchNorm: inverted without that prior",
        "client 2 sent no feature statistics: inverted without that prior",
    ]


@pytest.mark.parametrize(("arch", "saves"), [("vit_p4_w64_d2", True), ("swin_p4_w24", False)])
def test_only_a_model_of_tokens_saves_flops(tmp_path, arch, saves):
    report = run(tmp_path, f"{OVERRIDES} server.min_teachers=1 strategy.min_nodes=1", nodes(1, arch=arch))
    sparse, dense = (report["inversion"][key] for key in ("flops", "dense_flops"))
    assert 0 < sparse <= dense
    assert (sparse < dense) == saves


@pytest.mark.slow
def test_two_rounds_go_on_from_own_weights(tmp_path):
    report = run(tmp_path, f"{OVERRIDES} strategy.rounds=2 pool.images=6 pool.warm=true", nodes(3))
    assert [each["round"] for each in report["rounds"]] == [1, 2]
    assert all(client["admitted"] for client in report["clients"])


def test_models_without_tokens_send_no_statistics():
    settings = load_settings(CONF, OVERRIDES)
    check_models(settings)
    sent = {
        name: own_statistics(settings, build_model(spec).eval(), digits()[0].select(torch.arange(80)))
        for name, spec in settings.model.clients.items()
    }
    assert [name for name, known in sent.items() if known is not None] == ["vit_p4_w64_d2"]
