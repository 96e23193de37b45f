"""`invert` with timm models of every family."""

import copy
from dataclasses import replace

import pytest
import timm
import torch
from torch.nn.modules.module import register_module_forward_hook

from smi_fed.checks import SettingError
from smi_fed.inversion import InversionConfig, feature_statistics, invert
from smi_fed.inversion.loop import run, start
from smi_fed.inversion.problem import pose
from smi_fed.inversion.teacher import TokenTeacher, View, adapt, frozen
from smi_fed.models import ModelSpec, build_model
from smi_fed.tokens import take, to_patches
from tests.models import TINY, TOKEN_MODELS, randomised, token_model

TOKENS = [
    "plain", "distilled", "registers", "average pooled", "attention pooled", "eva", "eva02", "rotary", "rotary mixed",
    "dinov3", "perception encoder", "shared keys",
]  # fmt: skip
VIT = {"embed_dim": 24, "depth": 2, "num_heads": 2}
MASKED = {
    "beit": ("beit_base_patch16_224", {**VIT, "patch_size": 8}),
    "relative positions": ("vit_relpos_small_patch16_224", {**VIT, "patch_size": 8}),
    "hybrid": ("vit_tiny_r_s16_p8_224", VIT),
    "cait": ("cait_xxs24_224", {**VIT, "patch_size": 8}),
    "xcit": ("xcit_nano_12_p8_224", {**VIT, "embed_dim": 32}),
    "convit": ("convit_tiny", {**VIT, "patch_size": 8}),
    "tnt": ("tnt_s_patch16_224", {"embed_dim": 24, "inner_dim": 8, "depth": 2, "num_heads_outer": 2}),
    "swin": ("swin_tiny_patch4_window7_224", {"embed_dim": 12, "depths": (1, 1), "num_heads": (1, 2)}),
    "swin v2": ("swinv2_tiny_window8_256", {"embed_dim": 12, "depths": (1, 1), "num_heads": (1, 2)}),
    "pvt": ("pvt_v2_b0", {"depths": (1, 1, 1, 1), "embed_dims": (8, 16, 40, 64)}),
    "twins": ("twins_pcpvt_small", {"embed_dims": (16, 16, 32, 32), "num_heads": (1, 1, 2, 2), "depths": (1, 1, 1, 1)}),
    "pit": ("pit_ti_224", {"base_dims": (8, 8, 8), "depth": (1, 1, 1)}),
    "levit": ("levit_128s", {"embed_dim": (16, 32, 48), "depth": (1, 1, 1), "num_heads": (1, 2, 3)}),
    "hiera": ("hiera_tiny_224", {"embed_dim": 16, "stages": (1, 1, 1, 1)}),
    "efficientformer": ("efficientformerv2_s0", {"depths": (1, 1, 1, 1), "embed_dims": (8, 16, 16, 32)}),
    "sequencer": ("sequencer2d_s", {"layers": (1, 1, 1, 1)}),
    "mixer": ("gmlp_ti16_224", {}),
    "coatnet": ("coatnet_pico_rw_224", {}),
    "mobilevit": ("mobilevit_xxs", {}),
    "mambaout": ("mambaout_femto", {"depths": (1, 1, 1, 1), "dims": (8, 16, 16, 32)}),
    "convnext": ("convnext_atto", {"depths": (1, 1, 1, 1), "dims": (8, 16, 16, 32)}),
    "fastvit": ("fastvit_t8", {"layers": (1, 1, 1, 1), "embed_dims": (8, 16, 32, 64)}),
    "resnet": ("resnet10t", {}),
    "densenet": ("densenet121", {"growth_rate": 4, "block_config": (2, 2, 2, 2)}),
    "mobilenet": ("mobilenetv3_small_050", {}),
    "regnet": ("regnetx_002", {}),
}
SPARSE = InversionConfig.paper(iterations=4, schedule="1:0.3,3:0.4", jitter=2)
TARGETS = torch.tensor([0, 3])


def model_of(kind):
    if kind in TOKENS:
        return token_model(kind)
    name, kwargs = MASKED[kind]
    return randomised(build_model(ModelSpec(name, num_classes=5, image_size=32, kwargs=kwargs)))


@pytest.fixture(scope="module", params=[*TOKENS, *MASKED])
def model(request):
    return model_of(request.param)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_images_and_masks(model):
    found = invert(model, TARGETS, SPARSE, generator=seeded())
    assert isinstance(adapt(model), TokenTeacher) == (model.spec.name in [TOKEN_MODELS[kind][0] for kind in TOKENS])
    assert found.images.shape == (2, 3, *model.image_size)
    assert bool(((found.images >= 0) & (found.images <= 1)).all())
    counts = dict(SPARSE.schedule.kept_counts(found.mask[0].numel()))
    assert [int((found.stopped_at == at).sum()) for at in (1, 3)] == [
        2 * (counts[0] - counts[1]),
        2 * (counts[1] - counts[3]),
    ]
    assert found.kept.shape == (2, counts[3])
    again = invert(model, TARGETS, SPARSE, generator=seeded())
    assert torch.equal(found.images, again.images)
    assert torch.equal(found.mask, again.mask)


