"""The seam into timm: a ViT that sees only some of its patches, and what its tokens tell.

No forward of timm is copied. A ViT without its dropped tokens is the same ViT run on a
narrower image (the kept patches side by side) with the position rows of those patches,
so LayerScale, registers, distillation tokens and any block type are timm's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from timm.layers import PatchEmbed
from timm.layers.attention import Attention
from timm.layers.attention_pool import AttentionPoolLatent
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.func import functional_call


def is_token_model(backbone: nn.Module) -> bool:
    """Whether tokens of `backbone` stand for single patches and can be left out."""
    return isinstance(backbone, VisionTransformer) and type(backbone.patch_embed) is PatchEmbed


def to_patches(images: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """Cut images (b, c, h, w) into patches (b, n, c, ph, pw), row by row."""
    b, c, h, w = images.shape
    ph, pw = patch_size
    tiles = images.view(b, c, h // ph, ph, w // pw, pw)
    return tiles.permute(0, 2, 4, 1, 3, 5).reshape(b, -1, c, ph, pw)


def to_images(patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """Put all patches (b, n, c, ph, pw) together to images (b, c, h, w); undoes `to_patches`."""
    b, _, c, ph, pw = patches.shape
    gh, gw = grid
    tiles = patches.view(b, gh, gw, c, ph, pw)
    return tiles.permute(0, 3, 1, 4, 2, 5).reshape(b, c, gh * ph, gw * pw)


def roll_images(images: Tensor, shift: Tensor) -> Tensor:
    """Each image (b, c, h, w) shifted cyclically by its own (rows, columns) of `shift` (b, 2), in pixels."""
    b, c, h, w = images.shape
    y = (torch.arange(h, device=shift.device) - shift[:, :1]) % h
    x = (torch.arange(w, device=shift.device) - shift[:, 1:]) % w
    return images.gather(2, y[:, None, :, None].expand(b, c, h, w)).gather(3, x[:, None, None].expand(b, c, h, w))


def take(values: Tensor, indices: Tensor) -> Tensor:
    """Rows `indices` (b, k) of `values` (b, n, ...): (b, k, ...)."""
    shape = indices.shape + (1,) * (values.ndim - 2)
    return values.gather(1, indices.view(shape).expand(*indices.shape, *values.shape[2:]))


def put(values: Tensor, indices: Tensor, rows: Tensor) -> Tensor:
    """A copy of `values` (b, n, ...) with `rows` (b, k, ...) at `indices` (b, k)."""
    shape = indices.shape + (1,) * (values.ndim - 2)
    return values.scatter(1, indices.view(shape).expand(rows.shape), rows)


def forward_patches(vit: VisionTransformer, patches: Tensor, positions: Tensor) -> Tensor:
    """Logits of a ViT that is shown only some patches.

    Args:
        vit: a token model (`is_token_model`).
        patches: (b, k, c, ph, pw) normalised pixels.
        positions: (b, k) int64, the place of each patch on the grid.

    Returns:
        (b, classes) logits. Equal to dropping the other tokens after the position
        embedding; with all patches it is the untouched model, bit for bit.
    """
    b, k, c, ph, pw = patches.shape
    gh, gw = vit.patch_embed.grid_size
    if k == gh * gw:
        empty = patches.new_empty(patches.shape)
        return vit(to_images(put(empty, positions, patches), (gh, gw)))
    strip = patches.permute(0, 2, 3, 1, 4).reshape(b, c, ph, k * pw)
    if vit.pos_embed is None:
        with _any_width(vit):
            return vit(strip)
    prefix = 0 if vit.no_embed_class else vit.num_prefix_tokens
    table = vit.pos_embed[0]
    rows = torch.cat([table[:prefix].expand(b, -1, -1), table[prefix:][positions]], dim=1)
    with _any_width(vit):
        return functional_call(vit, {"pos_embed": rows}, (strip,))


@contextmanager
def _any_width(vit: VisionTransformer) -> Iterator[None]:
    """Let the patch embedding take a strip of patches instead of a whole image."""
    changes: list[tuple[Any, str, Any]] = [
        (vit.patch_embed, "img_size", None),
        (vit.patch_embed, "flatten", True),
        (vit, "dynamic_img_size", False),
    ]
    before = [getattr(owner, name) for owner, name, _ in changes]
    try:
        for owner, name, value in changes:
            setattr(owner, name, value)
        yield
    finally:
        for (owner, name, _), value in zip(changes, before, strict=True):
            setattr(owner, name, value)


@contextmanager
def token_features(vit: VisionTransformer) -> Iterator[list[Tensor]]:
    """Collects the tokens (b, prefix + k, d) that enter the first block and that leave each one."""
    outputs: list[Tensor] = []

    def collect(_module: nn.Module, _args: Any, output: Tensor) -> None:
        outputs.append(output)

    handles = [vit.blocks[0].register_forward_pre_hook(lambda _module, args: outputs.append(args[0]))]
    handles += [block.register_forward_hook(collect) for block in vit.blocks]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def reads_attention(vit: VisionTransformer) -> bool:
    """Whether `attention_to_patches` knows this model's pooling and attention."""
    if isinstance(vit.attn_pool, AttentionPoolLatent):
        return True
    attention = getattr(vit.blocks[-1], "attn", None)
    return vit.attn_pool is None and type(attention) is Attention


