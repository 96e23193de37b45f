"""Which weights are trained, how fast, and when training stops."""

import copy
from contextlib import suppress
from itertools import pairwise

import pytest
import torch
from torch import nn

from smi_fed.checks import SettingError
from smi_fed.models import ModelSpec, adapt, build_model
from smi_fed.training import Optimiser, TrainingConfig
from smi_fed.tuning import Best, decayed_groups, only_trained, trained_weights, training_mode
from tests.models import TOKEN_MODELS, masked_model, small_vit, token_model


def names_of(model, trainable):
    chosen = {id(weight) for weight in trained_weights(model, trainable)}
    return {name.removeprefix("backbone.") for name, weight in model.named_parameters() if id(weight) in chosen}


def test_the_layers_of_a_vit():
    model = small_vit(depth=3)
    every = {name for name, _ in model.backbone.named_parameters()}
    head, last = {"head.weight", "head.bias"}, {"norm.weight", "norm.bias"}
    blocks = [{name for name in every if name.startswith(f"blocks.{number}.")} for number in range(3)]
    assert names_of(model, "all") == every
    assert names_of(model, "head") == head
    assert names_of(model, "last:1") == head | last | blocks[2]
    assert names_of(model, "last:2") == head | last | blocks[2] | blocks[1]
    assert names_of(model, "last:3") == every - {
        "cls_token",
        "pos_embed",
        "patch_embed.proj.weight",
        "patch_embed.proj.bias",
    }


@pytest.mark.parametrize("model", [small_vit, lambda: torch.compile(small_vit()), lambda: nn.DataParallel(small_vit())])
def test_wrappers_are_seen_through(model):
    assert len(trained_weights(model(), "last:1")) == 16


@pytest.mark.parametrize("kind", [*TOKEN_MODELS, "swin", "resnet"])
def test_more_layers_are_more_weights(kind):
    model = token_model(kind) if kind in TOKEN_MODELS else masked_model(kind)
    chosen = [{id(weight) for weight in trained_weights(model, each)} for each in ("head", "last:1", "last:2", "all")]
    assert chosen[0]
    assert all(few < many for few, many in pairwise(chosen))


@pytest.mark.parametrize("count", [3, 4, 99])
def test_more_layers_than_there_are(count):
    with pytest.raises(
        SettingError, match=f"^trainable: got 'last:{count}', allowed: all | head | last:N with N from 1 to 2,"
    ):
        trained_weights(small_vit(), f"last:{count}")


def test_a_module_that_does_not_say_its_layers():
    module = nn.Sequential(nn.Flatten(), nn.Linear(48, 8), nn.ReLU(), nn.Linear(8, 3))
    model = adapt(module, image_size=4, num_classes=3)
    assert names_of(model, "head") == {"3.weight", "3.bias"}
    with pytest.raises(SettingError, match="^trainable: got 'last:1', allowed: all | head, since Sequential"):
        trained_weights(model, "last:1")


def test_what_is_frozen_stays_as_it_was_and_batch_norms_too():
    model = build_model(ModelSpec("resnet10t", 5, 32))
    next(model.parameters()).requires_grad_(False)
    needed = [weight.requires_grad for weight in model.parameters()]
    before = copy.deepcopy(model.state_dict())
    with only_trained(model, "head"):
        training_mode(model, "head")
        optimiser = Optimiser(model, TrainingConfig(optimiser="adamw", learning_rate=0.1))
        optimiser.step(model(torch.rand(4, 3, 32, 32)).square().mean())
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {"backbone.fc.weight", "backbone.fc.bias"}
    assert [weight.requires_grad for weight in model.parameters()] == needed


def test_all_trains_batch_norms_too():
    model = build_model(ModelSpec("resnet10t", 5, 32))
    before = model.backbone.bn1.running_mean.clone()
    with only_trained(model, "all"):
        training_mode(model, "all")
        model(torch.rand(4, 3, 32, 32))
    assert not torch.equal(model.backbone.bn1.running_mean, before)


def test_gradients_are_needed_as_before_after_an_exception():
    model = small_vit()
    with suppress(KeyError), only_trained(model, "head"):
        assert not model.backbone.cls_token.requires_grad
        raise KeyError
    assert all(weight.requires_grad for weight in model.parameters())


def test_rates_fall_from_layer_to_layer():
    model = small_vit(depth=2)
    names = {id(weight): name for name, weight in model.backbone.named_parameters()}
    rates, decays = {}, {}
    for group in decayed_groups(model, 0.1, 0.5, 0.05):
        for weight in group["params"]:
            rates[names[id(weight)]], decays[names[id(weight)]] = group["lr"], group["weight_decay"]
    assert rates.keys() == set(names.values())
    expected = {"head.weight": 0.1, "norm.bias": 0.05, "blocks.1.attn.qkv.weight": 0.05, "blocks.0.mlp.fc1.bias": 0.025,
              "patch_embed.proj.weight": 0.0125, "cls_token": 0.0125}  # fmt: skip
    assert {name: rates[name] for name in expected} == pytest.approx(expected)
    assert (decays["head.weight"], decays["head.bias"], decays["pos_embed"], decays["norm.weight"]) == (0.05, 0, 0, 0)


def test_the_optimiser_keeps_those_proportions():
    model, config = small_vit(), TrainingConfig.finetune(layer_decay=0.5, steps=10, warmup=0.2, learning_rate=0.1)
    optimiser = Optimiser(model, config)
    (part,) = optimiser.parts
    assert type(part) is torch.optim.AdamW
    peaks = []
    for _ in range(10):
        peaks.append(sorted({group["lr"] for group in part.param_groups}))
        optimiser.step(model(torch.rand(2, 3, 16, 16)).square().mean())
    assert max(peaks) == pytest.approx([0.0125, 0.025, 0.05, 0.1])


def test_the_best_weights_come_back():
    model = nn.BatchNorm1d(2)
    best, seen = Best(model, patience=2), []
    for loss in (3.0, 1.0, 2.0, float("nan"), 0.5):
        with torch.no_grad():
            model.weight.fill_(loss)
            model.running_mean.fill_(loss)
        seen.append(best.done(loss))
    assert seen == [False, False, False, True, False]
    best.restore()
    assert (model.weight.tolist(), model.running_mean.tolist()) == ([0.5, 0.5], [0.5, 0.5])


def test_without_a_look_nothing_comes_back():
    model = nn.Linear(2, 2)
    before = model.weight.clone()
    Best(model, 1).restore()
    assert torch.equal(model.weight, before)
