"""Inversions that an executor does side by side, while replies are awaited."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from simulations.local_grid import InProcessGrid
from smi_fed.events import Events
from smi_fed.executors import WorkerDiedError, invert_stored
from smi_fed.strategies.watching_grid import WatchingGrid
from tests.strategies.test_data_free import NODES, client, start, strategy


class Threads:
    """An executor whose jobs wait until `gate` says that they may go on."""

    def __init__(self, gate, fatal=""):
        self.gate, self.fatal, self.names = gate, fatal, []
        self.threads = ThreadPoolExecutor(3)

    def submit(self, job, show):
        self.names.append(job.teacher.name)
        return self.threads.submit(self._do, job, show)

    def _do(self, job, show):
        if job.teacher.name == self.fatal:
            raise WorkerDiedError("its inversion failed twice")
        self.gate()
        return invert_stored(job, show)


def same(first, second):
    pairs = zip(first.student.state_dict().values(), second.student.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.fixture
def told():
    return []


def test_several_are_in_work_before_the_last_reply_and_change_nothing(told):
    first_two = threading.Barrier(2, timeout=30)
    replied = threading.Event()

    def gate():
        if not replied.is_set():
            first_two.wait()

    def training(message, context):
        if context.node_config["partition-id"] == 2:
            assert executor.names
        return client(message, context)

    class Late(InProcessGrid):
        """The last client answers once two inversions are done."""

        def _is_silent(self, asked):
            ended = [event for event in told if (event.stage, event.name) == ("inversion", "ended")]
            late = self.asked[asked].metadata.dst_node_id == 33 and len(ended) < 2
            if not late and len(ended) == 2:
                replied.set()
            return late

    executor = Threads(gate)
    wrapped = strategy(executor=executor, events=Events(watchers=[told.append]))
    start(wrapped, WatchingGrid(Late(training, NODES), interval=0.001))
    assert sorted(executor.names) == ["client 0", "client 1", "client 2"]
    of_one = [event.name for event in told if event.stage == "inversion" and event.node == "client 0"]
    assert of_one == ["started", *["progress"] * 3, "ended"]
    usual = strategy()
    start(usual, InProcessGrid(client, NODES))
    assert same(wrapped, usual)


def test_whose_workers_die_is_left_out_with_the_reason(told):
    wrapped = strategy(
        executor=Threads(lambda: None, fatal="client 1"), min_teachers=2, events=Events(watchers=[told.append])
    )
    start(wrapped, InProcessGrid(client, NODES))
    reasons = {verdict.name: verdict.reason for verdict in wrapped.rounds[0].verdicts}
    assert reasons == {"client 0": "", "client 1": "its inversion failed twice", "client 2": ""}
    failed = [event for event in told if event.name == "failed"]
    assert [(event.node, event.values["reason"]) for event in failed] == [("client 1", "its inversion failed twice")]


def test_an_error_of_our_own_ends_the_run():
    def gate():
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        start(strategy(executor=Threads(gate)), InProcessGrid(client, NODES))
