"""A whole federation killed with SIGKILL, SuperLink, ServerApp, clients and all, and started again."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

from clients.app import app as client_app
from server.run import FederatedRun
from simulations.local_grid import InProcessGrid
from smi_fed.config import join_overrides, load_settings

pytestmark = pytest.mark.slow

PROJECT = Path(__file__).resolve().parents[2]
CLIENTS = 2
OVERRIDES = [
    "experiment=smoke", "strategy.rounds=2", "inversion.iterations=150", "inversion.schedule='20:0.3,40:0.3'",
    "server.images_per_teacher=8", "distillation.steps=60", "pool.images=16", "pool.warm=true",
]  # fmt: skip


def command(output):
    return [sys.executable, "-m", "simulations.demo", "--clients", str(CLIENTS), "--output", str(output), *OVERRIDES]


def family(process):
    """The process and all that it started, wherever they moved to: each has the demo's private FLWR_HOME."""
    members = {process.pid: psutil.Process(process.pid)}
    members |= {child.pid: child for child in members[process.pid].children(recursive=True)}
    homes = set()
    for member in list(members.values()):
        with suppress(psutil.Error):
            homes.add(member.environ().get("FLWR_HOME"))
    homes.discard(os.environ.get("FLWR_HOME"))
    homes.discard(None)
    for each in psutil.process_iter():
        with suppress(psutil.Error):
            if each.environ().get("FLWR_HOME") in homes:
                members[each.pid] = each
    return members.values()


def killed_at(output, pattern):
    """Start the demo; end everything at once when its log shows `pattern`."""
    process = subprocess.Popen(
        command(output), cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    watchdog = threading.Timer(400, process.kill)
    watchdog.start()
    seen = []
    try:
        for line in process.stdout:
            seen.append(line)
            if re.search(pattern, line):
                break
        else:
            pytest.fail("".join(seen[-20:]))
    finally:
        watchdog.cancel()
        for member in family(process):
            with suppress(psutil.NoSuchProcess):
                member.send_signal(signal.SIGKILL)
        process.wait()
    time.sleep(1)


def undisturbed(output):
    """The student and the report of the same run without processes."""
    nodes = {1000 + i: {"partition-id": i, "num-partitions": CLIENTS} for i in range(CLIENTS)}
    overrides = join_overrides(OVERRIDES)
    federated = FederatedRun(load_settings(PROJECT / "conf", overrides), output)
    report = federated.execute(InProcessGrid(client_app, nodes, {"overrides": overrides}))
    return load_file(output / "student.safetensors"), report


def to_the_end(output):
    done = subprocess.run(command(output), cwd=PROJECT, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    report = json.loads((output / "report.json").read_text())
    return load_file(output / "student.safetensors"), report, done.stdout + done.stderr


@pytest.mark.timeout(1800)
def test_killed_again_and_again_it_ends_with_the_same_student(tmp_path):
    expected, whole = undisturbed(tmp_path / "whole")
    output = tmp_path / "killed"
    killed_at(output, r"inversion of client \d: +\d+%")  # while the other still trains, perhaps
    killed_at(output, r"distillation: +\d+%")
    assert (output / "unfinished" / "round1-verdicts.json").exists()
    killed_at(output, r"waiting for train replies: .* [12]/2")  # round 2: replies of round 1 are not asked for again
    found, report, log = to_the_end(output)
    assert "going on after round 1" in log
    assert expected.keys() == found.keys()
    assert all((expected[key] == found[key]).all() for key in expected)
    assert [each["student_test_accuracy"] for each in report["rounds"]] == [
        each["student_test_accuracy"] for each in whole["rounds"]
    ]
    assert not (output / "unfinished").exists()
    events = [json.loads(line) for line in (output / "events.jsonl").read_text().splitlines()]
    assert {event["run"] for event in events} == {"killed"}
    assert [event["name"] for event in events if event["stage"] == "run"] == ["started"] * 4 + ["ended"]
    assert [(event["round"], event["name"]) for event in events if event["stage"] == "round"][-2:] == [
        (2, "started"), (2, "ended"),
    ]  # fmt: skip
