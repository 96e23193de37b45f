import os
import subprocess
from pathlib import Path

SETUP = Path(__file__).resolve().parents[1] / "scripts" / "setup.sh"


def test_an_old_python_is_told_in_one_line(tmp_path):
    for name in ("python3", "python3.11", "python3.12", "python3.13"):
        fake = tmp_path / name
        fake.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.9.1" && exit 0\nexit 1\n')
        fake.chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:/usr/bin:/bin", "PYTHON": "python3"}
    ended = subprocess.run(["bash", SETUP, tmp_path / "venv"], env=env, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert ended.stderr.strip().splitlines() == [
        "smi-fed needs Python 3.11, 3.12 or 3.13; found: Python 3.9.1. Set PYTHON=/path/to/python."
    ]
    assert not (tmp_path / "venv").exists()
