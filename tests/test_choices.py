"""Choices of an inversion, each with its own keys: in Python, in YAML, by overrides, and merged by Hydra."""

import pickle
import re
import shutil
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from smi_fed.checks import SettingError, kinds_of, read
from smi_fed.config import Settings, compose, load_settings
from smi_fed.distillation import Agreement
from smi_fed.inversion import (
    Adaptive,
    Converged,
    Fixed,
    InversionConfig,
    Keep,
    Last,
    PixelsConfig,
    PyramidConfig,
    Rebirth,
)
from smi_fed.layers import choice_paths

CONF = Path(__file__).resolve().parents[1] / "conf"
COMPOSED = compose(CONF, [])


def chosen(config):
    return config.parametrisation, config.stopping, config.leaving, config.planning


def of_files(*overrides, conf=CONF):
    return chosen(load_settings(conf, list(overrides)).inversion)


def refusal(make, *args, **kwargs):
    with pytest.raises(SettingError) as error:
        make(*args, **kwargs)
    return str(error.value)


DEFAULTS = (PixelsConfig(), Keep(), Last(), Fixed())
FORMS = [
    ({}, DEFAULTS),
    (
        {"parametrisation": PyramidConfig(levels=(4, 8)), "leaving": Converged(patience=5)},
        (PyramidConfig((4, 8), 0.1), Keep(), Converged(5, 0.01), Fixed()),
    ),
    ({"parametrisation": "pyramid", "stopping": "rebirth"}, (PyramidConfig(), Rebirth(), Last(), Fixed())),
    ({"leaving": "converged", "planning": "adaptive"}, (PixelsConfig(), Keep(), Converged(10, 0.01), Adaptive())),
    (
        {"parametrisation": {"kind": "pyramid", "levels": [2], "start_scale": 1}, "leaving": {"kind": "last"}},
        (PyramidConfig((2,), 1.0), Keep(), Last(), Fixed()),
    ),
]


@pytest.mark.parametrize(("values", "expected"), FORMS)
def test_an_instance_a_kind_and_a_mapping_are_the_same(values, expected):
    for made in (InversionConfig.paper(**values), read(InversionConfig, values), replace(InversionConfig(), **values)):
        assert chosen(made) == expected
        assert read(InversionConfig, asdict(made)) == pickle.loads(pickle.dumps(made)) == made
        assert eval(repr(made.leaving), {"Last": Last, "Converged": Converged}) == made.leaving


def test_the_kind_comes_first_in_texts_and_is_no_argument_by_place():
    assert repr(PyramidConfig((4, 8))) == "PyramidConfig(kind='pyramid', levels=(4, 8), start_scale=0.1)"
    assert asdict(Converged(5)) == {"kind": "converged", "patience": 5, "tolerance": 0.01}
    assert refusal(Converged, 0).startswith("patience: got 0, ")
    assert refusal(Converged, 5, 0.1, "converged").startswith("2: got 'converged', ")


REFUSED = [
    ("leaving", "early", "leaving: got 'early', allowed: converged | last"),
    ("leaving", Keep(), "leaving: got Keep(kind='keep'), allowed: converged | last"),
    ("leaving", {"kind": "early"}, "leaving.kind: got 'early', allowed: converged | last"),
    ("leaving", {"kind": ["last"]}, "leaving.kind: got ['last'], allowed: converged | last"),
    ("leaving", {"patience": 3}, "leaving.kind: got None, allowed: converged | last"),
    ("leaving", {"kind": "last", "patience": 3}, "leaving.patience: got 3, allowed: a key of leaving: kind"),
    (
        "leaving",
        {"kind": "converged", "patience": 0, "patiense": 3},
        "leaving.patience: got 0, allowed: an int >= 1; "
        "leaving.patiense: got 3, allowed: a key of leaving: patience | tolerance",
    ),
    (
        "parametrisation",
        {"kind": "pixels", "levels": [4], "start_scale": 1},
        "parametrisation.levels: got [4], allowed: a key of parametrisation: kind; "
        "parametrisation.start_scale: got 1, allowed: a key of parametrisation: kind",
    ),
]


@pytest.mark.parametrize(("key", "value", "message"), REFUSED)
def test_what_is_no_kind_or_dead_for_the_kind_is_refused_by_name(key, value, message):
    assert refusal(InversionConfig, **{key: value}) == refusal(read, InversionConfig, {key: value}) == message
    values = deepcopy(COMPOSED)
    values["inversion"][key] = value
    below = message.replace(f"{key}.", f"inversion.{key}.").replace(f"of {key}", f"of inversion.{key}")
    assert refusal(read, Settings, values) == (below if below.startswith("inversion.") else f"inversion.{message}")


