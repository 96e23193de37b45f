import itertools

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.eva import Eva

from smi_fed import tokens
from smi_fed.models import build_model
from tests.models import TINY, TOKEN_MODELS, randomised, small_spec, token_model

every_kind = pytest.mark.parametrize("kind", TOKEN_MODELS)


def normalised_patches(model, seed=0, images=2):
    pixels = torch.rand(images, 3, 16, 16, generator=torch.Generator().manual_seed(seed)).to(model.mean)
    return pixels, tokens.to_patches((pixels - model.mean) / model.std, (4, 4))


class Gather(torch.nn.Module):
    """The naive way: every token is embedded, then some are dropped."""

    def __init__(self, vit, kept):
        super().__init__()
        self.prefix, self.kept, self.with_indices = vit.num_prefix_tokens, kept, isinstance(vit, Eva)

    def forward(self, x):
        x = torch.cat([x[:, : self.prefix], tokens.take(x[:, self.prefix :], self.kept)], dim=1)
        return (x, self.kept) if self.with_indices else x


@every_kind
def test_all_tokens_are_the_untouched_model_bit_for_bit(kind):
    model = token_model(kind)
    pixels, patches = normalised_patches(model)
    positions = torch.arange(16).expand(2, -1)
    assert torch.equal(tokens.forward_patches(model.backbone, patches, positions), model(pixels))


@every_kind
def test_a_subset_is_a_naive_gather(kind):
    model = token_model(kind).double()
    pixels, patches = normalised_patches(model)
    kept = torch.tensor([[0, 3, 7, 12, 15], [1, 2, 8, 9, 10]])
    got = tokens.forward_patches(model.backbone, tokens.take(patches, kept), kept)
    model.backbone.patch_drop = Gather(model.backbone, kept)
    torch.testing.assert_close(got, model(pixels), atol=1e-12, rtol=0)


@every_kind
def test_order_of_patches_does_not_matter(kind):
    model = token_model(kind).double()
    _, patches = normalised_patches(model)
    kept = torch.tensor([[3, 0, 15], [9, 1, 2]])
    order = torch.tensor([2, 0, 1])
    first = tokens.forward_patches(model.backbone, tokens.take(patches, kept), kept)
    second = tokens.forward_patches(model.backbone, tokens.take(patches, kept)[:, order], kept[:, order])
    torch.testing.assert_close(first, second, atol=1e-12, rtol=0)


@every_kind
def test_importance_is_a_distribution_over_what_is_attended(kind):
    model = token_model(kind)
    _, patches = normalised_patches(model)
    kept = torch.tensor([[0, 3, 7], [1, 2, 8]])
    weights = tokens.attention_to_patches(model.backbone, tokens.take(patches, kept), kept)
    assert weights.shape == (2, 3)
    assert bool((weights >= 0).all())
    assert bool((weights.sum(1) <= 1 + 1e-5).all())
    assert float(weights.std(1).min()) > 0


@every_kind
def test_nothing_is_left_on_the_model(kind):
    model = token_model(kind)
    before = [{k: v for k, v in vars(m).items() if not k.startswith("_")} for m in model.modules()]
    _, patches = normalised_patches(model)
    kept = torch.tensor([[0, 3], [1, 2]])
    tokens.attention_to_patches(model.backbone, tokens.take(patches, kept), kept)
    with pytest.raises(RuntimeError), tokens.token_features(model.backbone):
        tokens.forward_patches(model.backbone, tokens.take(patches, kept)[..., :1], kept)
    after = [{k: v for k, v in vars(m).items() if not k.startswith("_")} for m in model.modules()]
    assert before == after
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def keys_of(patches, kept, prefix):
    """(b, 1, tokens, tokens): which tokens may be attended to."""
    allowed = torch.zeros(patches.shape[:2], dtype=torch.bool).scatter(1, kept, value=True)
    allowed = torch.cat([torch.ones(len(kept), prefix, dtype=torch.bool), allowed], dim=1)
    return allowed[:, None, None].expand(-1, 1, allowed.shape[1], -1)


