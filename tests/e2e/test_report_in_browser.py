"""report.html of a real run in a real browser, light and dark."""

import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from smi_fed.report_page import DARK, LIGHT, write_page
from smi_fed.report_pictures import COLUMNS
from tests.e2e.test_app import nodes, run
from tests.test_report_page import HOSTILE, with_texts

pytestmark = pytest.mark.slow

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
OVERRIDES = (
    "experiment=smoke strategy.rounds=2 evaluation=both show_real=true inversion.stopping=rebirth"
    " server.images_per_teacher=24"
)


@pytest.fixture(scope="module")
def browser():
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None and not os.environ.get("CI"):
        pytest.skip("no Chromium; scripts/browser.sh brings one")
    assert found, "no Chromium, although CI installs one"
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        options = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium's needs a user; the page is ours
        chromium = playwright.chromium.launch(executable_path=found, args=options)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    output = tmp_path_factory.mktemp("run")
    run(output, OVERRIDES, grid_nodes=nodes(3))
    return output / "out"


@pytest.fixture
def opened(browser, tmp_path):
    """Opens a file as a person would; whatever it asked for, and whatever the browser complained of."""
    pages = []

    def open_page(path, scheme, width=1200):
        page, heard = browser.new_page(color_scheme=scheme, viewport={"width": width, "height": 900}), []
        pages.append(page)
        page.on("request", lambda request: heard.append(request.url))
        page.on("console", lambda message: heard.append(message.text))
        page.on("pageerror", lambda error: heard.append(str(error)))
        page.on("dialog", lambda dialog: heard.append(dialog.message))
        page.goto(path.as_uri())
        return page, [each for each in heard if each != path.as_uri() and not each.startswith("data:")]

    yield open_page
    for page in pages:
        page.close()


def shot(page, path):
    page.screenshot(path=path, full_page=True)
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"), dtype=np.int64)


def colour(text):
    return [int(text[place : place + 2], 16) for place in (1, 3, 5)]


@pytest.mark.parametrize(("scheme", "colours"), [("light", LIGHT), ("dark", DARK)])
def test_it_is_whole_light_and_dark(directory, opened, tmp_path, scheme, colours):
    page, heard = opened(directory / "report.html", scheme)
    assert heard == []
    picture = shot(page, tmp_path / "page.png")
    assert picture[0, 0].tolist() == colour(colours["page"])
    present = {tuple(each) for each in picture.reshape(-1, 3)[::7].tolist()}
    assert {tuple(colour(colours[kind])) for kind in ("student", "ensemble", "client", "rest", "card")} <= present
    assert page.locator("h2").all_text_contents() == ["Curves", "Clients", "Images", "Time", "Rounds", "Settings"]
    images = page.evaluate("[...document.images].map(image => image.naturalWidth)")
    assert len(images) == 3 * 3 * COLUMNS  # of three clients: synthetic, kept patches, real
    assert set(images) == {32}
    assert page.evaluate("document.documentElement.scrollWidth") == 1200


def test_it_says_what_the_report_says(directory, opened):
    page, _ = opened(directory / "report.html", "light")
    report = json.loads((directory / "report.json").read_text())
    text = " ".join(page.inner_text("body").split())
    for client in report["clients"]:
        assert f"{client['name']} {client['node']} ✓ admitted 2 of 2 rounds {client['architecture']}" in text
        assert f"{client['num_examples']} {100 * client['test_accuracy']:.1f} %" in text
    assert not page.locator("td:text-is('strategy.rounds')").count()
    page.click("summary")
    settings = dict(row.inner_text().split("\t") for row in page.locator("details tr").all())
    assert (settings["strategy.rounds"], settings["inversion.stopping.kind"]) == ("2", "rebirth")
    (student, mean, worst), (loss,) = (
        [path.get_attribute("d").split() for path in figure.locator(":scope > svg > path.line").all()]
        for figure in page.locator(".charts figure").all()
    )
    assert [len(line) for line in (student, mean, worst)] == [2, 2, 2]
    assert len(loss) == 6  # two rounds of three steps


def test_on_a_phone_only_tables_are_scrolled(directory, opened):
    page, _ = opened(directory / "report.html", "light", width=390)
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    assert page.evaluate("document.querySelector('.wide').scrollWidth") > 390


def test_hostile_texts_run_nothing_and_no_script_could(directory, opened, tmp_path):
    shutil.copytree(directory / "synthetic", tmp_path / "run" / "synthetic")
    report = json.loads((directory / "report.json").read_text())
    hostile = with_texts(report, HOSTILE)
    for theirs, ours in zip(hostile["clients"], report["clients"], strict=True):
        theirs["images"] = ours["images"]
    (tmp_path / "run" / "report.json").write_text(json.dumps(hostile))
    page, heard = opened(write_page(tmp_path / "run"), "light")
    assert heard == []
    assert HOSTILE in page.inner_text("body")
    assert page.title() == "smi-fed: run"
    add = "document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.ran = 1'}))"
    page.evaluate(add)
    assert page.evaluate("window.ran") is None