@torch.no_grad()
def attention_to_patches(vit: VisionTransformer, patches: Tensor, positions: Tensor) -> Tensor:
    """How much the pooled output of a ViT attends to each shown patch.

    One extra forward; fused attention stays on in it. [CLS] pooling takes the [CLS] row of
    the last block, average and maximum pooling the mean attention received from the patch
    tokens, attention pooling the pool's own weights; each is a mean over heads.

    Returns:
        (b, k) non-negative weights.
    """
    module: Any = vit.attn_pool if vit.attn_pool is not None else vit.blocks[-1].attn
    inputs: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _module, args: inputs.append(args[0]))
    try:
        forward_patches(vit, patches, positions)
    finally:
        handle.remove()
    tokens = inputs[-1]
    if isinstance(module, AttentionPoolLatent):
        weights = _pool_attention(module, tokens)
        return weights if tokens.shape[1] == patches.shape[1] else weights[:, vit.num_prefix_tokens :]
    weights = _self_attention(module, tokens, first_query_only=vit.global_pool == "token")
    if vit.global_pool != "token":
        weights = weights[:, vit.num_prefix_tokens :]
    return weights.mean(1)[:, vit.num_prefix_tokens :]


def _self_attention(module: Attention, tokens: Tensor, first_query_only: bool) -> Tensor:
    """Attention weights (b, queries, tokens), mean over heads, from the module's own projections."""
    b, n, _ = tokens.shape
    qkv = module.qkv(tokens).reshape(b, n, 3, module.num_heads, module.head_dim).permute(2, 0, 3, 1, 4)
    q, k = module.q_norm(qkv[0]), module.k_norm(qkv[1])
    q = q[:, :, :1] if first_query_only else q
    return ((q * module.scale) @ k.transpose(-2, -1)).softmax(-1).mean(1)


def _pool_attention(pool: AttentionPoolLatent, tokens: Tensor) -> Tensor:
    """Weights (b, tokens) that an attention pool gives, mean over heads and latents."""
    b, n, _ = tokens.shape
    if pool.pos_embed is not None:
        tokens = tokens + pool.pos_embed[None]
    q = pool.q(pool.latent.expand(b, -1, -1)).reshape(b, -1, pool.num_heads, pool.head_dim).transpose(1, 2)
    k = pool.kv(tokens).reshape(b, n, 2, pool.num_heads, pool.head_dim)[:, :, 0].transpose(1, 2)
    q, k = pool.q_norm(q), pool.k_norm(k)
    return ((q * pool.scale) @ k.transpose(-2, -1)).softmax(-1).mean((1, 2))
