"""The patch embedding's own gradient against the convolution's."""

import pytest
import torch
from timm.layers import PatchEmbed

from smi_fed.inversion.acceleration import embedding_gradient


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", [(8, 8), (4, 12)])
def test_the_embeddings_gradient_is_the_convolutions(dtype, bias, size):
    embed = PatchEmbed(img_size=None, patch_size=4, in_chans=2, embed_dim=6, bias=bias).to(dtype)
    images = torch.randn(3, 2, *size, dtype=dtype, requires_grad=True)
    plain = embed(images)
    weights = torch.randn_like(plain)
    (expected,) = torch.autograd.grad((plain * weights).sum(), images)
    with embedding_gradient(embed):
        fast = embed(images)
        (found,) = torch.autograd.grad((fast * weights).sum(), images)
    assert torch.equal(fast, plain)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    assert "forward" not in vars(embed.proj)


def test_an_embedding_that_overlaps_keeps_its_own_gradient(vit):
    conv = vit.backbone.patch_embed.proj
    conv.stride = (2, 2)
    with embedding_gradient(vit):
        assert "forward" not in vars(conv)


def test_the_embedding_is_as_before_after_an_exception(vit):
    def interrupted():
        with embedding_gradient(vit):
            assert "forward" in vars(vit.backbone.patch_embed.proj)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert "forward" not in vars(vit.backbone.patch_embed.proj)
