import io

import pytest
from rich.console import Console

from simulations.measuring import PROJECT
from simulations.rounds import METHODS, draw, overrides_of, print_table
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
    console = Console(file=io.StringIO(), width=110)
    print_table(LINES, console)
    text = console.file.getvalue()
    assert "80.0, 90.0" in text
    assert "five rounds over one: +15.0 points (+10.0, +20.0)" in text


def test_the_picture_is_drawn(tmp_path):
    draw(LINES, tmp_path / "rounds.png")
    assert (tmp_path / "rounds.png").read_bytes().startswith(b"\x89PNG")
