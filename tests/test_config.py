from contextlib import suppress
from copy import deepcopy
from dataclasses import asdict
from functools import cache
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from smi_fed.checks import SettingError, read
from smi_fed.config import Settings, compose, load_settings
from smi_fed.inversion import InversionConfig, Keep
from smi_fed.models import ModelSpec
from smi_fed.policy import DEFAULT_ARCHITECTURES, AdmissionPolicy

CONF = Path(__file__).resolve().parents[1] / "conf"
FILES = sorted(CONF.rglob("*.yaml"))
COMPOSED = compose(CONF, [])
CHOICES = {
    "parametrisation": "pixels | pyramid", "stopping": "keep | rebirth", "leaving": "converged | last",
    "planning": "adaptive | fixed", "robust": "agreement | mean | median | trimmed",
}  # fmt: skip


@cache
def loaded(override):
    return load_settings(CONF, override)


def override_for(path):
    group = path.relative_to(CONF).parts
    return "" if len(group) == 1 else f"{group[0]}={path.stem}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(CONF)))
def test_every_yaml_loads_and_is_valid(path):
    settings = loaded(override_for(path))
    assert settings.inversion.iterations > 0
    assert yaml.safe_load(path.read_text())


def test_a_value_reaches_its_dataclass():
    settings = load_settings(CONF, "seed=7 inversion=dense distillation.steps=12 data.alpha=1")
    assert (settings.seed, str(settings.inversion.schedule), settings.distillation.steps) == (7, "", 12)
    assert settings.data.alpha == 1.0


def test_the_papers_preset_is_the_papers():
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
    assert (inversion.selection, inversion.stopping) == ("random", Keep())
    if name != "methods":
        assert inversion.background == "frozen"
    assert load_settings(CONF, f"experiment={name} inversion=dense").inversion.stopping == Keep()


def test_the_first_mistake_of_several_overrides_is_named():
    with pytest.raises(SettingError, match="inversion.iteratons") as error:
        load_settings(CONF, "seed=1 inversion.iteratons=3 data.alpha=2")
    assert "inversion.iterations" in error.value.allowed


def test_a_mistake_is_looked_for_beside_the_files_that_are_chosen():
    """`model.clients.resnet10t` is a key of model=mixed alone."""
    with pytest.raises(SettingError, match=r"server\.thread: got '2', allowed: a key of the configuration"):
        load_settings(CONF, ["model.clients.resnet10t.start=null", "server.thread=2", "model=mixed"])


def test_an_unreadable_override_is_refused():
    with pytest.raises(SettingError, match="seed"):
        load_settings(CONF, "seed")
    with pytest.raises(SettingError, match="nonsense: got 3"):
        load_settings(CONF, "+nonsense=3")


@pytest.mark.parametrize("path", [p for p in FILES if p.parent.name in ("data", "inversion", "distillation")], ids=str)
def test_every_field_can_be_overridden(path):
    group = path.parent.name
    config = loaded(override_for(path))
    composed = compose(CONF, [override_for(path)])[group]
    assert set(composed) == set(vars(getattr(config, group)))
    for choice in CHOICES.keys() & composed.keys():
        assert set(composed[choice]) == set(vars(getattr(getattr(config, group), choice)))


def test_every_client_server_and_strategy_field_can_be_overridden():
    composed, settings = compose(CONF, []), load_settings(CONF)
    for group in ("client", "server", "strategy", "admission", "pool"):
        assert set(composed[group]) == set(vars(getattr(settings, group)))
    assert set(composed["client"]["training"]) == set(vars(settings.client.training))


def places(node, path=()):
    """Paths of all keys below `node`."""
    for key, value in node.items() if isinstance(node, dict) else ():
        yield (*path, key)
        yield from places(value, (*path, key))


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
KEYS = st.text(max_size=3) | st.sampled_from(["steps", "name", "num_classes", "kwargs", "seed"]) | st.integers()
JSON_LIKE = st.recursive(SCALARS, lambda x: st.lists(x, max_size=3) | st.dictionaries(KEYS, x, max_size=3))


