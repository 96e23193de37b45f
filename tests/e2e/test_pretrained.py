"""Clients and a student that start from files, through the whole app."""

import json
import logging
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from rich.filesize import decimal
from safetensors.torch import load_file, save_file

from clients.app import app as client_app
from clients.app import train_round
from clients.rounds import OwnModels, TrainRequest
from server.checks import check_models
from server.run import FederatedRun
from simulations.local_grid import InProcessGrid
from smi_fed.checks import SettingError
from smi_fed.config import load_settings
from smi_fed.data import load_images
from smi_fed.models import architecture_of, build_seeded
from smi_fed.report import load_student
from tests.e2e.test_app import CONF, nodes
from tests.e2e.test_owners import ask
from tests.e2e.test_processes import started

NAMES = ("vit_p4_w64_d2", "vit_p8_w96_d3", "vit_p4_w48_d3", "vit_p8_w64_d4")


@pytest.fixture(scope="module")
def starts(tmp_path_factory):
    """Files of the demo's models, and the overrides that name them."""
    directory, settings = tmp_path_factory.mktemp("starts"), load_settings(CONF)
    specs = {f"clients.{name}": settings.model.clients[name] for name in NAMES} | {"student": settings.model.student}
    words = []
    for key, spec in specs.items():
        path = directory / f"{key}.safetensors"
        save_file(build_seeded(spec, 7).backbone.state_dict(), path)
        words.append(f"model.{key}.start={path}")
    return " ".join(["experiment=smoke", *words])


def bytes_of(spec):
    return sum(weight.nbytes for weight in build_seeded(architecture_of(spec), 0).state_dict().values())


def test_a_federation_of_pretrained_models(tmp_path, starts, caplog):
    overrides = (
        f"{starts} training=finetune client.training.trainable=last:1 distillation=finetune distillation.steps=3 "
        "inversion.statistics=0"
    )
    federated = FederatedRun(load_settings(CONF, overrides), tmp_path / "out")
    with caplog.at_level(logging.INFO, "smi_fed"):
        report = federated.execute(InProcessGrid(client_app, nodes(), {"overrides": overrides}))
    assert [client["admitted"] for client in report["clients"]] == [True] * 4
    assert [client["start"] for client in report["clients"]] == ["file"] * 4
    assert (report["start"], report["student"]["start"]) == ("own", "file")
    assert report["distillation"]["steps"] == 3
    told = r"client 0, round 1: training on \d+ images: finetune, steps \d+, .*trainable last:1.*; device: "
    assert re.search(told, caplog.text)
    told = json.loads((tmp_path / "out" / "report.json").read_text())
    place = Path(starts.rpartition("=")[2]).parent
    assert str(place) in json.dumps(told.pop("settings"))  # the server's own
    assert str(place) not in json.dumps(told)
    load_student(tmp_path / "out" / "student.safetensors")
    # What is frozen does not travel, and the report of each round tells what did.
    assert report["rounds"][0]["bytes"] == [
        {key: client[key] for key in ("node", "name", "bytes_to_client", "bytes_from_client")}
        for client in report["clients"]
    ]
    models = federated.settings.model
    for client, name in zip(report["clients"], NAMES, strict=True):
        depth = models.clients[name].kwargs["depth"]
        assert 0.5 / depth < client["bytes_from_client"] / bytes_of(models.clients[name]) < 1.3 / depth, client
        assert client["bytes_to_client"] > bytes_of(models.student)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_frozen_backbone_costs_a_heads_kilobytes(tmp_path, starts):
    """On Flower's simulation engine, in both rounds.

    Client 1 has the student's architecture and the start that comes with it; client 3 has none and sends all.
    """
    words = [word for word in starts.split() if NAMES[1] not in word and NAMES[3] not in word] + [
        f"model.clients.{NAMES[1]}.kwargs.depth=4", "training=head", "client.training.steps=3", "distillation=head",
        "distillation.steps=3", "inversion.statistics=0", "strategy.rounds=2",
    ]  # fmt: skip
    process, _ = started("simulations.demo", tmp_path, *words)
    printed, _ = process.communicate()
    assert process.returncode == 0, printed[-3000:]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    settings = load_settings(CONF, words)
    wholes = {f"client {i}": bytes_of(settings.model.clients[name]) for i, name in enumerate(NAMES)}
    assert [len(each["bytes"]) for each in report["rounds"]] == [4, 4]
    for client in report["rounds"][0]["bytes"] + report["rounds"][1]["bytes"]:
        name, received = client["name"], client["bytes_from_client"]
        assert (received > wholes[name]) if name == "client 3" else (received < 12_000 < wholes[name] / 10), client
        assert client["bytes_to_client"] > bytes_of(settings.model.student)
    assert [client["start"] for client in report["clients"]] == ["file", "file", "file", "random"]
    assert "received" in printed
    for client in report["clients"]:
        assert decimal(client["bytes_from_client"]) in printed