@torch.no_grad()
def test_all_patches_are_the_untouched_model(model):
    teacher = adapt(model)
    pixels = torch.rand(2, 3, *model.image_size, generator=seeded())
    patches = to_patches((pixels - model.mean) / model.std, teacher.patch_size)
    positions = torch.arange(patches.shape[1]).expand(2, -1)
    assert torch.equal(teacher.logits(View(patches, positions, patches)), model(pixels))


def test_stopped_patches_stay_and_get_no_gradient(model):
    problem = pose(model, SPARSE, 5)
    teacher = problem.teacher
    seen = {}
    with frozen(model):
        state = start(problem, torch.arange(2), TARGETS)
        for _ in run(problem, state):
            for image, patch in (state.stopped_at >= 0).nonzero().tolist():
                now = state.canvas[image, patch].clone()
                assert torch.equal(seen.setdefault((image, patch), now), now)
        patches = torch.randn(2, *state.canvas.shape[1:], generator=seeded()).requires_grad_()
        teacher.logits(View(take(patches, state.kept), state.kept, patches.detach())).square().sum().backward()
    assert len(seen) == int((state.stopped_at >= 0).sum()) > 0
    sizes = patches.grad.abs().sum((2, 3, 4))
    assert float(sizes[state.stopped_at >= 0].max()) == 0.0
    assert float(take(sizes, state.kept).max()) > 0.0


def test_images_do_not_depend_on_their_batch(model):
    double = copy.deepcopy(model).double()
    together, alone = (invert(double, TARGETS, replace(SPARSE, batch_size=size), generator=seeded()) for size in (2, 1))
    assert torch.equal(together.mask, alone.mask)
    torch.testing.assert_close(together.images, alone.images, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["eva", "rotary", "rotary mixed", "rotary dynamic size", "perception encoder"])
@pytest.mark.parametrize("change", [{"statistics": 1.0}, {"precision": "bfloat16"}], ids=["statistics", "bfloat16"])
def test_settings_that_need_tokens_know_rotary_ones(kind, change):
    model = token_model(kind)
    known = feature_statistics(model, [torch.rand(4, 3, 16, 16, generator=seeded())])
    assert known.mean[0].shape == (model.backbone.num_prefix_tokens + 16, 24)
    config = replace(SPARSE, jitter=0, flip=False, **change)
    statistics = known if "statistics" in change else None
    first, second = (invert(model, TARGETS, config, generator=seeded(), statistics=statistics) for _ in range(2))
    plain = invert(model, TARGETS, replace(SPARSE, jitter=0, flip=False), generator=seeded())
    assert torch.equal(first.images, second.images)
    assert not torch.equal(first.images, plain.images)


NO_TABLE = ["LevitDistilled", "EfficientFormerV2", "MlpMixer"]
"""Their biases and gates belong to one grid, and timm resamples none of them."""


@pytest.mark.parametrize(
    "kind",
    [
        "plain", "distilled", "attention pooled", "eva02", "rotary mixed", "dinov3", "beit", "relative positions",
        "cait", "convit", "swin", "swin v2", "twins", "levit", "hiera", "efficientformer", "mixer", "resnet",
    ],
)  # fmt: skip
def test_a_file_of_weights_is_loaded_whole_or_named(kind, tmp_path, caplog):
    model = model_of(kind)
    torch.save(model.state_dict(), tmp_path / "theirs.pth")
    spec = replace(model.spec, kwargs={**model.spec.kwargs, "checkpoint_path": str(tmp_path / "theirs.pth")})
    pixels = torch.rand(2, 3, *model.image_size, generator=seeded())
    assert torch.equal(build_model(spec).eval()(pixels), model(pixels))
    assert not caplog.records
    other = build_model(replace(spec, num_classes=7))
    changed = {key for key, value in other.state_dict().items() if value.shape != model.state_dict()[key].shape}
    assert changed
    assert all(key.removeprefix("backbone.") in caplog.text for key in changed)
    kept = [(value, model.state_dict()[key]) for key, value in other.state_dict().items() if key not in changed]
    assert all(torch.equal(*pair) for pair in kept)
    larger = replace(
        spec, image_size=64, kwargs={**spec.kwargs, "img_size": 64} if "img_size" in spec.kwargs else spec.kwargs
    )
    if type(model.backbone).__name__ in NO_TABLE:
        with pytest.raises(SettingError, match=r"weights that fit this \w+: .* is \(.*\), expected \("):
            build_model(larger)
    else:
        assert bool(build_model(larger).eval()(torch.rand(1, 3, 64, 64)).isfinite().all())


class StopHereError(Exception):
    pass


