"""The whole app, server and clients, through an in-process grid."""

import json
import logging
from pathlib import Path
from shutil import copytree

import pytest
import torch
from flwr.app import Context, RecordDict

from clients.app import app as client_app
from server.app import output_directory
from server.checks import check_models
from server.run import FederatedRun
from simulations.local_grid import InProcessGrid
from smi_fed.checks import SettingError
from smi_fed.config import load_settings
from smi_fed.data import digits
from smi_fed.files import FileFormatError
from smi_fed.report import load_student, read_report
from smi_fed.sparse_images import SparseImages
from smi_fed.strategies import TooFewTeachersError
from smi_fed.training import accuracy

CONF = Path(__file__).resolve().parents[2] / "conf"
SMOKE = "experiment=smoke"


def nodes(count=4, **extra):
    return {1000 + i: {"partition-id": i, "num-partitions": count, **extra} for i in range(count)}


def run(tmp_path, overrides=SMOKE, grid_nodes=None, **grid):
    federated = FederatedRun(load_settings(CONF, overrides), tmp_path / "out")
    return federated.execute(InProcessGrid(client_app, grid_nodes or nodes(), {"overrides": overrides}, **grid))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    output = tmp_path_factory.mktemp("run")
    run(output)
    return output / "out"


def test_artefacts_are_all_there(finished):
    names = {path.name for path in finished.iterdir()}
    assert names == {
        "report.json", "report.html", "events.jsonl", "student.safetensors", "curves.png", "synthetic.png", "synthetic",
    }  # fmt: skip
    assert len(list((finished / "synthetic").iterdir())) == 4


def test_the_report_has_what_it_promises(finished):
    report = json.loads((finished / "report.json").read_text())
    assert report["status"] == "completed"
    assert report["schema"] == 1
    assert set(report["seconds"]) == {"train", "inversion", "distillation", "total"}
    assert report["seconds"]["total"] >= sum(report["seconds"][k] for k in ("inversion", "distillation"))
    assert [client["name"] for client in report["clients"]] == [f"client {i}" for i in range(4)]
    assert len({client["architecture"] for client in report["clients"]}) == 4
    assert sum(client["num_examples"] for client in report["clients"]) == len(digits()[0])
    assert all(client["admitted"] and client["reason"] == "" for client in report["clients"])
    assert {"flwr", "torch", "timm"} <= set(report["versions"])
    assert report["inversion"]["images"] == 16
    assert report["inversion"]["kept_fraction"] <= 0.5
    assert 0 < report["inversion"]["flops"] < report["inversion"]["dense_flops"]
    assert report["distillation"]["steps"] == 3
    assert [each["round"] for each in report["rounds"]] == [1]
    assert report["rounds"][0]["student_test_accuracy"] == report["student"]["test_accuracy"]


def test_the_stored_student_is_the_one_that_was_measured(finished):
    report = json.loads((finished / "report.json").read_text())
    student = load_student(finished / "student.safetensors")
    assert accuracy(student, digits()[1]) == pytest.approx(report["student"]["test_accuracy"])
    assert sum(p.numel() for p in student.parameters()) == report["student"]["parameters"]


def test_stored_images_are_what_the_report_says(finished):
    report = json.loads((finished / "report.json").read_text())
    stored = [SparseImages.load(path) for path in sorted((finished / "synthetic").iterdir())]
    assert sum(map(len, stored)) == report["inversion"]["images"]
    kept = sum(images.kept_fraction * len(images) for images in stored) / sum(map(len, stored))
    assert kept == pytest.approx(report["inversion"]["kept_fraction"], abs=1e-6)


@pytest.mark.usefixtures("uncounted")
def test_an_architecture_from_the_node_config(tmp_path):
    report = run(tmp_path, grid_nodes=nodes(2, arch="vit_p8_w96_d3"))
    assert {client["architecture"] for client in report["clients"]} == {
        "vit_tiny_patch16_224 (patch 8, width 96, depth 3, heads 4)"
    }


def test_an_unknown_architecture_in_the_node_config_is_that_nodes_failure(tmp_path):
    with pytest.raises(TooFewTeachersError, match=r"arch: got 'resnet', allowed: vit_p4"):
        run(tmp_path, grid_nodes=nodes(2, arch="resnet"))


@pytest.mark.usefixtures("uncounted")
def test_empty_and_one_class_partitions(tmp_path, caplog):
    """With a tiny alpha some own one class, one image or nothing; the others go on."""
    overrides = f"{SMOKE} data.alpha=0.001 seed=8 inversion.statistics=0"
    with caplog.at_level(logging.WARNING, "smi_fed"):
        report = run(tmp_path, overrides, grid_nodes=nodes(6))
    refused = [client for client in report["clients"] if not client["admitted"]]
    assert refused
    assert all("is empty" in client["reason"] for client in refused)
    assert "is empty" in caplog.text
    assert len(report["clients"]) == 6
    assert min(client["num_examples"] for client in report["clients"] if client["admitted"]) == 1