SPARSE = (PyramidConfig((4, 8), 0.1), Keep(), Last(), Fixed())
EARLY = (*SPARSE[:2], Converged(8, 0.01), Fixed())
FILES = {
    "paper": DEFAULTS, **dict.fromkeys(("sparse", "digits"), SPARSE),
    "rebirth": (SPARSE[0], Rebirth(), Last(), Fixed()), "early_stop": EARLY,
    "adaptive": (*SPARSE[:3], Adaptive()), "deepinversion": SPARSE,
}  # fmt: skip
OVERRIDDEN = [
    ("sparse", ["parametrisation.levels=[4,8,16]"], 0, PyramidConfig((4, 8, 16), 0.1)),
    ("sparse", ["parametrisation.start_scale=0.3", "parametrisation=pyramid"], 0, PyramidConfig((4, 8), 0.3)),
    ("paper", ["parametrisation=pyramid", "parametrisation.levels=[2]"], 0, PyramidConfig((2,), 0.1)),
    ("rebirth", ["stopping=keep"], 1, Keep()),
    ("sparse", ["planning.kind=adaptive"], 3, Adaptive()),
    ("sparse", ["leaving={kind:converged,patience:5,tolerance:0.02}"], 2, Converged(5, 0.02)),
    ("sparse", ["leaving=converged", "leaving.patience=5"], 2, Converged(5, 0.01)),
    ("early_stop", ["leaving.tolerance=0.5"], 2, Converged(8, 0.5)),
    ("early_stop", ["leaving={tolerance: 0.5}"], 2, Converged(8, 0.5)),
    ("early_stop", ["~leaving.patience"], 2, Converged(10, 0.01)),
    ("early_stop", ["leaving=last"], 2, Last()),
    ("early_stop", ["leaving.kind=last"], 2, Last()),
    ("early_stop", ["leaving.kind=last", "leaving.kind=converged"], 2, Converged(10, 0.01)),
    ("early_stop", ["~leaving"], 2, Last()),
    ("early_stop", ["leaving=${oc.env:LEAVING,last}"], 2, Last()),
]


@pytest.mark.parametrize("name", FILES)
def test_the_files_choose(name):
    assert of_files(f"inversion={name}") == FILES[name]


@pytest.mark.parametrize(("name", "words", "place", "expected"), OVERRIDDEN)
def test_an_override_changes_one_choice_and_leaves_nothing_of_another_kind(name, words, place, expected):
    overrides = [re.sub(r"^([+~]?)", r"\1inversion.", each) for each in words]
    correct = list(FILES[name])
    correct[place] = expected
    assert of_files(f"inversion={name}", *overrides) == tuple(correct)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "inversion.leaving.patience=5",
            "inversion.leaving.patience: got 5, allowed: a key of inversion.leaving: kind",
        ),
        ("inversion.leaving=early", "inversion.leaving: got 'early', allowed: converged | last"),
        ("inversion.leaving={kind: early}", "inversion.leaving.kind: got 'early', allowed: converged | last"),
        ("inversion.leaving=null", "inversion.leaving: got None, allowed: converged | last"),
        ("~inversion.leaving.kind", "inversion.leaving.kind: got None, allowed: converged | last"),
    ],
)
def test_an_override_that_cannot_be_is_refused_by_name(override, message):
    assert refusal(load_settings, CONF, [override]) == message


LAYERS = {
    "another kind": ("early_stop", "leaving: {kind: last}", (*SPARSE[:2], Last(), Fixed())),
    "another kind, alone": ("early_stop", "leaving: last", (*SPARSE[:2], Last(), Fixed())),
    "a key of the kind": ("early_stop", "leaving: {patience: 3}", (*SPARSE[:2], Converged(3, 0.01), Fixed())),
    "the same kind": (
        "early_stop", "leaving: {kind: converged, patience: 3}", (*SPARSE[:2], Converged(3, 0.01), Fixed()),
    ),
    "several": (
        "early_stop",
        "background: frozen\nparametrisation: pixels\nstopping: rebirth\nleaving: {kind: last}",
        (PixelsConfig(), Rebirth(), Last(), Fixed()),
    ),
    "twice": ("child", "parametrisation: {kind: pyramid, levels: [2]}", (PyramidConfig((2,), 0.1), *EARLY[1:])),
}  # fmt: skip


@pytest.mark.parametrize("case", LAYERS)
def test_a_file_built_on_another_leaves_nothing_of_another_kind(tmp_path, case):
    base, text, expected = LAYERS[case]
    conf = Path(shutil.copytree(CONF, tmp_path / "conf"))
    frozen = "defaults: [early_stop, _self_]\nbackground: frozen\nparametrisation: {kind: pixels}\n"
    (conf / "inversion" / "child.yaml").write_text(frozen)
    (conf / "inversion" / "own.yaml").write_text(f"defaults: [{base}, _self_]\n{text}\n")
    assert of_files("inversion=own", conf=conf) == expected
    inside = "\n".join(f"  {line}" for line in text.splitlines())
    (conf / "experiment" / "own.yaml").write_text(
        f"# @package _global_\ndefaults:\n  - override /inversion: {base}\ninversion:\n{inside}\n"
    )
    assert of_files("experiment=own", "inversion.planning=fixed", conf=conf) == expected


def test_a_dead_key_in_a_file_is_refused_by_name(tmp_path):
    conf = Path(shutil.copytree(CONF, tmp_path / "conf"))
    (conf / "inversion" / "own.yaml").write_text("defaults: [early_stop, _self_]\nleaving: {kind: last, patience: 3}\n")
    message = "inversion.leaving.patience: got 3, allowed: a key of inversion.leaving: kind"
    assert refusal(load_settings, conf, "inversion=own") == message


def test_all_choices_of_a_run_are_known():
    names = ("parametrisation", "stopping", "leaving", "planning")
    assert list(choice_paths(Settings)) == ["inversion." + name for name in names] + ["distillation.robust"]
    chosen = load_settings(CONF, ["distillation.robust=agreement", "distillation.robust.trigger=null"])
    assert chosen.distillation.robust == Agreement(trigger=None)
    assert kinds_of(Keep | Rebirth) == {"keep": Keep, "rebirth": Rebirth}
    assert kinds_of(int | None) == kinds_of(Keep) == kinds_of(None) == {}