def interrupted_after(calls):
    """Raises in the forward of that many modules from now."""
    count = 0

    def hook(*_):
        nonlocal count
        count += 1
        if count > calls:
            raise StopHereError

    return register_module_forward_hook(hook)


def everything(model):
    tensors = [*model.named_parameters(), *model.named_buffers()]
    plain = [
        {key: copy.copy(value) for key, value in vars(m).items() if not key.startswith("_") and not callable(value)}
        for m in model.modules()
    ]
    hooks = [bool(m._forward_hooks or m._forward_pre_hooks) for m in model.modules()]
    return [(name, t.clone(), t.requires_grad, t.grad) for name, t in tensors], plain, hooks


def assert_as_before(model, before):
    tensors, plain, hooks = everything(model)
    assert plain == before[1]
    assert hooks == before[2]
    for (name, now, flag, grad), (own, then, own_flag, own_grad) in zip(tensors, before[0], strict=True):
        assert (name, flag) == (own, own_flag)
        assert grad is own_grad is None
        assert torch.equal(now, then)


@pytest.mark.parametrize("calls", [None, 1.5, 3.7], ids=["to the end", "early", "late"])
def test_the_teacher_is_as_before(model, calls):
    model.train()
    list(model.modules())[3].eval()
    next(model.parameters()).requires_grad_(False)
    before = everything(model)
    if calls is None:
        invert(model, TARGETS, SPARSE, generator=seeded())
    else:
        handle = interrupted_after(int(calls * len(list(model.modules()))) // 2)
        try:
            with pytest.raises(StopHereError):
                invert(model, TARGETS, SPARSE, generator=seeded())
        finally:
            handle.remove()
    assert_as_before(model, before)
    model.eval()
    model.requires_grad_(True)


@torch.no_grad()
def test_a_cache_of_weights_does_not_outlive_inversion():
    name, kwargs = MASKED["levit"]
    model = randomised(build_model(ModelSpec(name, num_classes=5, image_size=32, kwargs=kwargs))).train()
    invert(model, TARGETS, SPARSE, generator=seeded())
    for weight in model.parameters():
        weight.mul_(2)
    model.eval()
    pixels = torch.rand(2, 3, 32, 32)
    assert torch.equal(model(pixels), copy.deepcopy(model).train().eval()(pixels))


def test_a_cache_of_somebody_elses_graph_is_not_used():
    name, kwargs = MASKED["levit"]
    model = randomised(build_model(ModelSpec(name, num_classes=5, image_size=32, kwargs=kwargs)))
    expected = invert(model, TARGETS, SPARSE, generator=seeded()).images
    model(torch.rand(2, 3, 32, 32)).sum().backward()
    before = [dict(m.attention_bias_cache) for m in model.modules() if hasattr(m, "attention_bias_cache")]
    assert torch.equal(invert(model, TARGETS, SPARSE, generator=seeded()).images, expected)
    after = [m.attention_bias_cache for m in model.modules() if hasattr(m, "attention_bias_cache")]
    assert all(old[key] is new[key] for old, new in zip(before, after, strict=True) for key in old)


def test_a_stem_that_gathers_pixels_first_has_three_channels():
    model = build_model(ModelSpec("cs3darknet_focus_s", num_classes=5, image_size=32))
    assert model.mean.shape == (3, 1, 1)
    assert adapt(model).channels == 3


@pytest.mark.parametrize("name", ["mixer_s16_224", "hiera_tiny_224"])
def test_a_model_without_patch_embed_takes_the_size_that_is_asked_for(name):
    spec = ModelSpec(name, num_classes=5, image_size=64)
    with torch.device("meta"):
        model = build_model(spec).eval()
        assert model.image_size == (64, 64)
        assert model(torch.empty(1, 3, 64, 64)).shape == (1, 5)
        plain = timm.create_model(name, num_classes=5, img_size=64)
        assert adapt(plain).grid == (8, 8)


@pytest.mark.parametrize("name", ["efficientformer_l1", "crossvit_tiny_240"])
def test_a_size_that_a_model_cannot_take(name):
    with pytest.raises(SettingError, match=rf"image_size: got \(32, 32\), allowed: a size that {name} runs on"):
        build_model(ModelSpec(name, num_classes=5, image_size=32))


@pytest.mark.parametrize(("name", "kwargs"), [("vit_tiny_patch16_224", TINY), ("convnext_atto", {})])
def test_a_model_that_does_not_answer_with_logits_of_images(name, kwargs):
    model = timm.create_model(name, num_classes=5, **kwargs, global_pool="")
    with pytest.raises(ValueError, match=r"model: got \(.*\), allowed: one that answers with logits \(b, 5\)"):
        invert(model, TARGETS, SPARSE)
    with pytest.raises(ValueError, match=r"model.num_classes: got 0, allowed: an int >= 1"):
        invert(timm.create_model(name, num_classes=0, **kwargs), TARGETS, SPARSE)
