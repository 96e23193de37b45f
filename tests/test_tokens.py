import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smi_fed import tokens
from tests.models import TOKEN_MODELS, token_model

every_kind = pytest.mark.parametrize("kind", TOKEN_MODELS)


def normalised_patches(model, seed=0, images=2):
    pixels = torch.rand(images, 3, 16, 16, generator=torch.Generator().manual_seed(seed)).to(model.mean)
    return pixels, tokens.to_patches((pixels - model.mean) / model.std, (4, 4))


class Gather(torch.nn.Module):
    """The naive way: every token is embedded, then some are dropped."""

    def __init__(self, prefix, kept):
        super().__init__()
        self.prefix, self.kept = prefix, kept

    def forward(self, x):
        return torch.cat([x[:, : self.prefix], tokens.take(x[:, self.prefix :], self.kept)], dim=1)


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
    model.backbone.patch_drop = Gather(model.backbone.num_prefix_tokens, kept)
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
