"""What a client keeps of its own model between rounds, also where it is not asked in each."""

from types import SimpleNamespace

import pytest
import torch
from flwr.app import RecordDict

from clients.rounds import OwnModels
from smi_fed.checks import SettingError
from smi_fed.files import FileFormatError
from tests.models import small_vit


def context(directory=""):
    return SimpleNamespace(run_config={"client-state": str(directory)}, state=RecordDict())


def same(weights, model):
    return all(torch.equal(weights[key], value) for key, value in model.state_dict().items())


def kept(tmp_path):
    return sorted(path.name for path in (tmp_path / "client-1").iterdir())


def test_a_model_is_kept_in_the_context_or_in_a_directory(tmp_path):
    model = small_vit(seed=1)
    for own in (OwnModels(context(), 1), OwnModels(context(tmp_path), 1)):
        assert own.newest_before(1, model) is None
        own.save(1, "question", model, 0.5)
        assert same(own.newest_before(2, model), model)


@pytest.mark.parametrize("directory", [False, True])
def test_a_client_that_was_not_asked_goes_on_from_its_newest_model(tmp_path, directory):
    where, first, fourth = context(tmp_path if directory else ""), small_vit(seed=1), small_vit(seed=4)
    OwnModels(where, 1).save(1, "q", first, 0.5)
    assert same(OwnModels(where, 1).newest_before(4, small_vit()), first)
    OwnModels(where, 1).save(4, "q", fourth, 0.25)
    assert same(OwnModels(where, 1).newest_before(9, small_vit()), fourth)


def test_a_round_that_is_asked_again_goes_on_from_where_it_did(tmp_path):
    """A server that was killed in round 4 and asks something else there: round 1 is still what was before."""
    first, own = small_vit(seed=1), OwnModels(context(tmp_path), 1)
    own.save(1, "q", first, 0.5)
    own.save(4, "q", small_vit(seed=4), 0.5)
    assert kept(tmp_path) == ["round1.safetensors", "round4.safetensors"]
    assert same(own.newest_before(4, first), first)
    own.save(11, "q", small_vit(seed=4), 0.5)
    assert kept(tmp_path) == ["round11.safetensors", "round4.safetensors"]


def test_a_server_that_goes_back_leaves_no_later_models_behind(tmp_path):
    own, models = OwnModels(context(tmp_path), 1), [small_vit(seed=number) for number in range(6)]
    for number in (1, 3, 5):
        own.save(number, "q", models[number], 0.5)
    own.save(4, "another", models[4], 0.5)
    assert kept(tmp_path) == ["round3.safetensors", "round4.safetensors"]
    assert same(own.newest_before(6, models[4]), models[4])
    own.save(1, "another", models[1], 0.5)
    assert kept(tmp_path) == ["round1.safetensors"]


def test_only_the_very_same_question_is_answered_from_memory(tmp_path):
    model = small_vit(seed=2)
    OwnModels(context(tmp_path), 1).save(2, "question", model, 0.25)
    again = OwnModels(context(tmp_path), 1)
    weights, loss = again.answer(2, "question", model)
    assert loss == 0.25
    assert same(weights, model)
    assert again.answer(2, "another", model) is None
    assert again.answer(3, "question", model) is None
    assert OwnModels(context(tmp_path), 2).answer(2, "question", model) is None
    assert OwnModels(context(), 1).answer(2, "question", model) is None


def test_what_others_put_there_is_left_alone(tmp_path):
    own, model = OwnModels(context(tmp_path), 1), small_vit(seed=1)
    own.save(1, "q", model, 0.5)
    others = ["round7.txt", ".round8.safetensors", "rounds.safetensors", "myround9.safetensors"]
    for name in others:
        (tmp_path / "client-1" / name).write_text("something else")
    assert same(own.newest_before(10, model), model)
    own.save(2, "q", model, 0.5)
    assert set(others) < set(kept(tmp_path))


@pytest.mark.parametrize(
    "damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: data[:-1] + b"x"]
)
def test_a_damaged_newest_model_is_named_and_no_older_one_taken(tmp_path, damage):
    own, model = OwnModels(context(tmp_path), 1), small_vit()
    own.save(1, "q", model, 0.5)
    own.save(3, "q", model, 0.5)
    path = tmp_path / "client-1" / "round3.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    for read in (lambda: own.newest_before(5, model), lambda: own.answer(3, "q", model)):
        with pytest.raises(FileFormatError, match=r"client-1/round3.safetensors: .*remove it or choose another"):
            read()
    path.unlink()
    assert same(own.newest_before(5, model), model)


def test_a_model_of_another_architecture_is_named(tmp_path):
    own = OwnModels(context(tmp_path), 1)
    own.save(1, "q", small_vit(depth=2), 0.5)
    with pytest.raises(FileFormatError, match=r"round1.safetensors: weights of another model than vit_"):
        own.newest_before(2, small_vit(depth=3))


def test_a_relative_directory_is_refused():
    with pytest.raises(SettingError, match="client-state: got 'here', allowed: an absolute path"):
        OwnModels(context("here"), 1)