@pytest.mark.usefixtures("uncounted")
def test_one_class_per_client(tmp_path):
    overrides = f"{SMOKE} data.scheme=pathological data.classes_per_partition=1"
    report = run(tmp_path, overrides, grid_nodes=nodes(3))
    assert all(client["admitted"] for client in report["clients"])


@pytest.mark.usefixtures("uncounted")
def test_a_client_with_few_examples_sends_no_statistics_and_is_inverted_without(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "smi_fed"):
        report = run(tmp_path, f"{SMOKE} client.minimum_examples=350")
    few = [client["name"] for client in report["clients"] if client["num_examples"] < 350]
    assert 0 < len(few) < 4
    assert all(client["admitted"] for client in report["clients"])
    assert [line for line in caplog.messages if "sent no feature statistics" in line] == [
        f"{name} sent no feature statistics: inverted without that prior" for name in few
    ]


@pytest.mark.usefixtures("uncounted")
def test_without_label_counts(tmp_path):
    overrides = f"{SMOKE} client.send_label_counts=false distillation.ensemble=examples"
    assert run(tmp_path, overrides)["ensemble"]["weights"] == "examples"
    with pytest.raises(SettingError, match="client.send_label_counts: got False"):
        load_settings(CONF, f"{SMOKE} client.send_label_counts=false")


def test_a_failed_run_leaves_a_reason_and_no_student(finished, tmp_path):
    copytree(finished, tmp_path / "out")
    with pytest.raises(TooFewTeachersError):
        run(tmp_path, lost=set(nodes()))
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["status"] == "failed"
    assert "node unavailable" in report["reason"]
    assert not (tmp_path / "out" / "student.safetensors").exists()


