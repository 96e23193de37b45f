"""The way of overrides: a user's words, `flwr run`'s configuration, Hydra, settings."""

import re
from pathlib import Path

import pytest
from flwr.common.config import parse_config_args
from flwr.common.serde import user_config_from_proto, user_config_to_proto
from hypothesis import example, given
from hypothesis import strategies as st

from simulations.superlink import toml
from smi_fed.checks import SettingError
from smi_fed.config import compose, join_overrides, load_settings, quoted, split_overrides

CONF = Path(__file__).resolve().parents[1] / "conf"
AWKWARD = [
    "it's", 'a "b" c', "C:\\data\\", "\\\\server\\x", "\\'", '\\"', "a:b,c=d", "{a: [b", ")]}", "größe/数字/🙂", "",
    " ", "a\nb", "\t", "null", "???", "$HOME", "50%", "#", "x.toml", "' output=\"y\"", "\\u0022", "a\x7f\x00", "'\\",
]  # fmt: skip


def through_flower(**config):
    """What an app finds in its run config after `flwr run --run-config`, as `SuperLink.run` writes it."""
    text = " ".join(f"{key.replace('_', '-')}={toml(value)}" for key, value in config.items())
    return user_config_from_proto(user_config_to_proto(parse_config_args([text])))


def readable(text):
    """As a text that Hydra does not fill in; ${...} is its own syntax."""
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", text)


TEXTS = st.text(st.characters(codec="utf-8"))


@given(TEXTS, TEXTS)
@example("a", '" x="1')
def test_flower_hands_on_any_text(first, second):
    assert through_flower(overrides=first, client_state=second) == {"overrides": first, "client-state": second}


@given(st.lists(st.text()))
@example(AWKWARD)
def test_words_come_back_as_they_were(words):
    assert split_overrides(through_flower(overrides=join_overrides(words))["overrides"]) == words


@pytest.mark.parametrize("lines", [False, True], ids=["a text", "a JSON list"])
def test_texts_reach_their_settings_unchanged(lines):
    texts = [each for each in [*AWKWARD, "${oc.env:HOME}", "\\${x}'"] if lines or "\n" not in each]
    words = ["data=folder", *(f"+strategy.arguments.k{i}={quoted(readable(text))}" for i, text in enumerate(texts))]
    sent = through_flower(overrides=join_overrides(words))["overrides"] if lines else " ".join(words)
    found = compose(CONF, split_overrides(sent))
    assert list(found["strategy"]["arguments"].values()) == texts


@given(st.text(st.sampled_from("a'\"\\ :,=[]{}()$ü.\n\t%#")))
@example("\\\n")
def test_hydra_reads_what_was_quoted(text):
    from hydra.core.override_parser.overrides_parser import OverridesParser

    assert OverridesParser.create().parse_override(f"a={quoted(text)}").value() == text


def test_what_hydra_would_not_read_is_a_text():
    texts = ["it's", 'a "b" c', "10:0.3,20:0.3", "größe/数字", "/a b/c", "[2,4", "(b)", "a#b;c&d", "'", "choice(a,b)"]
    words = [f"+strategy.arguments.k{i}={text}" for i, text in enumerate(texts)]
    found = compose(CONF, split_overrides(join_overrides(words)))
    assert list(found["strategy"]["arguments"].values()) == texts


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", []), ("  ", []), ("a=1", ["a=1"]), (" a=1\n b=2 ", ["a=1", "b=2"]), ("a=it's b=1", ["a=it's", "b=1"]),
        ("a='x y' b=\"x y\"", ["a='x y'", 'b="x y"']), (r"a='it\'s x' b=1", [r"a='it\'s x'", "b=1"]),
        ("a=[[1, 2], [3, 4]] b={c: {d: 1}, e: 2}", ["a=[[1, 2], [3, 4]]", "b={c: {d: 1}, e: 2}"]),
        ("a=']' b=1", ["a=']'", "b=1"]), ("a=} b=1", ["a=}", "b=1"]), ('["a=x y", "b=\'"]', ["a=x y", "b='"]),
    ],
)  # fmt: skip
def test_a_text_of_overrides_is_split(text, words):
    assert split_overrides(text) == words


@pytest.mark.parametrize("text", ["a=[1 b=2", "a={b", '["a=1"', "[1]", '[["a"]]', "[null]", "[a=1]"])
def test_a_text_that_cannot_be_split_is_refused(text):
    with pytest.raises(SettingError, match="overrides: got .* a JSON list") as error:
        load_settings(CONF, text)
    assert error.value.got == text


def test_values_of_all_kinds_keep_their_kinds():
    words = ["seed=3", "inversion.schedule=2:0.3,5:0.3", "data=folder", "data.name=/a b/c",
             "inversion.parametrisation.levels=[2, 4]",
             "+strategy.arguments={proximal_mu: 0.1, note: 'a b'}"]  # fmt: skip
    for overrides in (words, join_overrides(words)):
        settings = load_settings(CONF, overrides)
        assert (settings.seed, settings.data.name, settings.inversion.parametrisation.levels) == (3, "/a b/c", (2, 4))
        assert str(settings.inversion.schedule) == "2:0.3,5:0.3"
        assert settings.strategy.arguments == {"proximal_mu": 0.1, "note": "a b"}
    assert load_settings(CONF, join_overrides(["inversion.schedule=''"])).inversion.schedule.stops == ()
    assert load_settings(CONF, "inversion.schedule='2:0.3,5:0.3'") == load_settings(CONF, words[1:2])
