"""Real `flwr run`, real processes, real Ray. Minutes of work: `make test-slow`."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from simulations.deployment import OWNERS
from simulations.superlink import PROJECT, superlink
from simulations.supernode import supernode
from smi_fed.report import load_student

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def leftovers(marker):
    """Processes whose environment still names `marker`."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                if marker.encode() in (entry / "environ").read_bytes():
                    found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode())
            except OSError:
                continue
    return found


def started(module, tmp_path, *overrides):
    """A command of ours, and the mark by which its processes are known."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    command = [sys.executable, "-m", module, "--output", str(tmp_path / "out"), *overrides]
    env = {**os.environ, "TMPDIR": str(scratch), "RAY_TMPDIR": "/tmp"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, cwd=PROJECT, env=env, **pipes)
    return process, str(scratch)


def wait_until_gone(marker, patience=30):
    deadline = time.monotonic() + patience
    while leftovers(marker) and time.monotonic() < deadline:
        time.sleep(0.5)
    return leftovers(marker)


def test_the_demo_end_to_end(tmp_path):
    process, marker = started("simulations.demo", tmp_path, "experiment=smoke")
    printed, _ = process.communicate()
    assert process.returncode == 0, printed[-3000:]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["status"] == "completed"
    assert len({client["architecture"] for client in report["clients"]}) >= 3
    assert load_student(tmp_path / "out" / "student.safetensors").spec.num_classes == 10
    for stage in ("waiting for train replies", "inversion of client 3", "distillation"):
        assert f"{stage}: 100%" in printed
    assert "client 3" in printed
    assert "ensemble" in printed
    assert not wait_until_gone(marker)


def test_a_failed_run_exits_with_1_and_says_why(tmp_path):
    process, marker = started("simulations.demo", tmp_path, "experiment=smoke", "server.min_teachers=5")
    printed, _ = process.communicate()
    assert process.returncode == 1
    assert "4 teachers admitted, 5 needed" in printed.splitlines()[-1]
    assert not (tmp_path / "out" / "student.safetensors").exists()
    assert not wait_until_gone(marker)


def test_a_mistake_is_told_in_one_line_at_once(tmp_path):
    process, _ = started("simulations.demo", tmp_path, "inversion.iteratons=3")
    printed, _ = process.communicate()
    assert process.returncode == 2
    assert printed.strip().splitlines()[-1].startswith("smi-fed: inversion.iteratons: got '3', allowed:")
    assert "Traceback" not in printed


@pytest.mark.parametrize("module", ["simulations.demo", "simulations.deployment"])
def test_ctrl_c_leaves_nothing_behind(tmp_path, module):
    process, marker = started(module, tmp_path, "client.training.steps=100000")
    for line in process.stdout:
        if "waiting for train replies" in line:
            break
    process.send_signal(signal.SIGINT)
    try:
        printed, _ = process.communicate(timeout=120)
    finally:
        process.terminate()
    assert process.returncode == 130, printed[-3000:]
    assert "interrupted" in printed
    assert "Traceback" not in printed.split("interrupted")[-1]
    assert not wait_until_gone(marker)


def test_a_deployment_over_tls_with_keys(tmp_path):
    """Three owners with directories and architectures of their own, strangers, and a server without data."""
    process, marker = started("simulations.deployment", tmp_path)
    printed, _ = process.communicate()
    assert process.returncode == 0, printed[-3000:]
    for stranger, reason in (("unregistered", "Failed to activate SuperNode"), ("without-tls", "Server disconnected")):
        assert re.search(rf"refused, as it has to be: SuperNode '{stranger}' \(.*{reason}", printed)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["status"] == "completed"
    assert {each["name"]: (each["num_examples"], each["admitted"]) for each in report["clients"]} == {
        "St Mary": (480, True), "Hôpital Nord": (437, True), "Charité": (480, True),
    }  # fmt: skip
    assert len({each["architecture"] for each in report["clients"]}) == 3
    assert (report["student"]["test_accuracy"], report["evaluation"]["mean"]["images"]) == (None, 348)
    assert report["evaluation"]["mean"]["student_accuracy"] > 0.5
    assert load_student(tmp_path / "out" / "student.safetensors").spec.num_classes == 10
    for number, owner in enumerate(OWNERS):
        log = (tmp_path / "out" / "logs" / f"supernode{number}.log").read_text()
        assert f"{owner.name}, round 1: training on " in log
        assert f"{owner.name}: training: 100%" in log
        assert f"{owner.name}, round 1: trained vit_tiny_patch16_224 on " in log
        assert log.count("round 1: trained") == log.count(f"{owner.name}, round 1: right on ") == 1
    assert not wait_until_gone(marker)


def test_separate_processes_on_loopback(tmp_path):
    """A SuperLink, three SuperNodes, one of which names a directory that is not there and fails alone."""
    output = tmp_path / "out"
    architectures = ["vit_p8_w96_d3", "vit_p4_w48_d3"]
    configs = [{"partition-id": i, "num-partitions": 2, "arch": arch} for i, arch in enumerate(architectures)]
    configs.append({"data": str(tmp_path / "gone"), "name": "Typo"})
    with superlink(simulation=False, insecure=True) as link:
        nodes = [supernode(link, f"supernode{number}", config) for number, config in enumerate(configs)]
        status = link.run("experiment=smoke strategy.min_nodes=3", output)
        assert status == "finished:completed", [node.said() for node in nodes]
    assert [node.process.poll() is None for node in nodes] == [False] * 3
    report = json.loads((output / "report.json").read_text())
    clients = {each["name"]: each for each in report["clients"]}
    assert [clients[f"client {number}"]["architecture"].split("(")[1] for number in range(2)] == [
        "patch 8, width 96, depth 3, heads 4)", "patch 4, width 48, depth 3, heads 3)",
    ]  # fmt: skip
    (typo,) = [each for each in report["clients"] if not each["admitted"]]
    assert re.search("Typo: data: got '.*gone', allowed: a directory of class directories", typo["reason"])
    assert load_student(output / "student.safetensors")
