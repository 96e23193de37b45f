"""The benchmark of what grows with clients."""

import json

import pytest

from simulations import scale
from smi_fed.checks import SettingError

LINE = {
    "clients": 4, "model_megabytes": 21.0, "before_megabytes": 900.0, "peak_megabytes": 1000.0, "seconds": 10.0,
    "server_seconds_per_client": 2.0, "inversion_seconds_per_client": 0.5, "distillation_seconds_per_client": 1.0,
}  # fmt: skip


def test_ratios_table_and_picture(tmp_path):
    lines = [LINE, {**LINE, "clients": 64, "peak_megabytes": 1400.0, "server_seconds_per_client": 1.0}]
    assert scale.ratios(lines) == {"peak_ratio": 1.4, "server_seconds_per_client_ratio": 0.5}
    (table,) = scale.table(lines)
    assert table.rows[1:] == [
        ["4", "1000", "900", "2.00", "0.50", "1.00"],
        ["64", "1400", "900", "1.00", "0.50", "1.00"],
    ]
    assert table.notes == ["64 over 4 clients: 1.40 times the peak memory, 0.50 times the server's seconds per client."]
    cluster = lines[1] | {"ray_nodes": 2, "peak_megabytes": 1500.0, "student": "b"}
    (table,) = scale.table([lines[0], lines[1] | {"student": "a"}, cluster])
    assert table.rows[3] == ["64, 2 Ray nodes", "1500", "900", "1.00", "0.50", "1.00"]
    assert [note.split(", the")[-1] for note in table.notes[1:]] == [" student of 64 clients is another one."]
    assert table.notes[0].startswith("64 over 4 clients: 1.40 times")
    scale.figure(lines).savefig(tmp_path / "scale.png")
    assert (tmp_path / "scale.png").read_bytes().startswith(b"\x89PNG")


def test_the_largest_memory_since_the_last_mark_is_seen():
    with scale.watching() as peaks:
        held = bytearray(b"x" * 300_000_000)
        scale.time.sleep(0.2)
        peaks.append(0)
        del held
        scale.time.sleep(0.2)
    assert peaks[0] - peaks[1] > 250_000_000


@pytest.mark.parametrize("words", [["--clients", "1"], ["--rounds", "0"], ["distillation.steps=-1"]])
def test_what_cannot_be_measured_is_refused(tmp_path, capsys, words):
    assert scale.main(["--output", str(tmp_path), *words]) == 2
    assert "smi-fed: " in capsys.readouterr().err


def test_settings_are_those_of_models_of_20_megabytes():
    settings = scale.STUDY.compose(scale.SETTINGS)
    assert settings.model.of_client(0, scale.ARCH) == settings.model.student
    with pytest.raises(SettingError):
        settings.model.of_client(0, "another")


@pytest.mark.slow
def test_a_real_round_of_few_and_of_more_clients(tmp_path):
    status = scale.main([
        "--clients", "3", "2", "--ray-nodes", "2", "--output", str(tmp_path),
        "server.images_per_teacher=4", "inversion.batch_size=4", "distillation.steps=2",
    ])  # fmt: skip
    found = json.loads((tmp_path / "scale.json").read_text())
    assert status == int(found["peak_ratio"] > scale.LARGEST_RATIO) == 0
    assert [(run["clients"], run["ray_nodes"]) for run in found["runs"]] == [(2, 0), (3, 0), (3, 2)]
    assert [run["teachers"] for run in found["runs"]] == [[2], [3], [3]]
    assert found["runs"][1]["student"] == found["runs"][2]["student"] != found["runs"][0]["student"]
    for run in found["runs"]:
        assert 20 < run["model_megabytes"] < 23
        assert run["before_megabytes"] < run["peak_megabytes"] <= 1.01 * run["largest_resident_megabytes"]
        assert 0 < run["inversion_seconds_per_client"] < run["server_seconds_per_client"]
