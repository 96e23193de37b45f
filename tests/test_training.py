import copy
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smi_fed.data import ImageSet
from smi_fed.models import build_model
from smi_fed.muon import Muon
from smi_fed.training import Optimiser, TrainingConfig, accuracy, predict, seeded_torch, shift_images, train
from tests.models import masked_model, small_spec, small_vit

QUICK = TrainingConfig(steps=40, batch_size=16)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def toys(count=64, seed=0):
    """Noise that is bright for class 1 and dark for class 0."""
    generator = seeded(seed)
    labels = torch.randint(0, 2, (count,), generator=generator)
    images = 0.6 * torch.rand(count, 3, 16, 16, generator=generator) + 0.4 * labels.view(-1, 1, 1, 1)
    return ImageSet(images, labels, ("dark", "bright"))


def fresh(seed=0):
    torch.manual_seed(seed)
    return build_model(small_spec(num_classes=2, depth=1))


@pytest.mark.parametrize("optimiser", ["muon", "adamw"])
def test_a_tiny_vit_tells_dark_from_bright(optimiser):
    model, steps = fresh(), []
    config = replace(QUICK, optimiser=optimiser)
    loss = train(model, toys(), config, generator=seeded(), progress=lambda step, now: steps.append((step, now)))
    assert accuracy(model, toys(200, seed=1)) > 0.9
    assert [step for step, _ in steps] == list(range(1, 41))
    losses = [float(now) for _, now in steps]
    assert loss == pytest.approx(sum(losses[-4:]) / 4)
    assert loss < 0.5 * losses[0]
    assert not model.training
    assert not any(now.requires_grad for _, now in steps)


def test_same_generator_same_weights():
    config = TrainingConfig(steps=3, batch_size=8)
    first, again, other = fresh(), fresh(), fresh()
    for model, seed in ((first, 3), (again, 3), (other, 4)):
        train(model, toys(), config, generator=seeded(seed))
    states = [model.state_dict() for model in (first, again, other)]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert any(not torch.equal(states[0][key], states[2][key]) for key in states[0])


RANDOM_PARTS = {"drop_rate": 0.3, "pos_drop_rate": 0.3, "attn_drop_rate": 0.3, "drop_path_rate": 0.5}


@pytest.mark.parametrize("part", [*RANDOM_PARTS, None])
def test_random_parts_of_a_model_follow_the_generator(part):
    """Whatever torch's own state is; and that one stays as it is."""
    kwargs = {} if part is None else {part: RANDOM_PARTS[part]}
    start = build_model(small_spec(num_classes=2, **kwargs))
    found = []
    for seed, state in ((3, 0), (3, 1), (4, 0)):
        model = copy.deepcopy(start)
        torch.manual_seed(state)
        expected = torch.rand(3)
        torch.manual_seed(state)
        train(model, toys(), TrainingConfig(steps=3, batch_size=8), generator=seeded(seed))
        assert torch.equal(torch.rand(3), expected)
        found.append(torch.cat([weight.flatten() for weight in model.parameters()]))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_random_parts_take_no_draw_of_the_generator():
    generator, ones = seeded(5), torch.ones(1000)
    with seeded_torch(generator):
        first, second = (torch.nn.functional.dropout(ones) for _ in range(2))
    assert not torch.equal(first, second)
    assert torch.equal(generator.get_state(), seeded(5).get_state())
    torch.rand((), generator=generator)
    with seeded_torch(generator):
        assert not torch.equal(torch.nn.functional.dropout(ones), first)


def test_random_parts_know_torchs_own_generator():
    """Its state is what they draw from anyway, and it has to go on."""
    torch.manual_seed(2)
    before = torch.default_generator.get_state()
    expected = torch.rand(4)
    torch.manual_seed(2)
    with seeded_torch(torch.default_generator):
        assert torch.equal(torch.rand(4), expected)
    assert not torch.equal(torch.default_generator.get_state(), before)


def test_nothing_to_train_on():
    model = fresh()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="empty partition: got 0 images"):
        train(model, toys().select([]), QUICK, generator=seeded())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def rates(model, config):
    """The rate of every part before each step."""
    optimiser, found = Optimiser(model, config), []
    for _ in range(config.steps):
        found.append([part.param_groups[0]["lr"] for part in optimiser.parts])
        optimiser.step(model(torch.rand(2, 3, 16, 16)).square().mean())
    return torch.tensor(found).T


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0.5), (2, 0.5), (10, 0.1), (20, 0.05), (7, 1 / 7), (5, 0.99)])
def test_any_steps_and_warmup_go_together(steps, warmup):
    (found,) = rates(fresh(), TrainingConfig(steps=steps, warmup=warmup, learning_rate=0.01, optimiser="adamw"))
    assert bool((found > 0).all())
    assert float(found.max()) == pytest.approx(0.01)


def test_the_rates_rise_and_fall():
    config = TrainingConfig(steps=20, warmup=0.2, learning_rate=0.01, muon_learning_rate=0.02)
    for found, peak in zip(rates(fresh(), config), (0.01, 0.02), strict=True):
        torch.testing.assert_close(found[:4], peak * torch.tensor([0.25, 0.5, 0.75, 1.0]))
        falling = [peak * 0.5 * (1 + math.cos(math.pi * step / 16)) for step in range(16)]
        torch.testing.assert_close(found[4:], torch.tensor(falling))


