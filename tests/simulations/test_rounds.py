import pytest

from simulations import rounds
from simulations.processes import LaunchError
from simulations.rounds import METHODS, figure, overrides_of, table
from simulations.runner.ledger import PROJECT
from smi_fed.config import load_settings


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_a_configuration_and_all_have_the_same_steps(method):
    base = load_settings(PROJECT / "conf", ["experiment=rounds"])
    found = load_settings(PROJECT / "conf", ["experiment=rounds", *overrides_of(method, base)])
    rounds = 1 if method == "alone" else found.strategy.rounds
    assert found.client.training.steps * rounds == base.client.training.steps * base.strategy.rounds
    assert found.strategy.distillation == (method not in ("FedAvg", "FedProx"))
    if method == "one round":
        assert found.distillation.steps == 5 * base.distillation.steps
        assert found.server.images_per_teacher == 5 * base.server.images_per_teacher


LINES = [
    {"seed": seed, "method": method, "accuracy": values}
    for seed, gain in ((0, 0.0), (1, 0.1))
    for method, values in (("five rounds", [0.4, 0.8 + gain]), ("one round", [0.7]), ("alone", [0.3]))
]


def test_the_table_says_what_rounds_add():
    (found,) = table(LINES)
    assert found.rows[1] == ["five rounds", "85.0", "80.0, 90.0", "40.0"]
    assert found.notes == ["five rounds over one: +15.0 points (+10.0, +20.0)"]


def test_a_run_that_is_missing_is_in_no_difference():
    (found,) = table([each for each in LINES if each["seed"] or each["method"] == "one round"])
    assert found.notes == ["five rounds over one: +20.0 points (+20.0)"]
    assert table(LINES[2:3])[0].notes == []


def test_the_picture_is_drawn(tmp_path):
    figure(LINES).savefig(tmp_path / "rounds.png")
    assert (tmp_path / "rounds.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("distillation.steps=-1", "distillation.steps: got -1"),
        ("strategy.rounds=none", "strategy.rounds"),
        ("model=nonsense", "nonsense"),
        ("model=shapes", "in_chans: got 3"),
        ("server.device=cuda:99", "cuda:99"),
        ("strategy.arguments={mu: 1}", "mu"),
    ],
)
def test_what_cannot_be_is_refused_before_flower_is_started(tmp_path, monkeypatch, capsys, word, says):
    monkeypatch.setattr(rounds, "superlink", lambda: pytest.fail("started"))
    assert rounds.main(["--output", str(tmp_path), word]) == 2
    assert says in capsys.readouterr().err


def test_a_run_that_fails_leaves_the_others_theirs(tmp_path, monkeypatch, capsys):
    def federated(words):
        if "strategy.rounds=1" in words:
            raise LaunchError("a run ended as finished:failed")
        return {"accuracy": [0.5, 0.6]}

    monkeypatch.setattr(rounds, "federated", federated)
    assert rounds.main(["--output", str(tmp_path), "--methods", "one round", "five rounds", "FedAvg"]) == 1
    assert len((tmp_path / "pieces.jsonl").read_text().splitlines()) == 2
    assert "method one round: LaunchError: a run ended as finished:failed" in capsys.readouterr().err
