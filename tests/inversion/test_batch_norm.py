"""The BatchNorm-statistics prior beside BatchNorm's own bookkeeping."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck

from smi_fed.inversion import InversionConfig, invert
from smi_fed.inversion.batch_norm import batch_norm_prior, batch_norms, input_statistics
from smi_fed.inversion.loop import objective, start
from smi_fed.inversion.losses import neighbours
from smi_fed.inversion.problem import pose
from smi_fed.inversion.teacher import adapt, frozen
from smi_fed.models import ModelSpec, build_model
from tests.models import masked_model, randomised

TARGETS = torch.tensor([0, 1, 2, 3])
CONFIG = InversionConfig.dense(iterations=4, learning_rate=0.05, jitter=0, flip=False, tv=0)


class StopHereError(Exception):
    pass


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def with_history(model):
    """A model whose BatchNorm layers have seen something."""
    for norm in batch_norms(model).values():
        norm.running_mean.copy_(torch.randn(norm.num_features, generator=seeded(1)))
        norm.running_var.copy_(torch.rand(norm.num_features, generator=seeded(2)) + 0.5)
    return model


@torch.no_grad()
def which_has_seen(model, images):
    """A model whose BatchNorm layers hold the statistics of `images`."""
    for _ in range(len(batch_norms(model))):  # what the next layer is shown depends on this one's statistics
        with input_statistics(model) as seen:
            model(images)
        for norm, each in zip(batch_norms(model).values(), seen, strict=True):
            norm.running_mean.copy_(each.mean)
            norm.running_var.copy_(each.variance)
    return model


@pytest.fixture
def resnet():
    return with_history(masked_model("resnet"))


def fused():
    """A model of timm's BatchNormAct2d."""
    model = build_model(ModelSpec("mobilenetv3_small_050", num_classes=5, image_size=32))
    return with_history(randomised(model))


@torch.no_grad()
def slow_prior(model, images):
    """Layer by layer: in training, with momentum 1, BatchNorm itself writes down what it is shown."""
    total = 0.0
    for name, known in batch_norms(model).items():
        alone = copy.deepcopy(model).eval()
        norm = alone.get_submodule(name)
        norm.train()
        norm.momentum = 1.0
        sizes = []
        norm.register_forward_hook(lambda _module, args, _out, sizes=sizes: sizes.append(args[0][:, 0].numel()))
        alone(images)
        variance = norm.running_var * (sizes[0] - 1) / sizes[0]  # torch writes down the unbiased one
        total += float((norm.running_mean - known.running_mean).square().sum().sqrt())
        total += float((variance - known.running_var).square().sum().sqrt())
    return total


@torch.no_grad()
def value_of(model, images):
    return float(prior_of(model, images))


def prior_of(model, images):
    with input_statistics(model) as seen:
        model(images)
    return batch_norm_prior(seen)


def hooks_of(model):
    return [hook for module in model.modules() for hook in (*module._forward_hooks, *module._forward_pre_hooks)]


@pytest.mark.parametrize("kind", ["resnet", "fused"])
def test_the_prior_is_what_batch_norm_itself_would_write_down(kind, resnet):
    model = (resnet if kind == "resnet" else fused()).double()
    images = torch.rand(3, 3, 32, 32, dtype=torch.float64, generator=seeded())
    assert len(batch_norms(model)) > 10
    assert value_of(model, images) == pytest.approx(slow_prior(model, images), rel=1e-9)
    assert hooks_of(model) == []


def test_the_prior_of_the_statistics_themselves_is_zero(resnet):
    images = torch.rand(4, 3, 32, 32, generator=seeded())
    which_has_seen(resnet, images)
    assert value_of(resnet, images) < 1e-3
    assert value_of(resnet, images.flip(0)) < 1e-3
    assert value_of(resnet, 1 - images) > 0.1


def test_gradient_of_the_prior():
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.Conv2d(3, 2, 1))
    model.append(nn.BatchNorm2d(2))
    model = with_history(randomised(model)).double()
    images = torch.randn(2, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x: prior_of(model, x), images)


def test_layers_without_running_statistics_are_none():
    assert batch_norms(nn.BatchNorm2d(3, track_running_stats=False)) == {}
    assert batch_norms(nn.InstanceNorm2d(3, track_running_stats=True)) == {}
    assert list(batch_norms(nn.Sequential(nn.BatchNorm1d(3)))) == ["0"]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("schedule", ["", "1:0.5"])
