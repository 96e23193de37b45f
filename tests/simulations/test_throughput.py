import json
import statistics

import pytest
import torch

from simulations import throughput
from simulations.throughput import ThroughputConfig, main, stages
from simulations.throughput.one_device import FederationConfig, federation, smooth_images
from simulations.throughput.stages import summary
from simulations.throughput.table import tables
from smi_fed.checks import SettingError
from smi_fed.inversion import InversionConfig
from smi_fed.inversion.flops import StageFlops

SMALL = ["batch=1", "repeats=1", "warmup=0", "run=8", "federation.images=0", "model=vit_tiny_patch16_224"]


def test_everything_once(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(throughput, "matmul_rate", lambda *_: 1e11)
    out = tmp_path / "t.json"
    assert main([*SMALL, "sweep=[1,2]", f"out={out}"]) == 0
    found = json.loads(out.read_text())
    assert [stage["kept"] for stage in found["stages"]] == [196, 137, 95, 66, 46]
    assert found["flops_below_dense"] >= 0.7409
    assert found["ratios"]["sparse over dense"] == pytest.approx(
        found["trajectory_seconds"]["dense"] / found["trajectory_seconds"]["sparse"]
    )
    assert found["stages"][0]["ms"] == pytest.approx(1000 * statistics.median(found["samples"]["stage 0"]))
    assert found["run"]["schedule"] == "1:0.3,2:0.3,3:0.3,4:0.3"
    assert found["agreement"]["same_patches"] == 1.0
    assert found["agreement"]["agrees"]
    assert found["agreement"]["mean_difference"] < 1e-3
    assert [row["batch"] for row in found["sweep"]] == [1, 2]
    peaks = found["peak_bytes"]
    assert peaks["last stage"] < peaks["dense"] < peaks["naive"]
    assert found["environment"]["device"] == "cpu"
    assert "sparse over naive" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("batch=0", "batch: got 0"),
        ("dtype=float16", "dtype: got 'float16'"),
        ("device=cuda:99", "device: got 'cuda:99'"),
        ("schedule=''", "schedule: got ''"),
        ("schedule='9000:0.3'", "stops before the last"),
        ("federation.images=-1", "federation.images: got -1"),
        ("colour=red", "colour"),
    ],
)
def test_a_setting_that_cannot_be(override, says, capsys):
    assert main([override]) == 2
    assert says in capsys.readouterr().err


def test_a_result_that_cannot_be_written_is_refused_before_it_is_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(throughput, "matmul_rate", lambda *_: pytest.fail("measured"))
    (tmp_path / "file").write_text("")
    assert main([f"out={tmp_path}/file/t.json"]) == 2
    assert "cannot write" in capsys.readouterr().err


def test_a_model_that_timm_does_not_know(capsys):
    assert main(["model=vit_huuuge"]) == 2
    assert "vit_huuuge" in capsys.readouterr().err


def test_a_whole_trajectory_is_the_sum_of_its_stages():
    config = ThroughputConfig(batch=2, iterations=10, schedule="4:0.5")
    counted = [StageFlops(0, 4, 4, 100, 0), StageFlops(4, 10, 2, 40, 7)]
    medians = {"naive": 3.0, "stage 0": 2.0, "stage 1": 0.5, "stop 1": 0.25}
    memory = {"naive": 300, "stage 0": 200, "stage 1": 50}
    found = summary(config, counted, medians, memory, rate=50.0)
    assert found["trajectory_seconds"] == {"naive": 30.0, "dense": 20.0, "sparse": 4 * 2.0 + 0.25 + 6 * 0.5}
    assert found["images_per_second"]["dense"] == 0.1
    assert found["flops_per_image"] == {"dense": 1000, "sparse": 4 * 100 + 7 + 6 * 40}
    assert found["bound_images_per_second"]["dense"] == 0.05
    assert found["last_stage_over_dense_memory"] == 0.25
    assert found["stages"][1]["bound_ms"] == pytest.approx(1000 * 2 * 40 / 50)
    assert found["ratios"]["dense over naive"] == 1.5
    assert found["ratios"]["sparse over naive"] == pytest.approx(30 / 11.25)


