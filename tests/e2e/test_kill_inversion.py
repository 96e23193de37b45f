"""Real processes, killed with SIGKILL in the middle of an inversion and started again."""

import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest

from smi_fed.sparse_images import SparseImages
from tests.same import assert_same

pytestmark = pytest.mark.slow

PROJECT = Path(__file__).resolve().parents[2]
ITERATIONS, BATCHES = 60, 3
SCRIPT = f"""
import sys
from pathlib import Path

import torch

from smi_fed.inversion import InversionConfig, checkpoint, invert
from tests.models import small_vit

torch.set_num_threads(1)
checkpoint.LARGEST_SHARE = float("inf")
config = InversionConfig.paper(iterations={ITERATIONS}, schedule="10:0.3,30:0.4", jitter=5, batch_size=2)
found = invert(
    small_vit(), torch.tensor([0, 1, 2, 3, 4]), config, generator=torch.Generator().manual_seed(3), teacher_id=7,
    progress=lambda now: print(now.done, flush=True), checkpoint=Path(sys.argv[1]) / "work", checkpoint_interval=0,
)
found.save(Path(sys.argv[1]) / "found.safetensors")
"""


def start(directory):
    command = [sys.executable, "-c", SCRIPT, str(directory)]
    return subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, text=True)


def to_the_end(directory):
    """The iterations that a process printed which nobody disturbed."""
    process = start(directory)
    printed, _ = process.communicate()
    assert process.returncode == 0
    return [int(line) for line in printed.splitlines()]


def killed(directory, when):
    """The iterations that a process printed until it was killed at `when(process)`."""
    process = start(directory)
    try:
        before = when(process)
    finally:
        process.kill()
    printed, _ = process.communicate()
    assert process.returncode == -signal.SIGKILL, "it ended before it was killed"
    return [*before, *(int(line) for line in printed.splitlines())]


def after_lines(count):
    return lambda process: [int(process.stdout.readline()) for _ in range(count)]


def after_a_file(directory, pattern):
    """As soon as a new file of this name is seen, which may not be written to its end."""
    known = set(directory.glob(pattern))

    def when(process):
        while not set(directory.glob(pattern)) - known:
            assert process.poll() is None
            time.sleep(0.0002)
        return []

    return when


def assert_whole(runs, directory, uninterrupted):
    """Each process went on where the one before was killed, and the images are those of one process."""
    assert_same(SparseImages.load(directory / "found.safetensors"), uninterrupted)
    runs = [run for run in runs if run]
    for before, after in pairwise(runs):
        # An iteration is printed before it is written, so at most the last one is done again.
        assert after[0] in (before[-1], before[-1] + 1)
    assert runs[0][0] == 1
    assert all(run == list(range(run[0], run[-1] + 1)) for run in runs)
    assert runs[-1][-1] == ITERATIONS * BATCHES
    seen = sorted(path.name for path in (directory / "work").iterdir() if not path.name.startswith("."))
    assert seen == [*(f"images-{first:08d}.safetensors" for first in (0, 2, 4)), "work.safetensors"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    directory = tmp_path_factory.mktemp("uninterrupted")
    assert to_the_end(directory) == list(range(1, ITERATIONS * BATCHES + 1))
    return SparseImages.load(directory / "found.safetensors")


def test_killed_again_and_again(tmp_path, uninterrupted):
    counts = (9, 40)  # a batch in its dense part, one in its sparse part
    runs = [killed(tmp_path, after_lines(count)) for count in counts]
    runs.append(to_the_end(tmp_path))
    assert all(run[0] > 1 for run in runs[1:])
    assert_whole(runs, tmp_path, uninterrupted)


def test_killed_as_soon_as_a_file_appears(tmp_path, uninterrupted):
    work = tmp_path / "work"
    patterns = ["work.safetensors", "images-00000000.safetensors"]
    runs = [killed(tmp_path, after_a_file(work, pattern)) for pattern in patterns]
    runs.append(to_the_end(tmp_path))
    assert runs[-1][0] >= ITERATIONS
    assert_whole(runs, tmp_path, uninterrupted)


def test_temporary_files_of_a_killed_process_are_not_read(tmp_path, uninterrupted):
    runs = [killed(tmp_path, after_lines(ITERATIONS + 5))]
    work = tmp_path / "work"
    whole = (work / "work.safetensors").read_bytes()
    left = {
        work / ".work.safetensors.0123456789abcdef.safetensors": whole[: len(whole) // 2],
        work / ".work.safetensors.fedcba9876543210.safetensors": b"",
        work / ".images-00000002.safetensors.0123456789abcdef.safetensors": whole,
    }
    for path, content in left.items():
        path.write_bytes(content)
    runs.append(to_the_end(tmp_path))
    assert runs[-1][0] > ITERATIONS
    assert_whole(runs, tmp_path, uninterrupted)
    assert not any(path.exists() for path in left)
    (tmp_path / "found.safetensors").unlink()
    assert to_the_end(tmp_path) == []  # what is finished is only read
    assert_same(SparseImages.load(tmp_path / "found.safetensors"), uninterrupted)
