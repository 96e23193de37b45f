"""Who measures: the server, the clients on what they hold out, both or nobody; through the whole app."""

import io
import json
import logging
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from flwr.app import MessageType
from PIL import Image
from rich.console import Console

from clients.app import app as client_app
from clients.evaluation import answers
from clients.node import NodeConfig, node_of, node_split
from server.run import FederatedRun
from simulations.digit_folders import write_digits
from simulations.local_grid import InProcessGrid
from smi_fed.checks import SettingError
from smi_fed.config import join_overrides, load_settings
from smi_fed.data import DataConfig, shared_images
from smi_fed.data.lazy_images import Kept
from smi_fed.files import load_tensors
from smi_fed.models import build_model
from smi_fed.report import load_student, print_summary
from smi_fed.strategies.evaluation import NOTHING
from smi_fed.training import predict
from tests.e2e.test_owners import ARCH, CONF, HOSPITALS, by_name, owners, simulated
from tests.models import small_vit

NONE = ["experiment=smoke", "data.source=none", "data.test_fraction=0.25"]


class Counting(InProcessGrid):
    """Notes what kinds of messages are sent."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.kinds = []

    def push_messages(self, messages):
        messages = list(messages)
        self.kinds += [each.metadata.message_type for each in messages]
        return super().push_messages(messages)


def run(tmp_path, nodes, overrides=NONE, client=client_app, **run_config):
    text = join_overrides(overrides)
    grid = Counting(client, nodes, {"overrides": text, **run_config})
    report = FederatedRun(load_settings(CONF, text), tmp_path / "out").execute(grid)
    assert report == json.loads((tmp_path / "out" / "report.json").read_text())
    return report, grid.kinds


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    root = tmp_path_factory.mktemp("hospitals")
    return {name: write_digits(root / str(i), classes, 8) for i, (name, classes) in enumerate(HOSPITALS.items())}


@pytest.fixture(scope="module")
def finished(places, tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    report, kinds = run(root, owners(places), [*NONE, "strategy.rounds=2"], **{"client-state": str(root / "state")})
    return root, report, kinds


def lines(report):
    return {each["name"]: each for each in report["evaluation"]["clients"]}


def test_each_owner_measures_on_its_own_held_out_images(finished):
    _, report, kinds = finished
    assert {name: each["images"] for name, each in lines(report).items()} == {
        "St Mary's": 8, "Hôpital Nord": 6, "Charité": 8,
    }  # fmt: skip
    held = {name: [each["class"] for each in line["per_class"]] for name, line in lines(report).items()}
    assert held == {name: list(classes) for name, classes in HOSPITALS.items()}
    assert [each["images"] for each in report["evaluation"]["per_class"]] == [2, 2, 2, 4, 2, 2, 2, 2, 2, 2]
    assert {name: each["num_examples"] for name, each in by_name(report).items()} == {
        "St Mary's": 24, "Hôpital Nord": 18, "Charité": 24,
    }  # fmt: skip
    assert (kinds.count(MessageType.TRAIN), kinds.count(MessageType.EVALUATE)) == (6, 6)


def test_images_are_decoded_once_for_models_of_one_size(places):
    data = shared_images(DataConfig(source="folder", name=str(places["Charité"]), image_size=128, memory=1))[0]
    pixels, decoded = data.images.decoder.pixels, []
    decoder = SimpleNamespace(check=lambda _: None, pixels=lambda number: decoded.append(number) or pixels(number))
    data = replace(data, images=replace(data.images, decoder=decoder, kept=Kept(0)))
    models = [small_vit(seed, in_chans=1, img_size=side) for seed, side in enumerate((16, 16, 8))]
    for some, sizes in ((models[:2], 1), (models, 2)):
        found = answers(some, data, batch_size=7)
        assert sorted(decoded) == sorted(sizes * data.images.numbers.tolist())
        decoded.clear()
        for own, model in zip(found, some, strict=True):
            assert torch.equal(own, predict(model, data.resized(model.image_size).images[:]).argmax(1))
        decoded.clear()


def test_the_student_and_the_owners_newest_model_are_what_was_measured(finished, places):
    """Beside a plain loop over the files and the stored models, which knows nothing of how the app counts."""
    root, report, _ = finished
    student, settings = load_student(root / "out" / "student.safetensors"), load_settings(CONF, NONE)
    right = 0
    for name, path in places.items():
        node = node_of(settings, NodeConfig(data=str(path), name=name, arch=ARCH))
        own = build_model(settings.model.clients[ARCH])
        own.load_state_dict(
            load_tensors(root / f"state/client-{node.number}/round2.safetensors", "smi-fed.client", 1)[0]
        )
        data = node_split(settings, node, settings.model.clients[ARCH])[1]
        for model, kind in ((student, "student"), (own.eval(), "own")):
            with torch.no_grad():
                good = [int(model(data.images[[i]]).argmax()) == int(data.labels[i]) for i in range(len(data))]
            assert lines(report)[name][f"{kind}_right"] == sum(good)
            right += sum(good) if kind == "student" else 0
    mean = report["evaluation"]["mean"]
    assert (mean["images"], mean["student_right"], mean["student_accuracy"]) == (22, right, right / 22)
    lowest = min(each["student_accuracy"] for each in lines(report).values())
    assert report["evaluation"]["worst"]["student_accuracy"] == lowest


def test_report_summary_and_picture_tell_of_every_client(finished, caplog):
    root, report, _ = finished
    assert [set(each["evaluation"]) for each in report["rounds"]] == [{"mean", "worst"}] * 2
    assert report["rounds"][-1]["evaluation"]["mean"] == report["evaluation"]["mean"]
    printed = io.StringIO()
    print_summary(report, Console(file=printed, width=120))
    table = printed.getvalue().split("hold out")[1]
    for name, line in lines(report).items():
        assert any(name in row and f"{100 * line['own_accuracy']:.1f} %" in row for row in table.splitlines())
    assert "weighted mean" in table
    assert f"worst: {report['evaluation']['worst']['name']}" in table
    with Image.open(root / "out" / "evaluation.png") as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 300


def test_an_evaluation_that_fails_at_one_client_is_named_and_the_others_count(places, tmp_path):
    def failing(message, context):
        if message.metadata.message_type == MessageType.EVALUATE and context.node_config["name"] == "Charité":
            (Path(context.node_config["data"]) / "6").rename(tmp_path / "gone")
        return client_app(message, context)

    own = {**places, "Charité": write_digits(tmp_path / "charite", "6", 8)}
    report, _ = run(tmp_path, owners(own), client=failing)
    found = lines(report)
    assert "client failed: NodeError: Charité: data: got " in found["Charité"]["reason"]
    assert (found["Charité"]["images"], found["Charité"]["student_accuracy"]) == (0, None)
    assert (report["status"], report["evaluation"]["mean"]["images"]) == ("completed", 14)
    assert by_name(report)["Charité"]["admitted"]


def test_with_a_share_of_0_all_are_trained_on_and_there_is_nothing_to_evaluate(places, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "smi_fed"):
        report, _ = run(tmp_path, owners(places), [*NONE, "data.test_fraction=0"])
    assert {each["reason"] for each in lines(report).values()} == {NOTHING}
    assert (report["evaluation"]["mean"], report["evaluation"]["worst"]) == (None, None)
    assert by_name(report)["St Mary's"]["num_examples"] == 32
    assert "St Mary's: nothing is held out, with test_fraction 0.0 there is nothing to evaluate" in caplog.text
    assert not (tmp_path / "out" / "evaluation.png").exists()


def test_a_client_that_does_not_tell_its_label_counts_does_not_tell_them_here_either(places, tmp_path):
    secret = [*NONE, "client.send_label_counts=false", "distillation.ensemble=uniform"]
    report, _ = run(tmp_path, owners(places), secret)
    assert report["evaluation"]["mean"]["images"] == 22
    assert (report["evaluation"]["per_class"], lines(report)["Charité"]["per_class"]) == ([], [])


SHARED = ["experiment=smoke", "data.scheme=iid"]


@pytest.mark.parametrize(
    ("who", "server", "clients"),
    [(None, True, False), ("clients", False, True), ("both", True, True),
     ("none", False, False)],
)  # fmt: skip
def test_who_evaluates_where_all_share_a_source(tmp_path, who, server, clients):
    report, kinds = run(tmp_path, simulated(2), [*SHARED, *([f"evaluation={who}"] if who else [])])
    assert kinds.count(MessageType.EVALUATE) == (2 if clients else 0)
    assert (report["student"]["test_accuracy"] is not None) == server
    assert all((each["test_accuracy"] is not None) == server for each in report["clients"])
    assert (report["evaluation"] is not None) == clients
    trained = sum(each["num_examples"] for each in report["clients"])
    held = report["evaluation"]["mean"]["images"] if clients else 0
    assert trained + held == 1347
    assert held == pytest.approx(0.25 * 1347, abs=10) if clients else held == 0
    assert (tmp_path / "out" / "evaluation.png").exists() == clients


def test_a_strategy_that_runs_by_itself_is_evaluated_too(places, tmp_path):
    alone = ["model=digits_homogeneous", "strategy.distillation=false", "strategy.rounds=2"]
    nodes = {number: {k: v for k, v in each.items() if k != "arch"} for number, each in owners(places).items()}
    report, kinds = run(tmp_path, nodes, [*NONE, *alone])
    assert kinds.count(MessageType.EVALUATE) == 6
    assert set(lines(report)) == set(HOSPITALS)
    assert report["rounds"][0]["evaluation"]["mean"]["images"] == 22
    assert all(0 <= each["own_accuracy"] <= 1 for each in lines(report).values())
    assert (tmp_path / "out" / "evaluation.png").exists()


def test_clients_of_some_classes_are_measured_in_the_students(places, tmp_path):
    """The client's model knows 3, 1 and 2 in this order, at 24 pixels; the student has all ten digits, at 32."""
    kwargs = "{img_size:24,patch_size:4,embed_dim:48,depth:1,num_heads:3,in_chans:1}"
    model = f"{{name:vit_tiny_patch16_224,num_classes:3,image_size:24,class_names:['3','1','2'],kwargs:{kwargs}}}"
    nodes = {number: {**owners(places)[100], "arch": "some", "name": f"part {number}"} for number in (7, 8)}
    report, _ = run(tmp_path, nodes, [*NONE, f"+model.clients.some={model}", "client.training.steps=60"])
    found = lines(report)["part 7"]
    assert [(each["class"], each["images"]) for each in found["per_class"]] == [("1", 2), ("2", 2), ("3", 2)]
    assert found["own_accuracy"] > 0.5  # by numbers instead of names it would be at most a third


