"""Whole runs over processes and over Ray, beside a simulation's own Ray too."""

import json

import pytest
from safetensors.torch import load_file

from clients.app import app as client_app
from server.run import FederatedRun
from simulations.local_grid import InProcessGrid
from smi_fed.config import join_overrides, load_settings
from tests.e2e.test_processes import PROJECT, started, wait_until_gone

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

CLIENTS = 2
OVERRIDES = ["experiment=smoke", "pool.warm=true", "strategy.rounds=2"]


def whole(output, *more):
    """A run in this process but for its inversions."""
    nodes = {1000 + i: {"partition-id": i, "num-partitions": CLIENTS} for i in range(CLIENTS)}
    overrides = join_overrides([*OVERRIDES, *more])
    federated = FederatedRun(load_settings(PROJECT / "conf", overrides), output)
    federated.execute(InProcessGrid(client_app, nodes, {"overrides": overrides}))
    return output


def assert_same_run(output, expected):
    for path in [expected / "student.safetensors", *sorted((expected / "synthetic").glob("*.safetensors"))]:
        mine, theirs = load_file(output / path.relative_to(expected)), load_file(path)
        assert mine.keys() == theirs.keys()
        assert all((mine[key] == theirs[key]).all() for key in mine)
    told = [
        [json.loads(line) for line in (each / "events.jsonl").read_text().splitlines()] for each in (output, expected)
    ]
    ends = [
        sorted((each["round"], each["node"], each["name"]) for each in events if each["stage"] == "inversion")
        for events in told
    ]
    assert ends[0] == ends[1]
    assert {name for _, _, name in ends[0]} == {"started", "progress", "ended"}


def test_processes_give_the_same_run_and_so_does_ray_beside_a_simulation(tmp_path):
    expected = whole(tmp_path / "here")
    assert_same_run(whole(tmp_path / "pool", "server.executor=pool", "server.workers=2"), expected)
    ray = ["server.executor=ray", "server.workers=2"]
    process, marker = started("simulations.demo", tmp_path, "--clients", str(CLIENTS), *OVERRIDES, *ray)
    printed, _ = process.communicate()
    assert process.returncode == 0, printed[-3000:]
    assert_same_run(tmp_path / "out", expected)
    assert not wait_until_gone(marker)


def test_a_cluster_that_does_not_answer_ends_the_run_before_anybody_trains(tmp_path):
    ray = ["server.executor=ray", "server.ray_address='127.0.0.1:1'"]
    process, _ = started("simulations.demo", tmp_path, "--clients", str(CLIENTS), *OVERRIDES, *ray)
    printed, _ = process.communicate()
    assert process.returncode == 1
    assert "server.ray_address: got '127.0.0.1:1'" in printed
    assert "training on" not in printed