@pytest.mark.parametrize("kind", [kind for kind in TOKEN_MODELS if token_model(kind).backbone.global_pool == "token"])
def test_a_subset_is_the_whole_with_the_others_masked(kind):
    model = token_model(kind).double()
    pixels, patches = normalised_patches(model)
    kept = torch.tensor([[0, 3, 7, 12, 15], [1, 2, 8, 9, 10]])
    got = tokens.forward_patches(model.backbone, tokens.take(patches, kept), kept)
    mask = keys_of(patches, kept, model.backbone.num_prefix_tokens)
    expected = model.backbone((pixels - model.mean) / model.std, attn_mask=mask)
    torch.testing.assert_close(got, expected, atol=1e-10, rtol=0)


@every_kind
def test_importance_is_what_the_last_unfused_softmax_says(kind, monkeypatch):
    model = token_model(kind).double()
    vit = model.backbone
    pixels, patches = normalised_patches(model)
    kept = torch.tensor([[0, 3, 7], [8, 2, 1]])
    assert tokens.reads_attention(vit)
    got = tokens.attention_to_patches(vit, tokens.take(patches, kept), kept)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    vit.patch_drop = Gather(vit, kept)
    seen, own = [], torch.Tensor.softmax
    monkeypatch.setattr(torch.Tensor, "softmax", lambda self, dim: seen.append(own(self, dim)) or seen[-1])
    model(pixels)
    weights = seen[-1].mean(1)
    if vit.attn_pool is None:
        weights = weights[:, :1] if vit.global_pool == "token" else weights[:, vit.num_prefix_tokens :]
    torch.testing.assert_close(got, weights.mean(1)[:, -3:], atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", ["plain", "rotary", "rotary mixed", "rotary dynamic size"])
def test_a_model_in_training_drops_more_patches_by_itself(kind):
    name, kwargs = TOKEN_MODELS[kind]
    model = randomised(build_model(small_spec(name, patch_drop_rate=0.5, **kwargs))).double()
    _, patches = normalised_patches(model)
    kept = torch.tensor([[0, 3, 7, 12], [1, 2, 8, 9]])
    known = [
        tokens.forward_patches(model.backbone, tokens.take(patches, pair), pair)
        for pair in (kept[:, list(two)] for two in itertools.combinations(range(4), 2))
    ]
    before = [dict(vars(m)) for m in model.modules()]
    model.train()
    got = tokens.forward_patches(model.backbone, tokens.take(patches, kept), kept)
    model.eval()
    assert [dict(vars(m)) for m in model.modules()] == before
    for image in range(2):
        assert min((each[image] - got[image]).abs().max().item() for each in known) < 1e-12


@pytest.mark.parametrize("name", ["beit_base_patch16_224", "vit_relpos_small_patch16_224"])
def test_positions_that_belong_to_the_whole_grid_are_no_tokens(name):
    assert not tokens.is_token_model(timm.create_model(name, num_classes=5, **TINY))


def test_an_attention_that_is_not_known_is_not_read():
    model = build_model(small_spec("vit_tiny_patch16_224", attn_layer="diff", num_heads=2))
    assert tokens.is_token_model(model.backbone)
    assert not tokens.reads_attention(model.backbone)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))
def test_patches_and_images_undo_each_other(channels, rows, columns, ph, pw):
    images = torch.randn(2, channels, rows * ph, columns * pw)
    patches = tokens.to_patches(images, (ph, pw))
    assert patches.shape == (2, rows * columns, channels, ph, pw)
    assert torch.equal(tokens.to_images(patches, (rows, columns)), images)
    assert torch.equal(patches[:, 0], images[:, :, :ph, :pw])


def test_take_and_put_undo_each_other():
    values = torch.randn(2, 6, 3)
    indices = torch.tensor([[1, 4], [0, 5]])
    rows = tokens.take(values, indices)
    assert torch.equal(tokens.put(values, indices, rows), values)
    assert torch.equal(tokens.take(tokens.put(values, indices, rows + 1), indices), rows + 1)
