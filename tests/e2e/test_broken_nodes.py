"""Nodes that die amid a round, by `kill -9`, cost their own contribution and come back. Real processes over TLS."""

import json
import signal
import threading
import time

import psutil
import pytest

from simulations.superlink import superlink
from simulations.supernode import supernode

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
NAMES = ("St Mary", "Charité", "Power Cut", "Out of Memory")
PATIENCE = 300


def wait_for(there, what):
    deadline = time.monotonic() + PATIENCE
    while not there():
        assert time.monotonic() < deadline, what
        time.sleep(0.2)


def family(node):
    process = psutil.Process(node.process.pid)
    return [process, *process.children(recursive=True)]


def own_app(node):
    return [each for each in family(node)[1:] if "clientapp" in " ".join(each.cmdline())]


def kill(processes):
    """All at once, so that none sees another die."""
    for each in processes:
        each.send_signal(signal.SIGSTOP)
    for each in processes:
        each.kill()


def kill_amid_training(victims):
    """Each as soon as it trains, whoever is first: a moment later its reply may be on its way.

    Args:
        victims: a node and what of it dies.
    """
    left = list(victims)
    while left:
        wait_for(lambda: any(trains(node) for node, _ in left), left[0][0].said)
        for node, processes in [each for each in left if trains(each[0])]:
            kill(processes(node))
            left.remove((node, processes))


def trains(node):
    return "round 2: training on" in node.said()


def comes_back(node):
    """Start it until the SuperLink, which first has to see that it was gone, lets it in."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        started = node.restart()
        before = node.said().count("SuperNode ID: ")
        wait_for(
            lambda now=started, seen=before: (
                now.process.poll() is not None or node.said().count("SuperNode ID: ") > seen
            ),
            node.said,
        )
        if started.process.poll() is None:
            return started
    raise AssertionError(node.said())


def test_nodes_that_die_cost_their_own_contribution_and_take_part_again(tmp_path):
    """One loses its power, one its ClientApp; both in round 2 of three, while they train."""
    words = "experiment=smoke client.training.steps=150 strategy.rounds=3 strategy.min_nodes=4"
    found = []
    with superlink(simulation=False) as link:
        nodes = {
            name: supernode(link, f"node{i}", {"partition-id": i, "num-partitions": 4, "name": name})
            for i, name in enumerate(NAMES)
        }
        assert all(node.admitted() for node in nodes.values())
        run = threading.Thread(target=lambda: found.append(link.run(words, tmp_path / "out")))
        run.start()
        dark = nodes["Power Cut"]
        kill_amid_training([(dark, family), (nodes["Out of Memory"], own_app)])
        dark.process.wait(10)
        comes_back(dark)
        run.join()
    assert found == ["finished:completed"], [node.said()[-2000:] for node in nodes.values()]
    rounds = json.loads((tmp_path / "out" / "report.json").read_text())["rounds"]
    assert [sorted(line["admitted"]) for line in rounds] == [sorted(NAMES), sorted(NAMES[:2]), sorted(NAMES)]
    reasons = {each["name"]: each["reason"] for each in rounds[1]["refused"]}
    assert set(reasons) == set(NAMES[2:])
    assert "code 5" in reasons["Power Cut"], reasons
    assert "code" in reasons["Out of Memory"], reasons