def test_where_class_statistics_are_all_a_client_sends_no_weights_of_its_own(starts):
    only = ["strategy.start=statistics", "distillation.steps=0", "client.minimum_examples=2"]
    content = ask({"source": "digits", "arch": NAMES[0]}, [*starts.split()[1:], *only]).content
    own = load_file(next(word for word in starts.split() if NAMES[0] in word).partition("=")[2])
    sent = content["arrays"].to_torch_state_dict()
    assert {f"backbone.{key}" for key in own} == sent.keys()
    assert not torch.equal(sent["backbone.patch_embed.proj.weight"], own["patch_embed.proj.weight"])
    assert content["class-statistics"]["counts"].numpy().sum() == content["metrics"]["num-examples"] == 1797


def request(student, model, server_round=1):
    content = RecordDict({
        "arrays": ArrayRecord(model.state_dict()), "config": ConfigRecord({"server-round": server_round}),
    })  # fmt: skip
    return TrainRequest(SimpleNamespace(content=content), student)


@pytest.mark.parametrize(
    ("server_round", "student_starts", "own"), [(1, False, True), (1, True, False), (2, False, False)]
)
def test_a_start_is_not_lost_to_a_student_of_random_weights(tmp_path, server_round, student_starts, own):
    """The embedding, which is frozen, tells where a client of the student's architecture went on from."""
    words = ["model=digits_homogeneous", "training=head", "client.training.steps=1"]
    plain = load_settings(CONF, words).model.student
    path = tmp_path / "start.safetensors"
    pretrained, sent = build_seeded(plain, 7), build_seeded(plain, 1)
    save_file(pretrained.backbone.state_dict(), path)
    keys = ["clients.vit_p8_w96_d4", *(["student"] if student_starts else [])]
    settings = load_settings(CONF, [*words, *(f"model.{key}.start={path}" for key in keys)])
    spec, data = settings.model.clients["vit_p8_w96_d4"], load_images(settings.data)[0].select(range(40))
    kept = OwnModels(SimpleNamespace(run_config={}, state=RecordDict()), 0)
    path = request(settings.model.student, sent, server_round)
    model, _ = train_round(settings, 0, spec, data, path, kept)
    expected = (pretrained if own else sent).backbone.patch_embed.proj.weight
    assert torch.equal(model.backbone.patch_embed.proj.weight, expected)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        (
            "training=finetune client.training.trainable=last:4",
            r"^client\.training\.trainable: got 'last:4'",
        ),
        ("distillation=head distillation.trainable=last:5", r"^distillation\.trainable: got 'last:5', .* 1 to 4"),
        ("model.student.start=/nowhere.pth", r"^model\.student\.start: got '/nowhere.pth'"),
    ],
)
def test_mistakes_are_refused_before_any_client_is_asked(override, says):
    with pytest.raises(SettingError, match=says):
        check_models(load_settings(CONF, override))


def test_the_server_does_not_look_for_a_clients_file():
    """It lies at that client, which finds out before it trains: see `test_owners`."""
    check_models(load_settings(CONF, f"model.clients.{NAMES[0]}.start=/nowhere.pth"))
