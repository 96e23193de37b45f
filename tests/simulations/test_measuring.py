import json
import time

import pytest
import torch

from simulations.runner.ledger import environment
from simulations.throughput import measuring
from simulations.throughput.measuring import alternating, matmul_rate, peak_bytes, random_model
from simulations.throughput.naive import NaiveInversion, total_variation
from tests.models import small_vit

CPU = torch.device("cpu")


def test_methods_take_turns_and_the_first_samples_are_dropped():
    calls, ticks = [], []
    times = alternating(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")},
        CPU, repeats=3, warmup=1, inner=2, tick=lambda: ticks.append(0),
    )  # fmt: skip
    assert calls == ["a", "a", "b", "b"] * 4
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3}
    assert len(ticks) == 8


def test_a_sample_is_seconds_of_one_call():
    times = alternating({"sleep": lambda: time.sleep(0.02)}, CPU, repeats=2, warmup=0, inner=3)
    assert all(0.02 <= seconds < 0.1 for seconds in times["sleep"])


@pytest.mark.parametrize(("copies", "together"), [(1, 1), (3, 3), (3, 1)])
def test_peak_memory_is_what_was_held_at_once(copies, together):
    def call():
        held = []
        for _ in range(copies):
            held.append(torch.ones(1000, 1000))
            if together == 1:
                held.clear()

    assert peak_bytes(call, CPU) == pytest.approx(4_000_000 * together, rel=0.01)


def test_the_matmul_rate_is_the_best_sizes_median(monkeypatch):
    seconds = iter([[3.0, 1.0, 2.0], [4.0, 90.0, 4.0]])  # of products that take as long as they like here
    monkeypatch.setattr(measuring, "alternating", lambda methods, *_, **__: {name: next(seconds) for name in methods})
    assert matmul_rate(CPU, torch.float32, (64, 128)) == max(2 * 64**3 / 2, 2 * 128**3 / 4)
    monkeypatch.undo()
    assert matmul_rate(CPU, torch.float32, (64,), repeats=3) > 0


def test_an_environment_is_json_and_names_the_device():
    found = json.loads(json.dumps(environment(CPU)))
    assert found["device"] == "cpu"
    assert found["device_name"]
    assert found["versions"]["torch"] in torch.__version__
    assert found["threads"] == torch.get_num_threads()


def test_a_random_model_prefers_some_classes():
    model = random_model("vit_tiny_patch16_224", CPU, 7)
    with torch.no_grad():
        assert float(model(torch.rand(4, 3, 224, 224)).std(1).mean()) > 1


def test_naive_does_what_public_code_does():
    model = small_vit()
    naive = NaiveInversion(model, torch.tensor([0, 1]))
    before = naive.images.detach().clone()
    naive.step()
    tokens = 1 + 16
    assert [tuple(map_.shape) for map_ in naive.maps] == [(2, 2, tokens, tokens)] * 2
    assert all(torch.allclose(map_.sum(-1), torch.ones(())) for map_ in naive.maps)
    assert all(weight.grad is not None for weight in naive.vit.parameters())
    assert all(weight.grad is None for weight in model.parameters())
    assert not torch.equal(naive.images, before)


def test_naive_lowers_its_loss():
    torch.manual_seed(0)
    naive = NaiveInversion(small_vit(), torch.tensor([0, 1]))
    naive.step()
    first = naive.best_loss
    for _ in range(30):
        naive.step()
    assert naive.best_loss < 0.8 * first


def test_total_variation_of_an_edge():
    image = torch.zeros(1, 1, 4, 4)
    image[..., 2:] = 1  # four rows have one step to the right; each diagonal crosses it three times
    assert float(total_variation(image)) == pytest.approx(4**0.5 + 0 + 2 * 3**0.5)
