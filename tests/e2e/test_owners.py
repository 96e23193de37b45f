"""Owners with images of their own, and a server that has none."""

import io
import json
import logging
import re
from pathlib import Path

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from PIL import Image
from rich.console import Console

from clients.app import app as client_app
from server.run import FederatedRun
from simulations.digit_folders import write_digits
from simulations.local_grid import InProcessGrid
from smi_fed.checks import SettingError
from smi_fed.config import join_overrides, load_settings
from smi_fed.models import build_seeded
from smi_fed.report import load_student, print_summary
from smi_fed.strategies import TooFewTeachersError
from smi_fed.strategies.records import clean_name
from tests.models import small_vit

CONF = Path(__file__).resolve().parents[2] / "conf"
NONE = ["experiment=smoke", "data.source=none", "data.test_fraction=0"]
ARCH = "vit_p8_w96_d3"


HOSPITALS = {"St Mary's": "0123", "Hôpital Nord": "345", "Charité": "6789"}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    root = tmp_path_factory.mktemp("hospitals")
    sizes = range(3, 6)
    return {
        name: write_digits(root / str(size), classes, size)
        for (name, classes), size in zip(HOSPITALS.items(), sizes, strict=True)
    }


def owners(places, **extra):
    return {
        100 + i: {"data": str(path), "name": name, "arch": ARCH, **extra}
        for i, (name, path) in enumerate(places.items())
    }


def run(tmp_path, nodes, overrides=(), **grid):
    text = join_overrides([*NONE, *overrides])
    federated = FederatedRun(load_settings(CONF, text), tmp_path / "out")
    return federated.execute(InProcessGrid(client_app, nodes, {"overrides": text}, **grid))


@pytest.fixture(scope="module")
def finished(places, tmp_path_factory):
    output = tmp_path_factory.mktemp("run")
    run(output, owners(places))
    return output / "out"


def by_name(report):
    return {client["name"]: client for client in report["clients"]}


def test_each_owner_trains_on_its_own_directory_and_is_called_by_its_name(finished):
    report = json.loads((finished / "report.json").read_text())
    clients = by_name(report)
    assert {name: each["num_examples"] for name, each in clients.items()} == {
        "St Mary's": 12, "Hôpital Nord": 12, "Charité": 20,
    }  # fmt: skip
    assert all(each["train_loss"] > 0 and each["test_accuracy"] is None for each in clients.values())
    assert (report["student"]["test_accuracy"], report["ensemble"]["test_accuracy"]) == (None, None)
    assert [each["student_test_accuracy"] for each in report["rounds"]] == [None]


def test_all_artefacts_are_there_without_a_test(finished):
    names = {path.name for path in finished.iterdir()}
    pictures = {"curves.png", "synthetic.png", "synthetic"}
    assert names == {"report.json", "report.html", "events.jsonl", "student.safetensors", *pictures}
    assert load_student(finished / "student.safetensors").spec.num_classes == 10
    printed = io.StringIO()
    print_summary(json.loads((finished / "report.json").read_text()), Console(file=printed, width=120))
    assert all(name in printed.getvalue() for name in HOSPITALS)


def test_owners_are_called_by_their_names_in_the_log(places, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "smi_fed"):
        run(tmp_path, owners(places))
    for name, count in (("St Mary's", 12), ("Hôpital Nord", 12), ("Charité", 20)):
        assert re.search(rf"{name}, round 1: training on {count} images: scratch", caplog.text)
        assert re.search(rf"{name}: training: 100%.* 3/3 .*loss \d", caplog.text)
        assert re.search(rf"{name}, round 1: trained vit_.* on {count} images, loss \d", caplog.text)
        assert re.search(rf"{name}, node \d+ admitted: .* {count} examples", caplog.text)


def test_an_owner_with_a_wrong_path_fails_alone_by_its_name(places, tmp_path, caplog):
    wrong = {**places, "St Mary's": places["Charité"] / "nowhere"}
    report = run(tmp_path, owners(wrong))
    assert {name for name, each in by_name(report).items() if each["admitted"]} == {"Hôpital Nord", "Charité"}
    (failed,) = [each for each in report["clients"] if not each["admitted"]]
    assert re.search(r"St Mary's: data: got '.*nowhere', allowed: a directory of class directories", failed["reason"])
    assert "node 100 refused" in caplog.text