@pytest.mark.parametrize("when", ["before round 1 is scored", "in round 2"])
def test_a_killed_run_evaluates_what_it_had_not(places, tmp_path, monkeypatch, when):
    overrides, score, asked = [*NONE, "strategy.rounds=2"], FederatedRun._score, []

    def killed(self, *args):
        raise KeyboardInterrupt

    def dying(message, context):
        asked.append(message.metadata.message_type)
        if asked.count(MessageType.TRAIN) > 3:
            raise KeyboardInterrupt
        return client_app(message, context)

    if when == "before round 1 is scored":
        monkeypatch.setattr(FederatedRun, "_score", killed)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, owners(places), overrides, client=dying)
    monkeypatch.setattr(FederatedRun, "_score", score)
    report, kinds = run(tmp_path, owners(places), overrides)
    assert kinds.count(MessageType.EVALUATE) == (6 if when == "before round 1 is scored" else 3)
    assert kinds.count(MessageType.TRAIN) == 3
    assert [each["evaluation"]["mean"]["images"] for each in report["rounds"]] == [22, 22]


def test_a_server_without_images_cannot_evaluate():
    for who in ("server", "both"):
        with pytest.raises(SettingError, match=f"evaluation: got '{who}', allowed: clients . none, since data.source"):
            load_settings(CONF, ["data.source=none", f"evaluation={who}"])
    assert load_settings(CONF, ["data=none"]).evaluation == "clients"
    assert load_settings(CONF, ["data=none", "evaluation=none"]).evaluation == "none"
    assert load_settings(CONF).evaluation == "server"


def test_flowers_own_share_is_refused_with_what_to_say_instead(tmp_path):
    text = ["strategy.arguments={fraction_evaluate:0.5}"]
    with pytest.raises(SettingError, match="fraction_evaluate: got 0.5, allowed: 0; evaluation=clients asks"):
        FederatedRun(load_settings(CONF, text), tmp_path)
