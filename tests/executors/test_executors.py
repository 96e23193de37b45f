"""The same images whoever inverts; what goes wrong comes back as what it is."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import psutil
import pytest
import torch

from simulations.processes import free_port
from simulations.ray_nodes import ray_nodes
from smi_fed.checks import SettingError
from smi_fed.executors import Here, WorkerDiedError, open_executor
from smi_fed.files import FileFormatError
from smi_fed.inversion import DivergedError
from smi_fed.sparse_images import StoredImages
from tests.executors.jobs import done, job, two_jobs
from tests.same import assert_same

PROJECT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


def eventually(happened, patience=60.0):
    """What `happened` gives once it is true."""
    deadline = time.monotonic() + patience
    while not (found := happened()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)
    return found


def kin(process):
    """All that a process started, and what these did."""
    return psutil.Process(process).children(recursive=True)


def working(mark="spawn_main"):
    """The processes below this one whose command says so: those that were started to invert, by default."""
    found = []
    for each in kin(os.getpid()):
        with suppress(psutil.Error):
            found += [each] if mark in " ".join(each.cmdline()) else []
    return found


def left(processes, patience=30.0):
    """Those that do not end in time; who is dead and waits for init to notice has ended."""

    def alive():
        found = []
        for each in processes:
            with suppress(psutil.NoSuchProcess):
                found += [each.cmdline()] if each.status() != psutil.STATUS_ZOMBIE else []
        return found

    deadline = time.monotonic() + patience
    while alive() and time.monotonic() < deadline:
        time.sleep(0.1)
    return alive()


def kill(mark):
    """Kills who inverts, as the system does when memory runs out; waits for one to begin and for it to have ended."""
    victim = eventually(lambda: working(mark))[0]
    victim.kill()
    assert not left([victim])


def check(executor, directory, expected):
    """The images of `expected`, what they took, and all errors by their types."""
    jobs, earlier = two_jobs(directory)
    done(executor, [earlier])
    records, images, shown = done(executor, jobs)
    for mine, theirs in zip(images, expected[1], strict=True):
        assert_same(mine, theirs)
    assert [each.flops for each in records] == [each.flops for each in expected[0]]
    assert [each[-1] for each in shown] == [each[-1] for each in expected[2]]
    with pytest.raises(DivergedError, match="not finite"):
        done(executor, [job(directory, 5, poisoned=True)])
    broken = job(directory, 6)
    broken.teacher.path.write_bytes(b"nothing")
    with pytest.raises(FileFormatError, match=r"truncated or not a safetensors file"):
        done(executor, [broken])


@pytest.fixture
def expected(tmp_path):
    """What the server's own process makes of two jobs, the second from earlier images."""
    (tmp_path / "here").mkdir()
    jobs, earlier = two_jobs(tmp_path / "here")
    with Here() as here:
        done(here, [earlier])
        return done(here, jobs)


def test_this_process_tells_errors_by_their_types(tmp_path, expected):
    check(open_executor("here", CPU), tmp_path, expected)
    warm, cold = (job(tmp_path / "cold", 2, last=last) for last in (StoredImages(tmp_path / "7.safetensors", 4), None))
    assert not torch.equal(*(done(Here(), [each])[1][0].images for each in (warm, cold)))


def test_a_checkpoint_of_something_else_begins_anew(tmp_path, expected, caplog):
    jobs, earlier = two_jobs(tmp_path)
    done(Here(), [earlier])
    jobs[0].checkpoint.mkdir()
    (jobs[0].checkpoint / "work.safetensors").write_bytes(b"torn")
    left = tmp_path / f".{jobs[0].images.name}.0123.safetensors"
    left.write_bytes(b"torn")
    assert_same(done(Here(), jobs[:1])[1][0], expected[1][0])
    assert "the inversion of client 1 begins anew" in caplog.text
    assert not left.exists()


def test_nobody_at_an_address_is_told_at_once():
    address = f"127.0.0.1:{free_port()}"
    for form in (address, f"ray://{address}"):
        with pytest.raises(SettingError, match=rf"server.ray_address: got '{form}', .* answers \(.*refused"):
            open_executor("ray", CPU, ray_address=form)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pool", "ray"])