def text_as_image(path):
    for number in range(2):
        (path / f"{number}.png").write_text("no image")


@pytest.mark.parametrize(
    ("make", "config", "reason"),
    [
        (lambda path: None, {}, "data: got '.*', allowed: a directory of class directories; there are none"),
        (lambda path: path.rmdir(), {}, "data: got '.*bad', allowed: a directory of class directories$"),
        (lambda path: None, {"source": "manifest"}, "data: got '.*bad', allowed: .*CSV"),
        (lambda path: (path / "3").mkdir(), {}, r"data: got '.*', allowed: images \(.*\) of each class; .* of \['3'\]"),
        (lambda path: write_digits(path, "3", 2), {}, None),
        (lambda path: text_as_image(write_digits(path, "3", 1) / "3"), {}, "3/0.png: not a readable image"),
        (lambda path: write_digits(path, "3", 2), {"dta": 1}, "node-config dta: got 1, allowed: .*data"),
        (lambda path: write_digits(path, "3", 2), {"test_fraction": 0.5}, "test_fraction: got 0.5, .*test-fraction"),
        (lambda path: write_digits(path, "3", 2), {"test-fraction": 1.5}, "test_fraction: got 1.5"),
        (lambda path: write_digits(path, "3", 2), {"data": ""}, "data: got '', .* since data.source is none"),
        (lambda path: write_digits(path, "3", 2), {"data": "pets"}, "data: got 'pets', allowed: an absolute path"),
        (lambda path: write_digits(path, "3", 2), {"source": "ftp"}, "source: got 'ftp', allowed: .*folder"),
        (lambda path: write_digits(path, "3", 2), {"split": "a"}, "split: got 'a', allowed: none, but for source hub"),
        (lambda path: write_digits(path, "3", 2), {"arch": "resnet"}, "arch: got 'resnet', allowed: vit_p4"),
        (lambda path: write_digits(path, "3", 2), {"name": 7}, "name: got 7, allowed: a text"),
        (lambda path: write_digits(path, "3", 2), {"name": "St [Mary]"}, "name: got 'St .Mary.', allowed: at most 64"),
        (lambda path: write_digits(path, "3", 2), {"num-partitions": 2, "partition-id": 2}, "partition-id: got 2"),
    ],
)
def test_bad_input_at_one_node_is_told_before_it_trains(tmp_path, monkeypatch, make, config, reason):
    bad = tmp_path / "bad"
    bad.mkdir()
    make(bad)
    trained = []
    monkeypatch.setattr("clients.app.train", lambda *args, **kwargs: trained.append(args) or 1.0)
    reply = ask({"data": str(bad), "arch": ARCH, "name": "bad", **config})
    assert (len(trained), reply.has_error()) == ((1, False) if reason is None else (0, True))
    name = clean_name(str(config.get("name", "bad")))
    assert re.search(f"^NodeError: {name}: .*{reason}" if reason else "^$", reply.error.reason if reason else "")


SOME = "+model.clients.some={name:vit_tiny_patch16_224,num_classes:2,class_names:['8','9'],kwargs:{in_chans:1}}"


@pytest.mark.parametrize(
    ("arch", "override", "reason"),
    [
        (ARCH, "client.device=cuda:99", "client.device: got 'cuda:99', allowed: a device that this machine has"),
        (ARCH, "start=/no.pt", "KEY.start: got '/no.pt', allowed: pretrained, or a file of weights on this machine"),
        (ARCH, "start=other.pt", r"KEY.start: got '.*other.pt', allowed: .*weight is \(72, 24\), expected \(288, 96\)"),
        (ARCH, "start=text.pt", "KEY.start: got '.*text.pt', allowed: a whole file of tensors"),
        ("some", SOME, r"data: got '.*3', allowed: images of the model's classes, \('8', '9'\)"),
    ],
)
def test_what_a_node_lacks_is_told_before_it_trains(places, tmp_path, monkeypatch, arch, override, reason):
    monkeypatch.setattr("clients.app.train", lambda *_, **__: pytest.fail("trained"))
    (tmp_path / "text.pt").write_text("no weights")
    torch.save(small_vit(in_chans=1).state_dict(), tmp_path / "other.pt")
    key, name, file = f"model.clients.{ARCH}", *override.rpartition("start=")[1:]
    override = f"{key}.start={tmp_path / file}" if name else override
    reply = ask({"data": str(places["St Mary's"]), "name": "St Mary's", "arch": arch}, [override])
    assert re.search(f"^NodeError: St Mary's: {reason.replace('KEY', key)}", reply.error.reason)