def test_out_of_memory_leaves_a_batch_out_of_the_sweep(monkeypatch, caplog):
    def refuses(config, model, targets):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(stages, "stages_of", refuses)
    model = throughput.random_model("vit_tiny_patch16_224", torch.device("cpu"), 5)
    assert throughput.sweep(ThroughputConfig(sweep=(3,)), model, 1.0) == []
    assert "batch 3 does not fit" in caplog.text


@pytest.fixture
def small_models(monkeypatch):
    from simulations.throughput import one_device

    monkeypatch.setattr(one_device, "ARCHITECTURES", ("vit_tiny_patch16_224",) * 2)
    monkeypatch.setattr(one_device, "STUDENT", "vit_tiny_patch16_224")
    monkeypatch.setattr(one_device, "TEST_IMAGES", 2)


@pytest.mark.usefixtures("small_models")
def test_a_federation_on_one_device():
    inversion = InversionConfig.paper(batch_size=2)
    found = federation(FederationConfig(images=2, iterations=8, steps=2), inversion, torch.device("cpu"), 0)
    assert found["images"] == 4
    assert found["schedule"] == "1:0.3,2:0.3,3:0.3,4:0.3"
    assert len(found["inversion_seconds"]) == 2
    assert found["total_seconds"] > found["distillation_seconds"] > 0
    assert all(0 <= share <= 1 for share in found["student_agrees_with_ensemble"].values())


def test_generated_images_are_images():
    images = smooth_images(2, 32, torch.Generator().manual_seed(0))
    assert images.shape == (2, 3, 32, 32)
    assert 0 <= float(images.min()) < float(images.max()) <= 1


def test_tables_show_what_was_measured():
    config = ThroughputConfig(batch=2, iterations=10, schedule="4:0.5")
    counted = [StageFlops(0, 4, 4, 100, 0), StageFlops(4, 10, 2, 40, 7)]
    medians = {"naive": 3.0, "stage 0": 2.0, "stage 1": 0.5, "stop 1": 0.25}
    result = summary(config, counted, medians, {"naive": 3e6, "stage 0": 2e6, "stage 1": 5e5}, 50.0) | {
        "config": {"model": "m", "batch": 2, "dtype": "float32", "compile": False, "iterations": 10},
        "environment": {"device_name": "a CPU", "threads": 2, "versions": {"torch": "2.0"}},
        "matmul_rate": {"float32": 5e10},
        "agreement": {"iterations": 3, "mean_difference": 0.5 / 255, "same_patches": 1.0,
                      "confidence": {"fast": 0.5, "plain": 0.25}},
    }  # fmt: skip
    stages, whole = tables([result])
    assert stages.title.startswith("m, 2 images at once, float32; a CPU, 2 threads, torch 2.0; matmul 50 GFLOP/s in")
    assert [row[:3] for row in stages.rows[1:]] == [
        ["0 to 4", "4", "2000.0"], ["4 to 10", "2", "500.0"], ["naive", "all", "3000.0"],
    ]  # fmt: skip
    assert whole.rows[1:] == [
        ["naive", "0.06667", "", "", "3"], ["dense", "0.1", "0.05", "0", "2"],
        ["sparse", "0.1778", "0.07728", "0", "2 to 0"],
    ]  # fmt: skip
    assert {"sparse over dense: 1.78", "peak memory of the last stage over dense: 25.0%"} <= set(whole.notes)
    assert "0.50 of 255 grey levels" in whole.notes[-1]


def test_the_yaml_has_the_defaults_of_the_class():
    assert throughput.settings([]) == ThroughputConfig()
    with pytest.raises(SettingError, match="steps"):
        FederationConfig(steps=0)
