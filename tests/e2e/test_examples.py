"""The app in examples/ before and after: how little changed, and that both run."""

import difflib
import importlib
import json
import math
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from flwr.app import Context, RecordDict

from simulations.local_grid import InProcessGrid
from simulations.superlink import CONNECTION, PROJECT, superlink
from smi_fed.models import ModelSpec
from smi_fed.strategies import records
from tests.e2e.test_processes import wait_until_gone

EXAMPLES = PROJECT / "examples"
README = (EXAMPLES / "README.md").read_text()
APPS = ("before", "after")
MOST = 10
CLIENTS = 2


def sources(name):
    """Every file of the app, by its path inside it."""
    root = EXAMPLES / name
    files = (path for path in sorted(root.rglob("*")) if path.suffix in {".py", ".toml"})
    return {path.relative_to(root).as_posix(): path.read_text().splitlines() for path in files}


def difference():
    """Changed lines, as `diff -ru0` has them."""
    before, after = (sources(name) for name in APPS)
    return [
        line
        for path in sorted({*before, *after})
        for line in difflib.unified_diff(before.get(path, []), after.get(path, []), path, path, lineterm="", n=0)
        if not line.startswith(("---", "@@"))
    ]


@pytest.fixture
def digits_app(monkeypatch):
    """Import one of the two packages, which have the same name; neither stays imported."""

    def forget():
        for module in [name for name in sys.modules if name.partition(".")[0] == "digits_app"]:
            del sys.modules[module]

    def load(name):
        forget()
        monkeypatch.syspath_prepend(str(EXAMPLES / name))
        return (importlib.import_module(f"digits_app.{part}") for part in ("server_app", "client_app"))

    yield load
    forget()


def check(history):
    """The final model is better than the one that everything began with."""
    assert list(history) == ["0", "1", "2"]
    assert all(math.isfinite(value) for metrics in history.values() for value in metrics.values())
    assert history["2"]["loss"] < history["0"]["loss"]
    assert 0.15 < history["2"]["accuracy"] <= 1


def test_at_most_ten_lines_are_added_and_the_readme_shows_them():
    lines = difference()
    added = [line for line in lines if line.startswith("+") and not line.startswith("+++")]
    assert 0 < len(added) <= MOST, added
    assert f"**{len(added)} added lines**" in README
    assert re.search(r"```diff\n(.*?)\n```", README, re.DOTALL).group(1).splitlines() == lines


@pytest.mark.parametrize("name", APPS)
def test_the_app_in_process(digits_app, name, tmp_path):
    server, client = digits_app(name)
    config = tomllib.loads((EXAMPLES / name / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    config["output"] = str(tmp_path / "history.json")
    sent = []

    def answer(message, context):
        reply = client.app(message, context)
        sent.append(reply.content)
        return reply

    nodes = {70 + i: {"partition-id": i, "num-partitions": CLIENTS} for i in range(CLIENTS)}
    server.main(InProcessGrid(answer, nodes, config), Context(1, 1, {}, RecordDict(), config))
    check(json.loads((tmp_path / "history.json").read_text()))
    specs = {str(content[records.MODEL][records.SPEC]) for content in sent if records.MODEL in content}
    assert {ModelSpec.from_json(spec).kwargs["patch_size"] for spec in specs} == ({8, 16} if name == "after" else set())


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_commands_of_the_readme_on_the_simulation_engine(tmp_path):
    """As they stand there, but on a SuperLink of our own that ends with the test."""
    commands = [shlex.split(line) for line in README.splitlines() if " flwr run " in line]
    assert [command[3] for command in commands] == [f"examples/{name}" for name in APPS]
    with superlink() as link:
        assert all(command[0] in [f"{key}={value}" for key, value in link.env.items()] for command in commands)
        for name, (_, _, _, app, *options) in zip(APPS, commands, strict=True):
            output = tmp_path / f"{name}.json"
            command = [str(Path(sys.executable).parent / "flwr"), "run", app, CONNECTION, *options]
            command += ["--run-config", f'output="{output}"']
            run = subprocess.run(command, env=dict(link.env), cwd=PROJECT, capture_output=True, text=True, check=False)
            assert link.status() == "finished:completed", run.stdout[-3000:] + run.stderr[-3000:]
            check(json.loads(output.read_text()))
            assert "test set, by round" in run.stdout
    assert not wait_until_gone(str(link.home))