def ask(node_config, overrides=()):
    """What one node answers in the first round."""
    text = join_overrides([*NONE, *overrides])
    grid = InProcessGrid(client_app, {7: node_config}, {"overrides": text})
    student = build_seeded(load_settings(CONF, text).model.student, 0)
    content = RecordDict({"arrays": ArrayRecord(student.state_dict()), "config": ConfigRecord({"server-round": 1})})
    (reply,) = grid.send_and_receive([Message(content, dst_node_id=7, message_type=MessageType.TRAIN)])
    return reply


def test_a_class_that_the_federation_does_not_know_is_named(tmp_path, monkeypatch):
    trained = []
    monkeypatch.setattr("clients.app.train", lambda *_, **__: trained.append(1) or 1.0)
    strange = write_digits(tmp_path / "strange", "12", 2)
    (strange / "cat").mkdir()
    Image.new("L", (8, 8)).save(strange / "cat" / "tom.png")
    (strange / "notes").mkdir()
    reason = ask({"data": str(strange), "name": "strange"}).error.reason
    assert re.search(
        "strange: data: got '.*', allowed: the federation's classes, 0, 1, .*; it has images of cat", reason
    )
    assert "notes" not in reason
    assert not trained
    (strange / "cat" / "tom.png").unlink()
    reply = ask({"data": str(strange), "name": "strange"})
    assert reply.content["metrics"]["label-counts"] == [0, 2, 2, 0, 0, 0, 0, 0, 0, 0]


def test_two_owners_of_one_name_are_told_apart(places, tmp_path, caplog):
    nodes = {number: {**each, "name": "St Mary"} for number, each in owners(places).items()}
    report = run(tmp_path, nodes, ["strategy.rounds=2", "pool.images=8", "pool.warm=true"])
    first = next(each["node"] for each in report["clients"] if each["name"] == "St Mary")
    names = {node: "St Mary" if node == first else f"St Mary (node {node})" for node in ("100", "101", "102")}
    assert {each["node"]: each["name"] for each in report["clients"]} == names
    assert {each["node"]: each["num_examples"] for each in report["clients"]} == {"100": 12, "101": 12, "102": 20}
    assert all(set(each["admitted"]) == set(names.values()) for each in report["rounds"])
    assert len(list((tmp_path / "out" / "synthetic").iterdir())) == 6
    assert "two nodes have the name 'St Mary': node " in caplog.text


def test_an_owner_without_a_name_is_called_by_its_node(places, tmp_path):
    nodes = {**owners(places), 102: {"data": str(places["Charité"])}}
    assert set(by_name(run(tmp_path, nodes))) == {"St Mary's", "Hôpital Nord", "node 102"}


@pytest.mark.parametrize(("config", "count"), [({}, 8), ({"test-fraction": 0.0}, 12), ({"test-fraction": 0.67}, 4)])
def test_a_share_is_held_out_at_the_node(places, config, count):
    reply = ask({"data": str(places["St Mary's"]), **config}, ["data.test_fraction=0.34"])
    assert reply.content["metrics"]["num-examples"] == count


def test_nodes_may_share_a_source_of_their_own(places):
    counts = [
        ask({"data": str(places["Charité"]), "partition-id": number, "num-partitions": 2}, ["data.scheme=iid"])
        .content["metrics"]["num-examples"] for number in range(2)
    ]  # fmt: skip
    assert counts == [10, 10]
    whole = ask({"data": str(places["Charité"]), "partition-id": 3})
    assert (whole.content["metrics"]["num-examples"], whole.content["smi-fed.model"]["name"]) == (20, "client 3")
    digits_ = ask({"source": "digits", "partition-id": 0, "num-partitions": 3}, ["data.scheme=iid"])
    assert digits_.content["metrics"]["num-examples"] == 599


