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

from simulations.superlink import PROJECT, stop_family, superlink, supernode
from smi_fed.report import load_student
from tests.e2e.test_owners import HOSPITALS, write_digits

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


def demo(tmp_path, *overrides):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    command = [sys.executable, "-m", "simulations.demo", "--output", str(tmp_path / "out"), *overrides]
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
    process, marker = demo(tmp_path, "experiment=smoke")
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
    process, marker = demo(tmp_path, "experiment=smoke", "server.min_teachers=5")
    printed, _ = process.communicate()
    assert process.returncode == 1
    assert "4 teachers admitted, 5 needed" in printed.splitlines()[-1]
    assert not (tmp_path / "out" / "student.safetensors").exists()
    assert not wait_until_gone(marker)


def test_a_mistake_is_told_in_one_line_at_once(tmp_path):
    process, _ = demo(tmp_path, "inversion.iteratons=3")
    printed, _ = process.communicate()
    assert process.returncode == 2
    assert printed.strip().splitlines()[-1].startswith("smi-fed: inversion.iteratons: got '3', allowed:")
    assert "Traceback" not in printed


def test_ctrl_c_leaves_nothing_behind(tmp_path):
    process, marker = demo(tmp_path, "client.training.steps=100000")
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


def run_apart(node_configs, overrides, output):
    """A SuperLink and a SuperNode for each node config: the run's status, and the nodes' logs."""
    with superlink(simulation=False) as link:
        nodes = [supernode(link, number, config) for number, config in enumerate(node_configs)]
        try:
            status = link.run(overrides, output)
            return status, [(link.home / f"supernode{number}.log").read_text() for number in range(len(nodes))]
        finally:
            for node in nodes:
                stop_family(node, link.home)


def test_separate_processes_on_loopback(tmp_path):
    """A SuperLink, two SuperNodes with architectures of their own, one finished student."""
    output = tmp_path / "out"
    architectures = ["vit_p8_w96_d3", "vit_p4_w48_d3"]
    nodes = [{"partition-id": i, "num-partitions": 2, "arch": arch} for i, arch in enumerate(architectures)]
    status, logs = run_apart(nodes, "experiment=smoke strategy.min_nodes=2", output)
    assert status == "finished:completed", logs
    report = json.loads((output / "report.json").read_text())
    assert [client["architecture"].split("(")[1] for client in report["clients"]] == [
        "patch 8, width 96, depth 3, heads 4)", "patch 4, width 48, depth 3, heads 3)",
    ]  # fmt: skip
    assert load_student(output / "student.safetensors")


def test_owners_on_loopback_and_a_server_without_data(tmp_path):
    """Each SuperNode has a directory and a name; one of them names a directory that is not there, and fails alone."""
    output, places = tmp_path / "out", []
    for number, (name, classes) in enumerate([*HOSPITALS.items(), ("Typo", "12")]):
        directory = write_digits(tmp_path / f"site {number}", classes, 3 + number)
        places.append({"data": str(directory), "name": name, "arch": "vit_p8_w96_d3"})
    places[-1]["data"] += " gone"
    overrides = "experiment=smoke data.source=none data.test_fraction=0 strategy.min_nodes=4"
    status, logs = run_apart(places, overrides, output)
    assert status == "finished:completed", logs
    clients = json.loads((output / "report.json").read_text())["clients"]
    assert {each["name"]: each["num_examples"] for each in clients if each["admitted"]} == {
        "St Mary's": 12, "Hôpital Nord": 12, "Charité": 20,
    }  # fmt: skip
    (typo,) = [each for each in clients if not each["admitted"]]
    assert re.search("Typo: data: got '.*site 3 gone', allowed: a directory of class directories", typo["reason"])
    assert load_student(output / "student.safetensors")