def test_the_loop_adds_the_weighted_prior_of_whole_images(resnet, precision, schedule):
    config = replace(CONFIG, precision=precision, schedule=schedule)
    teacher = adapt(resnet)
    losses = []
    for weight in (0.0, 0.5):
        problem = pose(resnet, replace(config, batchnorm=weight), 7)
        with frozen(resnet):
            state = start(problem, torch.arange(4), TARGETS)
            if schedule:
                state.kept, state.parameters["pixels"] = state.kept[:, ::2], state.parameters["pixels"][:, ::2]
            losses.append(objective(problem, state, neighbours(state.kept, teacher.grid)))
    images = state.canvas.reshape(4, *teacher.grid, 3, *teacher.patch_size).permute(0, 3, 1, 4, 2, 5)
    expected = 0.5 * slow_prior(resnet.backbone, images.reshape(4, 3, 32, 32))
    difference = losses[1] - losses[0]
    assert float(difference.std()) < 1e-4 * expected
    assert float(difference.mean()) == pytest.approx(expected, rel=1e-4 if precision == "float32" else 0.02)
    assert hooks_of(resnet) == []


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_inversion_comes_closer_to_what_the_layers_have_seen(resnet, precision):
    which_has_seen(resnet, torch.rand(8, 3, 4, 4, generator=seeded()).repeat_interleave(8, 2).repeat_interleave(8, 3))
    config = replace(CONFIG, iterations=25, precision=precision)
    without, with_prior = (
        invert(resnet, TARGETS, replace(config, batchnorm=weight), generator=seeded()) for weight in (0.0, 1.0)
    )
    far, near = (value_of(resnet, found.images) for found in (without, with_prior))
    assert near < 0.5 * far


@pytest.mark.slow
def test_a_compiled_teacher_runs_uncompiled_with_the_prior(resnet):
    config = replace(CONFIG, batchnorm=1.0)
    plain, compiled = (invert(resnet, TARGETS, replace(config, compile=c), generator=seeded()) for c in (False, True))
    assert torch.equal(plain.images, compiled.images)


def test_no_chosen_batch_with_the_prior():
    with pytest.raises(ValueError, match="batch_size: got 'auto', allowed: an int, where batchnorm > 0"):
        replace(CONFIG, batchnorm=1.0, batch_size="auto")
    assert replace(CONFIG, batchnorm=1.0).couples
    assert not CONFIG.couples


@pytest.mark.parametrize("kind", ["vit", "swin"])
def test_a_model_without_batch_norm_is_refused_before_any_work(kind, vit):
    model = vit if kind == "vit" else masked_model("swin")
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model was run"))
    with pytest.raises(ValueError, match=r"batchnorm: got weight 2.0 for a model without BatchNorm"):
        invert(model, TARGETS, replace(CONFIG, batchnorm=2.0))


def test_a_batch_that_does_not_fit_is_not_halved(resnet):
    def refuse(_module, args):
        if len(args[0]) > 2:
            raise torch.OutOfMemoryError("as if on CUDA")

    resnet.backbone.register_forward_pre_hook(refuse)
    with pytest.raises(torch.OutOfMemoryError, match="for 4 images that the prior couples; lower batch_size"):
        invert(resnet, TARGETS, replace(CONFIG, batchnorm=1.0), generator=seeded())
    assert len(invert(resnet, TARGETS, CONFIG, generator=seeded())) == 4


@pytest.mark.parametrize("error", [StopHereError, KeyboardInterrupt])
def test_no_hook_is_left_after_an_exception(resnet, error):
    def interrupt(*_):
        raise error

    handle = list(resnet.backbone.children())[-2].register_forward_hook(interrupt)
    with pytest.raises(error):
        invert(resnet, TARGETS, replace(CONFIG, batchnorm=1.0), generator=seeded())
    handle.remove()
    assert hooks_of(resnet) == []
    before = copy.deepcopy(resnet.state_dict())
    invert(resnet, TARGETS, replace(CONFIG, batchnorm=1.0), generator=seeded())
    assert hooks_of(resnet) == []
    assert all(torch.equal(value, before[key]) for key, value in resnet.state_dict().items())
