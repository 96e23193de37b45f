"""A teacher in bfloat16 or compiled is the same teacher, and its own again afterwards."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from smi_fed.inversion import InversionConfig, PyramidConfig, feature_statistics, invert
from smi_fed.inversion.acceleration import compiled_blocks, compiler_works, half_weights
from smi_fed.inversion.teacher import View, adapt, frozen
from smi_fed.tokens import take
from tests.models import MASKED_MODELS, TOKEN_MODELS, masked_model, small_vit, token_model

SPARSE = InversionConfig.paper(iterations=6, schedule="2:0.3,4:0.4", jitter=5)
PLAIN = InversionConfig.dense(iterations=5, learning_rate=0.05, jitter=0, flip=False)
TARGETS = torch.tensor([0, 1, 2, 3])
EVERY_MODEL = [*TOKEN_MODELS, *MASKED_MODELS]


class StopHereError(Exception):
    pass


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def model_of(kind):
    return token_model(kind) if kind in TOKEN_MODELS else masked_model(kind)


def state_of(model):
    """What must be the same afterwards; by identity where there is one."""
    return [
        (name, id(weight), weight.data_ptr(), weight.dtype, weight.requires_grad, id(weight.grad))
        for name, weight in model.named_parameters(remove_duplicate=False)
    ]


def half_names(model):
    return {name for name, weight in model.named_parameters() if weight.dtype == torch.bfloat16}


@torch.no_grad()
def confidence(model, images):
    return float(model(images).softmax(1).gather(1, TARGETS[:, None]).mean())


def both(model, config, **changes):
    """Images of `config` and of `config` with `changes`."""
    return (invert(model, TARGETS, c, generator=seeded()) for c in (config, replace(config, **changes)))


@pytest.mark.parametrize("kind", EVERY_MODEL)
def test_only_linear_and_convolution_weights_are_halved(kind):
    model = model_of(kind)
    modules = {name: m for name, m in model.named_modules() if type(m) in (nn.Linear, nn.Conv2d)}
    expected = {f"{name}.{key}" for name, m in modules.items() for key, _ in m.named_parameters(recurse=False)}
    with half_weights(model):
        assert half_names(model) == expected
        others = {w.dtype for name, w in model.named_parameters() if name not in expected}
        assert others == {torch.float32}
    assert expected


@pytest.mark.parametrize("how", ["to the end", "exception"])
@pytest.mark.parametrize("kind", EVERY_MODEL)
def test_the_very_same_tensors_afterwards(kind, how):
    model = model_of(kind)
    before, values = state_of(model), [weight.detach().clone() for weight in model.parameters()]
    try:
        with half_weights(model):
            if how == "exception":
                raise StopHereError
    except StopHereError:
        pass
    assert state_of(model) == before
    assert all(map(torch.equal, values, model.parameters()))


def test_a_gradient_that_was_there_stays(vit):
    vit(torch.rand(2, 3, 16, 16)).sum().backward()
    before, gradients = state_of(vit), [weight.grad.clone() for weight in vit.parameters()]
    with half_weights(vit):
        pass
    invert(vit, TARGETS, replace(SPARSE, precision="bfloat16"), generator=seeded())
    assert state_of(vit) == before
    assert all(weight.grad.dtype == torch.float32 for weight in vit.parameters())
    assert all(torch.equal(gradient, weight.grad) for gradient, weight in zip(gradients, vit.parameters(), strict=True))


def test_layers_that_share_a_weight():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    before = state_of(model)
    with half_weights(model):
        assert model[1].weight is model[0].weight
        assert model[1].weight.dtype == torch.bfloat16
    assert state_of(model) == before


def logits_and_gradient(teacher, every):
    """Under autocast, of a view with the patches at each `every`-th place."""
    patches = torch.randn(2, teacher.grid[0] * teacher.grid[1], 3, *teacher.patch_size, generator=seeded())
    kept = torch.arange(0, patches.shape[1], every).repeat(2, 1)
    pixels = take(patches, kept).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        logits = teacher.logits(View(pixels, kept, patches))
    logits.float().square().sum().backward()
    return logits.detach(), pixels.grad


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("kind", EVERY_MODEL)
def test_halved_weights_are_those_of_autocast_bit_for_bit(kind, every):
    model = model_of(kind)
    with frozen(model):
        plain = logits_and_gradient(adapt(model), every)
        with half_weights(model):
            halved = logits_and_gradient(adapt(model), every)
    assert all(map(torch.equal, plain, halved))


@pytest.mark.parametrize("how", ["to the end", "exception"])
@pytest.mark.parametrize("kind", ["plain", "attention pooled", "swin", "resnet"])
def test_the_teacher_of_a_bfloat16_inversion_is_as_before(kind, how):
    model = model_of(kind)
    before, inside = state_of(model), []

    def progress(now):
        inside.append(half_names(model))
        if how == "exception" and now.done == 3:
            raise StopHereError

    try:
        found = invert(model, TARGETS, replace(SPARSE, precision="bfloat16"), generator=seeded(), progress=progress)
        assert found.images.dtype == torch.float32
    except StopHereError:
        pass
    assert all(inside)
    assert len(inside) == (3 if how == "exception" else 6)
    assert state_of(model) == before


@pytest.mark.parametrize("seed", [0, 1])
def test_bfloat16_images_are_close_to_float32_ones(seed):
    model = small_vit(seed)
    exact, rounded = both(model, PLAIN, precision="bfloat16")
    difference = (exact.images - rounded.images).abs()
    # Adam's first steps go by the sign of the gradient alone: where it is near 0, rounding turns the sign and moves
    # a pixel by two rates (0.05 in units of pixels). Few do (0.2 %, measured 0.1 to 0.16 %), the others stay within
    # a fraction of a rate: 0.0004 and 0.0007 on average, of 0.07 that the pixels travel in these five iterations.
    assert float(difference.mean()) < 0.0015
    assert float((difference > 0.02).float().mean()) < 0.005
    assert not torch.equal(exact.images, rounded.images)


@pytest.mark.parametrize("kind", ["plain", "swin"])
@pytest.mark.parametrize("schedule", ["", "2:0.3,5:0.4"])
def test_a_bfloat16_teacher_finds_images_it_is_as_sure_of(kind, schedule):
    model = model_of(kind)
    exact, rounded = both(model, replace(PLAIN, iterations=60, schedule=schedule), precision="bfloat16")
    assert confidence(model, exact.images) > 2 * confidence(model, torch.rand(4, 3, *model.image_size))
    assert confidence(model, rounded.images) > confidence(model, exact.images) - 0.03


@pytest.mark.parametrize("how", ["to the end", "exception"])
@pytest.mark.parametrize("kind", ["plain", "swin", "resnet"])
def test_blocks_are_compiled_inside_only(kind, how):
    model = model_of(kind)
    modules = list(model.backbone.blocks) if kind == "plain" else [model.backbone]
    try:
        with compiled_blocks(model):
            assert all(module._compiled_call_impl is not None for module in modules)
            if how == "exception":
                raise StopHereError
    except StopHereError:
        pass
    assert all(module._compiled_call_impl is None for module in model.modules())


@pytest.fixture
def counters():
    """What torch.compile did in this test; it compiles afresh, also past other tests' limit of versions."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    assert compiler_works("cpu")
    counters.clear()
    yield counters
    torch._dynamo.reset()