def simulated(count):
    return {100 + i: {"partition-id": i, "num-partitions": count} for i in range(count)}


def nodes_of(places):
    return "data.nodes=[" + ",".join(str(place) for place in places) + "]"


def test_a_simulation_maps_clients_to_directories(tmp_path):
    paths = [write_digits(tmp_path / name, classes, 2) for name, classes in (("mary", "01"), ("north", "234"))]
    report = run(tmp_path, simulated(2), [nodes_of(paths)])
    assert {name: each["num_examples"] for name, each in by_name(report).items()} == {"mary": 4, "north": 6}
    same = [write_digits(tmp_path / name / "images", "01", 2) for name in "ab"]
    assert set(by_name(run(tmp_path / "b", simulated(2), [nodes_of(same)]))) == {"client 0", "client 1"}


def test_a_server_with_a_test_of_its_own_and_clients_with_directories(tmp_path):
    paths = [write_digits(tmp_path / name, "0123456789", 2) for name in ("mary", "north")]
    report = run(tmp_path, simulated(2), [nodes_of(paths), "data.source=digits", "data.test_fraction=0.2"])
    assert all(0 <= each["test_accuracy"] <= 1 for each in report["clients"])
    assert {each["num_examples"] for each in report["clients"]} == {20}


def test_data_nodes_of_wrong_number(tmp_path):
    paths = [write_digits(tmp_path / str(number), "01", 2) for number in range(2)]
    with pytest.raises(TooFewTeachersError, match=r"data.nodes: got \[.*\], allowed: one place for each of 3 clients"):
        run(tmp_path, simulated(3), [nodes_of(paths)])
    with pytest.raises(SettingError, match=r"data.nodes: got \[.*\], allowed: a place for each of 3 clients"):
        run(tmp_path, simulated(3), [nodes_of(paths), "strategy.min_nodes=3"])


def unnamed(tmp_path, nodes):
    model = {
        "name": "vit_tiny_patch16_224", "num_classes": 2, "image_size": 32,
        "kwargs": {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 1, "num_heads": 3, "in_chans": 1},
    }  # fmt: skip
    text = json.dumps(model).replace('"', "").replace(": ", ":")
    clear = [f"~model.{key}" for key in ("student", "clients")]
    return run(tmp_path, nodes, [*clear, f"+model.student={text}", f"+model.clients={{only:{text}}}"])


def test_classes_without_names_are_those_that_all_owners_have(tmp_path):
    same = {number: {"data": str(write_digits(tmp_path / str(number), "35", 2))} for number in range(1, 4)}
    many = {"data": str(write_digits(tmp_path / "many", "356", 2)), "name": "many"}
    report = unnamed(tmp_path, {**same, 8: many})
    assert sum(each["admitted"] for each in report["clients"]) == 3
    (line,) = [each for each in report["clients"] if each["node"] == "8"]
    assert re.search("data: got '3 classes, 3, 5, 6', allowed: 2 classes", line["reason"])


def test_classes_without_names_that_owners_mean_differently(tmp_path):
    nodes = {number: {"data": str(write_digits(tmp_path / classes, classes, 2)), "name": classes}
             for number, classes in enumerate(("35", "36"))}  # fmt: skip
    with pytest.raises(
        TooFewTeachersError, match="its classes are 3, [56], another node's 3, [65]; the student's class"
    ):
        unnamed(tmp_path, nodes)


def test_a_strategy_by_itself_without_a_test(places, tmp_path):
    overrides = ["model=digits_homogeneous", "strategy.distillation=false", "strategy.rounds=2"]
    nodes = {number: {k: v for k, v in each.items() if k != "arch"} for number, each in owners(places).items()}
    report = run(tmp_path, nodes, overrides)
    assert [each["student_test_accuracy"] for each in report["rounds"]] == [None, None]
    assert report["student"]["test_accuracy"] is None
