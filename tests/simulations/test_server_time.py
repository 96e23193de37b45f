"""Ratios of the server's seconds, and the script that does its work in any tree."""

import json
import subprocess
import sys

import pytest
from safetensors.torch import save_file

from simulations.server_time import CHECKOUT, EARLIER, table
from simulations.superlink import PROJECT
from smi_fed.config import load_settings
from smi_fed.models import build_model


def line(tree, seed, inversion, distillation, accuracy):
    return {
        "tree": tree, "seed": seed, "bfloat16_units": False, "inversion_seconds": inversion,
        "distillation_seconds": distillation, "accuracy": accuracy,
    }  # fmt: skip


def test_the_ratio_is_of_the_medians_of_both_stages_together():
    lines = [line(EARLIER, 0, 30, 250, 0.96), line(EARLIER, 1, 40, 260, 0.85), line(CHECKOUT, 0, 20, 50, 0.97)]
    (found,) = table(lines)
    assert found.rows[1:] == [
        [EARLIER, "0", "30.0", "250.0", "280.0", "96.0"],
        [CHECKOUT, "0", "20.0", "50.0", "70.0", "97.0"],
        [EARLIER, "1", "40.0", "260.0", "300.0", "85.0"],
    ]
    assert found.notes == ["this checkout takes 0.24 of the seconds"]


def test_the_script_says_what_is_missing(tmp_path):
    script = PROJECT / "simulations" / "server_work.py"
    done = subprocess.run(
        [sys.executable, str(script), str(PROJECT), str(tmp_path), "inversion.iteratons=3"], capture_output=True,
        text=True, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "inversion.iteratons" in done.stderr


@pytest.mark.slow
def test_the_script_works_in_this_tree(tmp_path):
    settings = load_settings(PROJECT / "conf", "experiment=smoke")
    for number in range(2):
        save_file(build_model(settings.model.of_client(number)).state_dict(), tmp_path / f"client-{number}.safetensors")
    words = [str(PROJECT / "simulations" / "server_work.py"), str(PROJECT), str(tmp_path), "experiment=smoke"]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=tmp_path, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert 0 <= found["accuracy"] <= 1
    assert min(found["inversion_seconds"], found["distillation_seconds"]) > 0
