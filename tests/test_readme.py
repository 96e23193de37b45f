import ast
import inspect
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from server.checks import check_models
from simulations import results
from smi_fed.config import join_overrides, load_settings
from smi_fed.models import ModelSpec
from smi_fed.strategies import DataFreeDistillation

PROJECT = Path(__file__).resolve().parents[1]
README = PROJECT / "README.md"
PAGES = sorted((PROJECT / "docs").glob("*.md"))
OTHERS = [PROJECT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "examples/README.md")]
STUDENT = ModelSpec("vit_tiny_patch16_224", 2, kwargs={"img_size": 16, "embed_dim": 12, "depth": 1, "num_heads": 2})


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def links(text):
    without_code = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)
    return re.findall(r"\]\((?!https?:)([^)\s]*)\)", without_code)


def anchors(text):
    """Of the headings of a page, as GitHub and MkDocs make them."""
    titles = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower()) for title in titles}


def dead_links(page, text):
    dead = []
    for link in links(text):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        there = target.exists() and (not anchor or anchor in anchors(target.read_text(encoding="utf-8")))
        dead += [] if there else [link]
    return dead


def test_a_dead_link_is_found():
    text = "# A title, it is\n[a](docs/index.md) [b](docs/no.md) [c](#a-title-it-is) [d](LICENSE) `[e](no)`"
    text += " [f](docs/rounds.md#within-a-round) [g](docs/rounds.md#no)"
    assert anchors(text) == {"a-title-it-is"}
    assert dead_links(README, text) == ["docs/no.md", "#a-title-it-is", "docs/rounds.md#no"]


@pytest.mark.parametrize("page", [README, *OTHERS], ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    """Those of docs/ are checked by `make docs`."""
    assert dead_links(page, page.read_text(encoding="utf-8")) == []


def test_the_readme_is_a_front_page():
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    assert {f"docs/{page.name}" for page in PAGES if page.name != "index.md"} <= set(links(text))


def test_every_configuration_that_is_named_is_there():
    named = {path for page in [README, *PAGES] for path in re.findall(r"`(conf/[\w/]+\.yaml)`", page.read_text())}
    assert {path for path in named if not (PROJECT / path).exists()} == {"conf/model/mine.yaml"}  # the reader's own


@pytest.mark.parametrize("page", [README, PROJECT / "docs" / "library.md"], ids=lambda page: page.name)
def test_the_library_example_runs(page, capsys):
    (example,) = [code for code in blocks(page, "python") if "invert(" in code]
    exec(example, {})
    assert "torch.Size([10, 3, 32, 32]) torch.Size([10, " in capsys.readouterr().out


def test_the_examples_of_own_models_run():
    adapted, registered = blocks(PROJECT / "docs" / "models.md", "python")
    names = {}
    exec(adapted, names)
    assert names["found"].kept.shape == (10, 8)  # half of 4 x 4 patches
    exec(registered, names)
    assert names["model"](torch.zeros(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize("page", [README, PROJECT / "docs" / "own-app.md"], ids=lambda page: page.name)
def test_the_examples_of_a_server_app_call_what_there_is(page, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    signature, calls = inspect.signature(DataFreeDistillation.start), []
    monkeypatch.setattr(DataFreeDistillation, "start", lambda *a, **k: calls.append(signature.bind(*a, **k)))
    examples = [code for code in blocks(page, "python") if "DataFreeDistillation(" in code]
    names = {"spec": STUDENT, "grid": SimpleNamespace()}
    for code in examples:
        exec(code, names)
    assert len(calls) == len(examples) > 0
    assert all(call.arguments["grid"].grid is names["grid"] for call in calls)


def test_python_on_the_pages_is_python():
    for page in PAGES:
        for code in blocks(page, "python"):
            ast.parse(code)


def test_the_example_of_own_images_is_accepted(tmp_path):
    shutil.copytree(PROJECT / "conf", tmp_path / "conf")
    (example,) = blocks(PROJECT / "docs" / "own-images.md", "yaml")
    (tmp_path / "conf" / "model" / "mine.yaml").write_text(example)
    for name in ("ant", "bee", "cat"):
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.new("RGB", (40, 40)).save(tmp_path / "images" / name / "0.png")
    words = ["data=folder", f"data.name={tmp_path / 'images'}", "model=mine"]
    settings = load_settings(tmp_path / "conf", join_overrides(words))
    check_models(settings)
    assert settings.model.student.num_classes == 3


def test_the_tables_are_those_of_the_kept_results():
    for file in {file for file, _ in results.SECTIONS.values()}:
        text = (PROJECT / file).read_text(encoding="utf-8")
        assert results.filled(text, file) == text