@given(
    st.lists(st.tuples(st.sampled_from(sorted(places(COMPOSED))), KEYS | st.none(), JSON_LIKE), min_size=1, max_size=3)
)
def test_any_value_anywhere_makes_settings_or_a_setting_error(changes):
    values = deepcopy(COMPOSED)
    for path, extra, value in changes:
        node = values
        for key in path[:-1]:
            node = node[key] if isinstance(node, dict) and isinstance(node.get(key), dict) else {}
        node[path[-1]] = value
        if extra is not None and isinstance(value, dict):
            value[extra] = 3
    with suppress(SettingError):
        made = read(Settings, values)
        assert read(Settings, asdict(made)) == made


@settings(deadline=None, max_examples=10)  # each is several compositions
@given(st.sampled_from(sorted(places(COMPOSED))), st.sampled_from(["", "+", "++", "~"]), st.text(max_size=8))
def test_any_override_makes_settings_or_a_setting_error(path, sign, value):
    with suppress(SettingError):
        assert isinstance(load_settings(CONF, [f"{sign}{'.'.join(path)}={value}"]), Settings)


def at(path):
    node = COMPOSED
    for key in path:
        node = node[key]
    return node


@pytest.mark.parametrize("path", [p for p in places(COMPOSED) if isinstance(at(p), dict)], ids=".".join)
def test_null_is_no_group(path):
    values = deepcopy(COMPOSED)
    node = values
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = None
    with pytest.raises(SettingError) as error:
        read(Settings, values)
    allowed = CHOICES.get(path[-1], "a mapping")
    assert str(error.value) == f"{'.'.join(path)}: got None, allowed: {allowed}"


@pytest.mark.parametrize(
    ("group", "override"),
    [
        ("inversion", "{}=null"), ("data", "~{}"), ("model", "{}=3"), ("distillation", "~{}"), ("strategy", "{}=null"),
        ("client", "{}=3"), ("pool", "~{}"), ("pool", "{}=null"), ("admission", "{}=null"), ("admission", "~{}"),
    ],
)  # fmt: skip
def test_a_group_cannot_be_taken_away(group, override):
    if (group, override) == ("pool", "~{}"):
        assert load_settings(CONF, "~pool") == load_settings(CONF)
        return
    with pytest.raises(SettingError) as error:
        load_settings(CONF, [override.format(group)])
    assert error.value.key == group


def test_no_arguments_of_a_strategy_are_none():
    assert load_settings(CONF, "strategy.arguments=null").strategy.arguments == {}


def test_all_faults_of_a_configuration_are_told_at_once():
    with pytest.raises(SettingError) as error:
        load_settings(CONF, "inversion.iterations=0 data.alpha=-1 client.training.betas=[1] +pool.imges=3")
    assert str(error.value).split("; ") == [
        "data.alpha: got -1, allowed: a number > 0",
        "client.training.betas: got [1], allowed: two numbers in [0, 1)",
        "inversion.iterations: got 0, allowed: an int >= 1",
        "pool.imges: got 3, allowed: a key of pool: images",
    ]


SPEC = ModelSpec("resnet10t", 3)


def test_architectures_that_are_let_in():
    assert load_settings(CONF).admission == AdmissionPolicy()
    assert load_settings(CONF, "admission.architectures=[]").admission.architectures == DEFAULT_ARCHITECTURES
    assert load_settings(CONF, "admission.architectures=[resnet18]").admission.architectures == ("resnet18",)
    with pytest.raises(SettingError) as error:
        load_settings(CONF, "admission.architectures=[resnet18,resnet1,hf-hub:a/b,3]")
    assert [each.key for each in (error.value, *error.value.more)] == [
        f"admission.architectures.{i}" for i in (1, 2, 3)
    ]
    assert error.value.allowed.startswith("a timm model name, such as ")