def test_processes_make_the_same_images(tmp_path, expected, kind):
    with open_executor(kind, CPU, workers=2) as executor:
        check(executor, tmp_path, expected)
        started = kin(os.getpid())
        assert working()
    assert not working()
    assert not left([each for each in started if each not in psutil.Process().children()])  # multiprocessing's own


@pytest.fixture
def cluster():
    """Addresses of a real cluster, as it is started on machines of its own."""
    with ray_nodes(2) as addresses:
        yield addresses


@pytest.mark.slow
def test_a_cluster_that_is_there_gets_bytes_and_gives_bytes(tmp_path, expected, cluster):
    for place, address in enumerate(cluster):
        directory = tmp_path / str(place)
        directory.mkdir()
        with open_executor("ray", CPU, ray_address=address) as executor:
            check(executor, directory, expected)
        assert not list(directory.glob("*.checkpoint"))  # the workers had their own


LONG = {"iterations": 300, "images": 12}  # three batches, each of which leaves a checkpoint


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "mark"), [("pool", "spawn_main"), ("ray", "ray::_invert")])
def test_a_killed_process_goes_on_from_its_checkpoint_once(tmp_path, caplog, kind, mark):
    (expected,) = done(Here(), [job(tmp_path / "here", 1, **LONG)])[1]
    with open_executor(kind, CPU, workers=1) as executor:
        long, shown = job(tmp_path / "pool", 1, **LONG), []
        future = executor.submit(long, shown.append)
        eventually(lambda: (long.checkpoint / "work.safetensors").exists())
        kill(mark)
        future.result(timeout=120)
        assert_same(StoredImages(long.images, 12).load(), expected)
        told = "client 1 is tried once more: its process was killed by signal 9, as when memory runs out" in caplog.text
        assert told == (kind == "pool")  # Ray does not tell
        (again,) = [now for before, now in pairwise(shown) if now.seconds < before.seconds]
        assert again.done > LONG["iterations"]  # of all batches, the first of which was done

        unlucky, shown = job(tmp_path / "pool", 2, **LONG), []
        future, other = executor.submit(unlucky, shown.append), executor.submit(job(tmp_path / "pool", 3), print)
        for _ in range(2):
            shown.clear()  # what the one before had told may still arrive
            eventually(lambda: shown)
            kill(mark)
        with pytest.raises(WorkerDiedError, match="failed twice: .*(killed by signal 9|died|crash)"):
            future.result(timeout=60)
        assert other.result(timeout=60).images == 4  # a third process does what waited


SERVER = """
import sys
from pathlib import Path

import torch

from smi_fed.executors import open_executor
from tests.executors.jobs import job

if __name__ == "__main__":
    with open_executor(sys.argv[1], torch.device("cpu"), workers=2) as executor:
        jobs = [job(Path(sys.argv[2]), number, iterations=10**6) for number in (1, 2)]
        futures = [executor.submit(each, lambda now: print("at", now.done, flush=True)) for each in jobs]
        if sys.argv[3] == "error":
            input()
            raise ValueError("the server's own")
        futures[0].result()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "how"),
    [("pool", "SIGINT"), ("pool", "SIGKILL"), ("pool", "error"), ("ray", "SIGINT"), ("ray", "SIGKILL")],
)
def test_however_the_server_ends_nothing_is_left_running(tmp_path, kind, how):
    script = tmp_path / "server.py"
    script.write_text(SERVER)
    process = subprocess.Popen(
        [sys.executable, script, kind, tmp_path, how], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(PROJECT)}, start_new_session=True,
    )  # fmt: skip
    try:
        assert process.stdout.readline().startswith("at ")
        started = kin(process.pid)
        assert len(started) >= 2
        if how == "error":
            process.stdin.write("\n")
            process.stdin.flush()
        elif how == "SIGINT":
            os.killpg(process.pid, signal.SIGINT)  # as a terminal sends it, to all
        else:
            process.kill()
        printed = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert {"SIGINT": "KeyboardInterrupt", "SIGKILL": "", "error": "the server's own"}[how] in printed
    assert not left(started)
