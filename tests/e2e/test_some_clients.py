"""Rounds in which only some clients are asked: each goes on from the last model that it trained."""

from collections import defaultdict
from itertools import pairwise

import pytest
import torch

import clients.app
from clients.app import app
from server.run import FederatedRun
from simulations.local_grid import InProcessGrid
from smi_fed.config import load_settings
from tests.e2e.test_app import CONF, SMOKE, nodes

HALF = f"{SMOKE} strategy.rounds=3 strategy.arguments={{fraction_train:0.5,min_train_nodes:2}}"


@pytest.mark.usefixtures("uncounted")
@pytest.mark.parametrize("directory", [False, True])
def test_a_client_goes_on_from_its_own_newest_model(tmp_path, monkeypatch, directory):
    found, train, train_round = defaultdict(list), clients.app.train, clients.app.train_round
    asked = []

    def copy(model):
        return {key: value.clone() for key, value in model.state_dict().items()}

    def watched_round(settings, number, spec, data, request, *more):
        asked.append((request.round, number))
        return train_round(settings, number, spec, data, request, *more)

    def watched_train(model, *arguments, **options):
        server_round, number = asked[-1]
        before = copy(model)
        loss = train(model, *arguments, **options)
        found[number].append((server_round, before, copy(model)))
        return loss

    monkeypatch.setattr(clients.app, "train_round", watched_round)
    monkeypatch.setattr(clients.app, "train", watched_train)
    monkeypatch.setattr("random.sample", lambda all_nodes, count: [sorted(all_nodes)[i] for i in plan.pop(0)][:count])
    plan = [(0, 1), (0, 2), (0, 1)]  # client 1 is asked in rounds 1 and 3 only, client 0 has two models by then
    config = {"overrides": HALF} | ({"client-state": str(tmp_path / "own")} if directory else {})
    run = FederatedRun(load_settings(CONF, HALF), tmp_path / "out")
    run.execute(InProcessGrid(app, nodes(4), config))
    rounds = {number: [each for each, *_ in trained] for number, trained in found.items()}
    assert rounds == {0: [1, 2, 3], 1: [1, 3], 2: [2]}
    for trained in found.values():
        for (_, _, after), (_, before, _) in pairwise(trained):
            assert all(torch.equal(before[key], value) for key, value in after.items())
    first, last = found[1]
    assert any(not torch.equal(first[1][key], value) for key, value in last[1].items())  # training moved it
