"""Presets: from a tiny pretrained file to a model of other classes."""

import logging
from collections import Counter
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from smi_fed.config import load_settings
from smi_fed.data import ImageSet
from smi_fed.distillation import DistillationConfig
from smi_fed.models import ModelSpec, build_model
from smi_fed.training import TrainingConfig, accuracy, draw_rows, even_shares, held_out, loss_over, train
from tests.models import TINY, small_vit

CONF = Path(__file__).parents[1] / "conf"


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def toys(count=80, seed=0, classes=2):
    """Noise, brighter from class to class."""
    labels = torch.arange(count) % classes
    noise = torch.rand(count, 3, 16, 16, generator=seeded(seed))
    return ImageSet(0.3 * noise + 0.7 * labels.view(-1, 1, 1, 1) / (classes - 1), labels, tuple("abcdefg"[:classes]))


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A tiny ViT that was trained on three classes."""
    model, path = small_vit(num_classes=3), tmp_path_factory.mktemp("start") / "vit.safetensors"
    train(model, toys(classes=3), TrainingConfig(steps=60, batch_size=16), generator=seeded())
    save_file(model.backbone.state_dict(), path)
    return path


def fresh(start, classes=2):
    torch.manual_seed(0)
    return build_model(ModelSpec("vit_tiny_patch16_224", classes, kwargs=TINY, start=start))


@pytest.mark.parametrize("way", ["finetune", "head"])
def test_a_pretrained_model_learns_other_classes(start, way):
    model = fresh(start)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    config = getattr(TrainingConfig, way)(batch_size=16, learning_rate=0.01, augmentation="none")
    train(model, toys(), config, generator=seeded())
    assert accuracy(model, toys(200, seed=1)) > 0.95
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert (changed == {"backbone.head.weight", "backbone.head.bias"}) == (way == "head")
    assert not model.training


@pytest.mark.parametrize("augmentation", ["none", "standard", "randaugment"])
def test_same_generator_same_weights(start, augmentation):
    config = TrainingConfig.finetune(epochs=2.0, batch_size=16, augmentation=augmentation)
    found = []
    for seed, state in ((3, 0), (3, 1), (4, 0)):
        model = fresh(start)
        torch.manual_seed(state)
        train(model, toys(), config, generator=seeded(seed))
        found.append(torch.cat([weight.flatten() for weight in model.parameters()]))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize(
    ("steps", "epochs", "expected"), [(7, None, 7), (7, 10.0, 7), (99, 2.0, 10), (99, 0.5, 3), (99, 0.01, 1)]
)
def test_steps_and_epochs_are_both_bounds(start, steps, epochs, expected):
    taken = []
    config = TrainingConfig(steps=steps, epochs=epochs, batch_size=16, optimiser="adamw")
    train(fresh(start), toys(80), config, generator=seeded(), progress=lambda step, _: taken.append(step))
    assert taken == list(range(1, expected + 1))


def test_bfloat16_is_only_where_it_is_asked_for(start):
    seen = {}
    for precision in ("float32", "bfloat16"):
        model, config = fresh(start), TrainingConfig.finetune(steps=2, batch_size=8, precision=precision)

        def watch(_module, _images, output, key=precision):
            seen[key] = output.dtype

        handle = model.backbone.blocks[0].mlp.fc1.register_forward_hook(watch)
        train(model, toys(), config, generator=seeded())
        handle.remove()
        assert {weight.dtype for weight in model.parameters()} == {torch.float32}
        assert bool(torch.cat([weight.flatten() for weight in model.parameters()]).isfinite().all())
    assert seen == {"float32": torch.float32, "bfloat16": torch.bfloat16}


def test_each_class_is_drawn_as_often():
    labels = torch.tensor([0] * 90 + [2] * 9 + [5])
    rows = draw_rows(100, 30_000, even_shares(labels), seeded())
    assert Counter(labels[rows].tolist()) == pytest.approx({0: 10_000, 2: 10_000, 5: 10_000}, rel=0.03)
    assert len(set(rows.tolist())) == 100


@pytest.mark.parametrize("share", [0.0, 0.1, 0.25, 0.9])
def test_the_held_out_share_is_of_each_class(share):
    labels = torch.tensor([0] * 40 + [1] * 20 + [2] * 3)
    shown, held = held_out(labels, share, seeded())
    assert sorted([*shown.tolist(), *held.tolist()]) == list(range(63))
    assert Counter(labels[held].tolist()) == Counter(
        {c: n for c, n in enumerate(int(share * k) for k in (40, 20, 3)) if n}
    )
    if share:
        assert not torch.equal(held, held_out(labels, share, seeded(1))[1])


def test_nothing_held_out_is_no_draw():
    generator = seeded()
    held_out(torch.zeros(9, dtype=torch.long), 0.0, generator)
    assert torch.equal(generator.get_state(), seeded().get_state())


def test_it_stops_early_with_the_best_weights(start, caplog):
    """Labels of the images to learn from are turned, so that the held-out loss only rises."""
    data = toys(80)
    config = TrainingConfig(
        steps=400, batch_size=8, optimiser="adamw", learning_rate=0.01, validation=0.2, patience=2, warmup=0.01
    )
    shown, held = held_out(data.labels, 0.2, seeded(5))
    turned = data.labels.clone()
    turned[shown] = 1 - turned[shown]
    spoiled, model, taken = ImageSet(data.images, turned, data.class_names), fresh(start), []
    with caplog.at_level(logging.INFO, "smi_fed"):
        train(model, spoiled, config, generator=seeded(5), progress=lambda step, _: taken.append(step))
    assert len(taken) == 24  # three epochs: the first is the best, two more are the patience
    assert "early stop after 24 of 400 steps" in caplog.text
    again = fresh(start)
    other = TrainingConfig(**{f.name: getattr(config, f.name) for f in fields(config)} | {"patience": 99})
    train(again, spoiled, other, generator=seeded(5), progress=None)
    assert loss_over(model, spoiled, held) <= loss_over(again, spoiled, held) + 1e-6


def test_presets_of_the_configuration_are_those_of_python():
    for name in ("finetune", "head"):
        assert load_settings(CONF, f"training={name}").client.training == getattr(TrainingConfig, name)()
        assert load_settings(CONF, f"distillation={name}").distillation == getattr(DistillationConfig, name)()
    assert load_settings(CONF).client.training == TrainingConfig.scratch(batch_size=32)
    assert load_settings(CONF).distillation == DistillationConfig.scratch()


def test_presets_for_pretrained_models_use_adamw():
    assert [getattr(TrainingConfig, name)().optimiser for name in ("scratch", "finetune", "head")] == [
        "muon", "adamw", "adamw",
    ]  # fmt: skip


def test_a_summary_names_the_preset_and_what_differs():
    assert TrainingConfig().summary == "scratch"
    assert TrainingConfig.finetune().summary == "finetune"
    assert TrainingConfig.head(epochs=3.0).summary == "head, epochs 3.0"
    assert TrainingConfig.finetune(trainable="last:3", steps=9).summary == "finetune, steps 9, trainable last:3"


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("training=tune", r"^training: got 'tune', allowed: finetune \| head \| scratch$"),
        ("client.training=finetune", r"^client\.training: got 'finetune', allowed: .*training=scratch \| finetune"),
        ("distillation=tune", r"^distillation: got 'tune', allowed: ensemble \| finetune \| head"),
        ("client.training.trainable=last:x", r"^client\.training\.trainable: got 'last:x', allowed: all \| head"),
    ],
)
def test_an_unknown_preset_is_refused(override, says):
    with pytest.raises(ValueError, match=says):
        load_settings(CONF, override)
