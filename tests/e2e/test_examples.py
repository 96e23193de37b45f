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
import timm
import torch
from flwr.app import Context, RecordDict
from PIL import Image
from safetensors.torch import load_file, save_file

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
MODELS = ("vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224")
STEPS = 5


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


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory):
    """Run config of a small folder of images, red, green and blue ones, and of weights for both models."""
    root, generator = tmp_path_factory.mktemp("stand-in"), torch.Generator().manual_seed(0)
    for split, count in (("train", 16), ("test", 8)):
        for place, name in enumerate(("blue", "green", "red")):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                noise = torch.rand(40, 32, 3, generator=generator) / 2
                noise[..., 2 - place] += 0.5
                Image.fromarray((255 * noise).byte().numpy()).save(root / split / name / f"{number}.png")
    with torch.random.fork_rng():
        torch.manual_seed(7)
        for name in MODELS:
            save_file(timm.create_model(name, img_size=32).state_dict(), root / f"{name}.safetensors")
    return {"data": str(root), "weights": f"{root}/{{}}.safetensors", "model": MODELS[0], "image-size": 32,
            "local-steps": STEPS}  # fmt: skip


@pytest.fixture
def pictures_app(monkeypatch):
    """Import one of the two packages, which have the same name; neither stays imported."""

    def forget():
        for module in [name for name in sys.modules if name.partition(".")[0] == "pictures_app"]:
            del sys.modules[module]

    def load(name):
        forget()
        monkeypatch.syspath_prepend(str(EXAMPLES / name))
        return (importlib.import_module(f"pictures_app.{part}") for part in ("server_app", "client_app"))

    yield load
    forget()


def check(history, rounds):
    """The final model is better than the one that everything began with."""
    assert list(history) == [str(number) for number in range(rounds + 1)]
    assert all(math.isfinite(value) for metrics in history.values() for value in metrics.values())
    first, last = history["0"], history[str(rounds)]
    assert last["loss"] < first["loss"]
    assert 0.6 < last["accuracy"] <= 1
    assert first["accuracy"] < last["accuracy"]


def near(weights, file):
    """Whether weights are those of a file after a few small steps: random ones are a hundred times as far away."""
    (key,) = [key for key in weights if key.endswith("patch_embed.proj.weight")]
    return bool((weights[key] - load_file(file)["patch_embed.proj.weight"]).abs().max() < 2e-4 * STEPS)


def test_at_most_ten_lines_are_added_and_the_readme_shows_them():
    lines = difference()
    added = [line for line in lines if line.startswith("+") and not line.startswith("+++")]
    assert 0 < len(added) <= MOST, added
    assert f"**{len(added)} added lines**" in README
    assert re.search(r"```diff\n(.*?)\n```", README, re.DOTALL).group(1).splitlines() == lines


@pytest.mark.parametrize("name", APPS)
@pytest.mark.usefixtures("uncounted")
def test_the_app_in_process(pictures_app, stand_in, name, tmp_path):
    server, client = pictures_app(name)
    config = tomllib.loads((EXAMPLES / name / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    assert stand_in.keys() <= config.keys()
    config |= {**stand_in, "rounds": 1, "output": str(tmp_path / "history.json")}
    sent = []

    def answer(message, context):
        reply = client.app(message, context)
        sent.append(reply.content)
        return reply

    nodes = {70 + i: {"partition-id": i, "num-partitions": CLIENTS} for i in range(CLIENTS)}
    nodes[71]["data"] = stand_in["data"]  # its own, of which nobody else has a part
    server.main(InProcessGrid(answer, nodes, config), Context(1, 1, {}, RecordDict(), config))
    check(json.loads((tmp_path / "history.json").read_text()), rounds=1)
    models = []
    for content in (each for each in sent if records.ARRAYS in each):
        spec = ModelSpec.from_json(str(content[records.MODEL][records.SPEC])) if name == "after" else None
        models.append(MODELS[0] if spec is None else spec.name)
        assert spec is None or spec.class_names == ("blue", "green", "red")
        assert near(content[records.ARRAYS].to_torch_state_dict(), stand_in["weights"].format(models[-1]))
    assert sorted(models) == sorted(MODELS if name == "after" else MODELS[:1] * CLIENTS)
    counts = sorted(each[records.METRICS]["num-examples"] for each in sent if records.ARRAYS in each)
    assert counts == [24, 48]
    kinds = {frozenset(each[records.ARRAYS]) for each in sent if records.ARRAYS in each}
    assert len(kinds) == (2 if name == "after" else 1)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_commands_of_the_readme_on_the_simulation_engine(stand_in, tmp_path):
    """As they stand there, but on the stand-in and on a SuperLink of our own that ends with the test."""
    commands = [shlex.split(line) for line in README.splitlines() if " flwr run " in line]
    assert [command[3] for command in commands] == [f"examples/{name}" for name in APPS]
    with superlink() as link:
        assert all(command[0] in [f"{key}={value}" for key, value in link.env.items()] for command in commands)
        for name, (_, _, _, app, *options) in zip(APPS, commands, strict=True):
            assert options[-2:] == ["--run-config", 'data="/absolute/path"']
            output = tmp_path / f"{name}.json"
            words = [f"{key}={json.dumps(value)}" for key, value in {**stand_in, "output": str(output)}.items()]
            command = [
                str(Path(sys.executable).parent / "flwr"),
                "run",
                app,
                CONNECTION,
                *options[:-1],
                " ".join(words),
            ]
            run = subprocess.run(command, env=dict(link.env), cwd=PROJECT, capture_output=True, text=True, check=False)
            assert link.status() == "finished:completed", run.stdout[-3000:] + run.stderr[-3000:]
            check(json.loads(output.read_text()), rounds=2)
            assert "test set, by round" in run.stdout
    assert not wait_until_gone(str(link.home))