@pytest.mark.parametrize(("name", "hidden"), [("muon", 4), ("adamw", 0)])
def test_muon_steps_the_hidden_matrices_and_nothing_else(name, hidden):
    model = fresh()
    parts = Optimiser(model, TrainingConfig(optimiser=name)).parts
    names = {id(weight): key for key, weight in model.named_parameters()}
    groups = [[names[id(weight)] for group in part.param_groups for weight in group["params"]] for part in parts]
    assert sorted(key for group in groups for key in group) == sorted(names.values())
    assert [type(part) for part in parts] == [torch.optim.AdamW, *([Muon] if hidden else [])]
    matrices = [f"backbone.blocks.0.{key}.weight" for key in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]
    assert groups[1:] == ([matrices] if hidden else [])


def test_a_model_without_hidden_matrices():
    assert [type(part) for part in Optimiser(masked_model("resnet"), QUICK).parts] == [torch.optim.AdamW]


def test_the_gradient_is_clipped():
    model = torch.nn.Linear(3, 1)
    Optimiser(model, TrainingConfig(clip=0.5)).step(1000 * model(torch.ones(2, 3)).sum())
    norm = torch.cat([weight.grad.flatten() for weight in model.parameters()]).norm()
    assert float(norm) == pytest.approx(0.5, rel=1e-4)


def test_betas_may_come_as_a_list():
    assert TrainingConfig(betas=[0.8, 0.9]) == TrainingConfig(betas=(0.8, 0.9))


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 4), st.integers(1, 3), st.integers(1, 7), st.integers(1, 7), st.integers(0, 9), st.integers(0, 99)
)
def test_shifted_images_are_rolls(b, c, h, w, largest, seed):
    images = torch.rand(b, c, h, w)
    shifted = shift_images(images, largest, seeded(seed))
    assert shifted.shape == images.shape
    for image, moved in zip(images, shifted, strict=True):
        near = range(-largest, largest + 1)
        assert any(torch.equal(moved, image.roll((y, x), (1, 2))) for y in near for x in near)


def test_every_image_has_its_own_shift_of_every_size():
    images = torch.zeros(400, 1, 9, 9)
    images[:, :, 4, 4] = 1
    places = shift_images(images, 2, seeded()).flatten(1).argmax(1)
    rows, columns = places // 9 - 4, places % 9 - 4
    assert {(int(y), int(x)) for y, x in zip(rows, columns, strict=True)} == {
        (y, x) for y in range(-2, 3) for x in range(-2, 3)
    }
    assert torch.equal(shift_images(images, 2, seeded(1)), shift_images(images, 2, seeded(1)))


def test_no_jitter_is_no_draw():
    images, generator = torch.rand(2, 3, 4, 4), seeded()
    assert shift_images(images, 0, generator) is images
    assert torch.equal(generator.get_state(), seeded().get_state())


class StopHereError(Exception):
    pass


@pytest.mark.parametrize("fails", [False, True])
def test_predict_leaves_every_mode_as_before(vit, fails):
    vit.train()
    vit.backbone.blocks[0].eval()  # a mixture of modes has to come back as one
    modes = [module.training for module in vit.modules()]
    seen = []

    def watch(module, _args, _output):
        seen.append(any(each.training for each in vit.modules()))
        if fails:
            raise StopHereError

    handle = vit.backbone.norm.register_forward_hook(watch)
    if fails:
        with pytest.raises(StopHereError):
            predict(vit, torch.rand(2, 3, 16, 16))
    else:
        predict(vit, torch.rand(2, 3, 16, 16))
    handle.remove()
    assert seen == [False]
    assert [module.training for module in vit.modules()] == modes


@pytest.mark.parametrize("batch_size", [1, 3, 5, 256])
def test_predict_is_the_model_in_parts(vit, batch_size):
    images = torch.rand(5, 3, 16, 16)
    logits = predict(vit, images, batch_size)
    assert not logits.requires_grad
    torch.testing.assert_close(logits, vit(images).detach())


def test_accuracy_by_hand():
    model = small_vit(num_classes=3)
    images = torch.rand(7, 3, 16, 16)
    named = [int(model(image[None]).argmax()) for image in images]
    wrong = [(label + 1) % 3 for label in named]
    for right in range(8):
        labels = torch.tensor(named[:right] + wrong[right:])
        assert accuracy(model, ImageSet(images, labels, ("a", "b", "c"))) == pytest.approx(right / 7)


@pytest.mark.parametrize("kind", ["vit", "resnet"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_a_classifier_takes_images_of_any_dtype(kind, dtype):
    model = small_vit() if kind == "vit" else masked_model(kind)
    images = torch.rand(6, 3, *model.image_size, generator=seeded())
    expected = model(images).detach()
    bound = 0.05 * float(expected.abs().max())
    for part in ("backbone", "whole"):
        other = copy.deepcopy(model)
        (other.backbone if part == "backbone" else other).to(dtype)
        for shown in (images, images.to(dtype)):
            found = other(shown).detach()
            assert found.dtype == dtype
            torch.testing.assert_close(found.float(), expected, atol=bound, rtol=0)
        torch.testing.assert_close(predict(other, images), expected, atol=bound, rtol=0)
    torch.testing.assert_close(model(images.to(dtype)).detach(), expected, atol=bound, rtol=0)
