from pathlib import Path

import pytest
import yaml

from smi_fed.checks import SettingError
from smi_fed.config import compose, join_overrides, load_settings

CONF = Path(__file__).resolve().parents[1] / "conf"
FILES = sorted(CONF.rglob("*.yaml"))


def override_for(path):
    group = path.relative_to(CONF).parts
    return "" if len(group) == 1 else f"{group[0]}={path.stem}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(CONF)))
def test_every_yaml_loads_and_is_valid(path):
    settings = load_settings(CONF, override_for(path))
    assert settings.inversion.iterations > 0
    assert yaml.safe_load(path.read_text())


def test_a_value_reaches_its_dataclass():
    settings = load_settings(CONF, "seed=7 inversion=dense distillation.steps=12 data.alpha=1")
    assert (settings.seed, str(settings.inversion.schedule), settings.distillation.steps) == (7, "", 12)
    assert settings.data.alpha == 1.0


def test_the_papers_preset_is_the_papers():
    from smi_fed.inversion import InversionConfig

    assert load_settings(CONF, "inversion=paper").inversion == InversionConfig.paper()


def test_dense_and_attention_differ_from_sparse_in_one_thing():
    sparse, dense, attention = (
        compose(CONF, [f"inversion={n}"])["inversion"] for n in ("sparse", "dense", "attention")
    )
    assert {k for k in sparse if sparse[k] != dense[k]} == {"schedule"}
    assert {k for k in sparse if sparse[k] != attention[k]} == {"selection"}


@pytest.mark.parametrize("name", ["compare", "rounds", "warm_start", "mixed", "methods"])
def test_studies_keep_their_method_whatever_the_default_is(name):
    inversion = load_settings(CONF, f"experiment={name}").inversion
    assert (inversion.selection, inversion.rebirth) == ("random", False)
    if name != "methods":
        assert inversion.background == "frozen"
    assert load_settings(CONF, f"experiment={name} inversion=dense").inversion.rebirth is False


def test_quoted_overrides_survive():
    settings = load_settings(CONF, "inversion.schedule='10:0.3,20:0.3' data=folder data.name='/a b/c'")
    assert settings.data.name == "/a b/c"
    assert str(settings.inversion.schedule) == "10:0.3,20:0.3"


def test_a_shells_words_become_one_string():
    words = [
        "seed=3",
        "inversion.schedule=10:0.3,20:0.3",
        "data=folder",
        "data.name=/a b/c",
        "inversion.levels=[2,4]",
    ]
    settings = load_settings(CONF, join_overrides(words))
    assert (settings.seed, settings.data.name, settings.inversion.levels) == (3, "/a b/c", (2, 4))
    assert str(settings.inversion.schedule) == "10:0.3,20:0.3"
    assert load_settings(CONF, join_overrides(["inversion.schedule=''"])).inversion.schedule.stops == ()


def test_the_first_mistake_of_several_overrides_is_named():
    with pytest.raises(SettingError, match="inversion.iteratons") as error:
        load_settings(CONF, "seed=1 inversion.iteratons=3 data.alpha=2")
    assert "inversion.iterations" in error.value.allowed


def test_an_unreadable_override_is_refused():
    with pytest.raises(SettingError, match="seed"):
        load_settings(CONF, "seed")
    with pytest.raises(SettingError, match="nonsense: got 3"):
        load_settings(CONF, "+nonsense=3")


@pytest.mark.parametrize("path", [p for p in FILES if p.parent.name in ("data", "inversion", "distillation")], ids=str)
def test_every_field_can_be_overridden(path):
    group = path.parent.name
    config = load_settings(CONF, override_for(path))
    assert set(compose(CONF, [override_for(path)])[group]) == set(vars(getattr(config, group)))


def test_every_client_server_and_strategy_field_can_be_overridden():
    composed, settings = compose(CONF, []), load_settings(CONF)
    for group in ("client", "server", "strategy", "admission", "pool"):
        assert set(composed[group]) == set(vars(getattr(settings, group)))
    assert set(composed["client"]["training"]) == set(vars(settings.client.training))