def assert_compiled_agrees(model, config, counters, **arguments):
    exact, compiled = (
        invert(model, TARGETS, c, generator=seeded(), **arguments) for c in (config, replace(config, compile=True))
    )
    assert counters["stats"]["unique_graphs"]
    assert torch.equal(exact.mask, compiled.mask)
    # Fused kernels add in another order, and Adam divides a gradient near 0 by its own size: measured 2e-5 at most.
    torch.testing.assert_close(compiled.images, exact.images, atol=2e-4, rtol=0)
    assert all(module._compiled_call_impl is None for module in model.modules())


@pytest.mark.slow
@pytest.mark.parametrize("selection", ["attention", "random"])
@pytest.mark.parametrize("kind", ["plain", "average pooled", "attention pooled", "resnet"])
def test_compiled_images_are_the_eager_ones(kind, selection, counters):
    assert_compiled_agrees(
        model_of(kind), replace(SPARSE, iterations=4, schedule="2:0.3", selection=selection), counters
    )


@pytest.mark.slow
def test_compiled_with_the_statistics_prior(vit, counters):
    changes = {"parametrisation": PyramidConfig((2, 4)), "jitter": 0, "statistics": 1.0}
    known = feature_statistics(vit, [torch.rand(8, 3, 16, 16)])
    assert_compiled_agrees(vit, replace(PLAIN, **changes), counters, statistics=known)


@pytest.mark.slow
def test_compiled_in_bfloat16_with_a_batch_chosen(vit, counters):
    config = replace(PLAIN, precision="bfloat16", batch_size="auto")
    exact, compiled = both(vit, config, compile=True)
    assert counters["stats"]["unique_graphs"]
    # Fused kernels round to bfloat16 less often; as in test_bfloat16_images_are_close_to_float32_ones.
    assert float((exact.images - compiled.images).abs().mean()) < 0.0015
    assert half_names(vit) == set()


@pytest.mark.slow
def test_an_exception_in_a_compiled_inversion(vit, counters):
    def progress(now):
        assert all(block._compiled_call_impl is not None for block in vit.backbone.blocks)
        raise StopHereError

    with pytest.raises(StopHereError):
        invert(vit, TARGETS, replace(PLAIN, compile=True), generator=seeded(), progress=progress)
    assert counters["stats"]["unique_graphs"]
    assert all(module._compiled_call_impl is None for module in vit.modules())


@pytest.mark.slow
def test_a_compiler_that_works():
    assert compiler_works.__wrapped__("cpu")


@pytest.fixture
def _no_compiler(monkeypatch):
    def broken(*_args, **_kwargs):
        raise RuntimeError("no C++ compiler\nin a second line")

    compiler_works.cache_clear()
    monkeypatch.setattr("smi_fed.inversion.acceleration.torch.compile", broken)
    yield
    compiler_works.cache_clear()


@pytest.mark.usefixtures("_no_compiler")
def test_without_a_compiler_the_teacher_runs_as_it_is(vit, caplog):
    eager, compiled, _ = (
        invert(vit, TARGETS, replace(SPARSE, compile=correct), generator=seeded()) for correct in (False, True, True)
    )
    assert torch.equal(eager.images, compiled.images)
    assert not compiler_works("cpu")
    (line,) = caplog.messages
    assert "no compiler works here" in line
    assert line.endswith("(no C++ compiler)")


@pytest.mark.parametrize("error", [RuntimeError(), ImportError("no triton")])
def test_whatever_a_missing_compiler_raises(monkeypatch, caplog, error):
    def broken(*_args, **_kwargs):
        raise error

    monkeypatch.setattr("smi_fed.inversion.acceleration.torch.compile", broken)
    assert compiler_works.__wrapped__("cpu") is False
    (line,) = caplog.messages
    assert (str(error) or type(error).__name__) in line
