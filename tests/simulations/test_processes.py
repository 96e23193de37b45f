"""The end of processes that were started, whatever they are by then."""

import os
import subprocess
import sys
import time

import psutil

from simulations.processes import stop_family

CHILD = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
HEAD = (
    "import subprocess, sys, time; child = subprocess.Popen([sys.executable, '-c', sys.argv[1]], env={},"
    " start_new_session=True); print(child.pid, flush=True); time.sleep(600)"
)


def test_what_hides_its_home_and_ignores_a_polite_request_ends_too(tmp_path):
    """Of its parent, whose end it outlives, nothing is left by which it could be found afterwards."""
    process = subprocess.Popen(
        [sys.executable, "-c", HEAD, CHILD], env={**os.environ, "FLWR_HOME": str(tmp_path)}, stdout=subprocess.PIPE
    )
    child = psutil.Process(int(process.stdout.readline()))
    while "sleep" not in " ".join(child.cmdline()):
        time.sleep(0.01)
    time.sleep(0.2)  # until the signal is ignored
    stop_family(process, tmp_path, patience=1)
    assert process.poll() is not None
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