def test_ctrl_c_during_inversion_leaves_a_reason_and_no_student(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("smi_fed.inversion.loop.stop_patches", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    assert json.loads((tmp_path / "out" / "report.json").read_text())["status"] == "failed"
    assert not (tmp_path / "out" / "student.safetensors").exists()


def no_client(*_):
    pytest.fail("a client was asked")


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("inversion.iteratons=3", "inversion.iteratons: got '3', allowed: .*inversion.iterations"),
        ("inversion.schedule='1:1.0'", "inversion.schedule: got .* inside"),
        ("inversion=fastest", "inversion: got 'fastest', allowed: attention | dense"),
        ("server.device=cuda:99", "^server.device: got 'cuda:99', allowed: a device that this machine has"),
        (
            "data.source=folder data.name=/nowhere",
            "data.name: got '/nowhere', allowed: a directory of class directories",
        ),
        ("data.source=folder data.name={empty}", "data.name: got '.*empty', allowed: .*; there are none"),
        ("data.source=folder data.name={text}", "test/0/0.png: not a readable image .*replace it"),
        (
            "model.student.start={text}/test/0/0.png",
            "^model.student.start: got '.*0.png', allowed: a whole file of tensors",
        ),
        (
            "model=digits_homogeneous strategy.distillation=false model.student.start={text}/test/0/0.png",
            "^model.student.start: got '.*0.png', allowed: a whole file of tensors",
        ),
        ("model.student.name=vit_made_up", "model.student.name: got 'vit_made_up', allowed: a timm model name"),
        ("model.student.kwargs.patch_size=5", "model.student.patch_size: got 5, allowed: an int that divides"),
        ("model.clients.vit_p8_w96_d3.kwargs.embed_dim=7", "model.clients.vit_p8_w96_d3.kwargs: got"),
        ("model.student.num_classes=11", "model.student.class_names: got"),
        ("data.image_size=64", "model.student.image_size: got"),
        ("data.channels=3", "in_chans: got 1, allowed: data.channels, 3"),
        ("admission.architectures=[resnet18]", r"model.clients.vit_p4_w64_d2: got 'vit_tiny.* lets in \(.*allow-list"),
        (
            "admission.architectures=[vit_made_up]",
            "admission.architectures.0: got 'vit_made_up', allowed: a timm",
        ),
        (
            "admission.max_parameters=120000",
            "model.clients.vit_p8_w96_d3: got .* has 3[0-9]{5} parameters, allowed",
        ),
        ("+model.clients.vit_p8_w64_d4.kwargs.drop_rate=0.1", "model.clients.vit_p8_w64_d4: got .* 'drop_rate' is not"),
        ("model.clients.vit_p4_w48_d3.mean=[11]", "model.clients.vit_p4_w48_d3: got .*normalisation is"),
    ],
)
def test_mistakes_are_refused_before_any_client_is_asked(tmp_path, override, says):
    bad = {name: tmp_path / name for name in ("empty", "text")}
    bad["empty"].mkdir()
    for number in range(20):
        path = bad["text"] / ("train", "test")[number % 2] / str(number // 2) / "0.png"
        path.parent.mkdir(parents=True)
        path.write_text("no image")
    override = override.format(**bad) if "data.name" in override or "start=" in override else override
    with pytest.raises((SettingError, FileNotFoundError, FileFormatError), match=says):
        FederatedRun(load_settings(CONF, override), tmp_path / "out").execute(InProcessGrid(no_client, nodes()))


def test_an_unwritable_output_is_found_before_training(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(OSError, match="cannot write to the directory"):
        FederatedRun(load_settings(CONF, SMOKE), blocked / "out")


def test_a_relative_output_is_refused():
    context = Context(1, 1, {}, RecordDict(), {"output": "runs/x"})
    with pytest.raises(SettingError, match="output: got 'runs/x', allowed: an absolute path"):
        output_directory(context)
    assert output_directory(Context(7, 1, {}, RecordDict(), {})).parts[-2:] == ("smi-fed-runs", "7")


def test_a_report_of_another_version_is_refused_naming_both(finished, tmp_path):
    report = read_report(finished / "report.json")
    (tmp_path / "report.json").write_text(json.dumps({**report, "schema": 9}))
    with pytest.raises(FileFormatError, match="report version is 9, this smi-fed reads 1"):
        read_report(tmp_path / "report.json")
    (tmp_path / "report.json").write_text("{")
    with pytest.raises(FileFormatError, match="truncated or not what it should be"):
        read_report(tmp_path / "report.json")


def test_device_and_reason_are_logged(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "smi_fed"):
        FederatedRun(load_settings(CONF, SMOKE), tmp_path / "out")
    expected = "device: cuda" if torch.cuda.is_available() else "device: cpu (no CUDA device is available)"
    assert expected in caplog.text


def test_every_architecture_of_the_demo_is_admissible_and_different():
    settings = load_settings(CONF)
    check_models(settings)
    shapes = {
        (s.kwargs["patch_size"], s.kwargs["embed_dim"], s.kwargs["depth"])
        for s in [*settings.model.clients.values(), settings.model.student]
    }
    assert len(shapes) == len(settings.model.clients) + 1
    assert min(len({shape[i] for shape in shapes}) for i in range(3)) >= 2


@pytest.mark.parametrize("strategy", ["FedProx strategy.arguments={proximal_mu:0.1}", "FedMedian"])
def test_a_strategy_by_itself_over_one_architecture(tmp_path, strategy):
    overrides = (
        f"{SMOKE} model=digits_homogeneous strategy.distillation=false strategy.rounds=2 strategy.name={strategy}"
    )
    report = run(tmp_path, overrides)
    assert report["strategy"] == strategy.split()[0]
    assert [each["round"] for each in report["rounds"]] == [1, 2]
    assert report["ensemble"] is None
    assert load_student(tmp_path / "out" / "student.safetensors").spec.num_classes == 10
    assert not (tmp_path / "out" / "unfinished").exists()


def test_other_architectures_are_refused_where_nothing_is_distilled():
    with pytest.raises(SettingError, match=r"model\.clients\..*strategy\.distillation is false"):
        check_models(load_settings(CONF, f"{SMOKE} strategy.distillation=false"))


def test_two_rounds_of_different_models(tmp_path):
    report = run(tmp_path, f"{SMOKE} strategy.rounds=2 pool.images=8 pool.warm=true strategy.name=FedAdam")
    assert [each["round"] for each in report["rounds"]] == [1, 2]
    assert report["pool"] == {"reused": 8}
    assert report["status"] == "completed"
    check_scopes(report, images=16)


def check_scopes(report, images):
    """What stands at the top is of all rounds; each round has its own beside it."""
    rounds = report["rounds"]
    assert [each["inversion"]["images"] for each in rounds] == [images] * len(rounds)
    for key in ("images", "seconds", "flops", "dense_flops"):
        assert report["inversion"][key] == pytest.approx(sum(each["inversion"][key] for each in rounds))
    for key in ("steps", "seconds"):
        assert report["distillation"][key] == pytest.approx(sum(each["distillation"][key] for each in rounds))
    assert report["seconds"]["inversion"] == report["inversion"]["seconds"]
    for each in rounds:
        assert each["inversion"]["seconds"] + each["distillation"]["seconds"] <= each["server_seconds"]
        assert len(each["admitted"]) + len(each["refused"]) == len(report["clients"])
    assert sum(each["server_seconds"] for each in rounds) + report["seconds"]["train"] <= report["seconds"]["total"]


def test_more_clients_than_images_are_refused_before_any_is_asked(tmp_path):
    with pytest.raises(SettingError, match=r"strategy\.min_nodes: got 9999, allowed: at most 1347, the images"):
        FederatedRun(load_settings(CONF, f"{SMOKE} strategy.min_nodes=9999"), tmp_path)


def test_data_of_another_run_are_not_gone_on_with(tmp_path):
    FederatedRun(load_settings(CONF, SMOKE), tmp_path)
    for override, differs in {"data.alpha=0.3": "data.alpha", "client.training.steps=4": "client.training"}.items():
        with pytest.raises(FileFormatError, match=f"which differs in {differs}"):
            FederatedRun(load_settings(CONF, f"{SMOKE} {override}"), tmp_path)
    FederatedRun(load_settings(CONF, f"{SMOKE} strategy.rounds=3 server.threads=2"), tmp_path)
