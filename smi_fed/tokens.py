"""The seam into timm: a ViT that sees only some of its patches, and what its tokens tell.

No forward of timm is copied. A ViT without its dropped tokens is the same ViT run on a
narrower image (the kept patches side by side) with the position rows of those patches,
so LayerScale, registers, distillation tokens and any block type are timm's own. Rotary
embeddings are made for the whole grid and gathered by timm at its `patch_drop` seam.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from timm.layers import PatchEmbed
from timm.layers.attention import Attention, AttentionRope
from timm.layers.attention_pool import AttentionPoolLatent
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from timm.models.eva import Eva, EvaAttention
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.func import functional_call

from smi_fed.checks import require
from smi_fed.wrappers import REMEDY, unwrapped

TokenModel = VisionTransformer | Eva

LARGEST_ATTENTION = 2**26
"""Attention weights that are held at once; those of all queries of a fine grid would fill a machine."""


def is_token_model(backbone: nn.Module) -> bool:
    """Whether tokens of `backbone` stand for single patches and can be left out.

    So it is where positions are added to tokens or rotate them (plain ViTs, DeiT, EVA, rotary
    ViTs, DINOv3, Perception Encoder). Relative position biases, windows and embeddings that
    overlap belong to the whole grid.
    """
    return isinstance(backbone, TokenModel) and type(unwrapped(backbone.patch_embed)) is PatchEmbed


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


def forward_patches(vit: TokenModel, patches: Tensor, positions: Tensor) -> Tensor:
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
    weights: dict[str, Tensor] = {}
    if vit.pos_embed is not None:
        prefix = 0 if vit.no_embed_class else vit.num_prefix_tokens
        table = vit.pos_embed[0]
        weights["pos_embed"] = torch.cat([table[:prefix].expand(b, -1, -1), table[prefix:][positions]], dim=1)
    with _replaced(_for_a_strip(vit, positions)):
        return functional_call(vit, weights, (strip,))


Change = tuple[nn.Module, str, Any]


def _for_a_strip(vit: TokenModel, positions: Tensor) -> list[Change]:
    """What lets a model take a strip of the patches of `positions` (b, k) instead of a whole image."""
    embed = unwrapped(vit.patch_embed)
    changes: list[Change] = [
        (embed, "img_size", None),
        (embed, "flatten", True),
        (vit, "dynamic_img_size", False),
    ]
    rope = getattr(vit, "rope", None)
    if rope is not None:
        changes.append((vit, "patch_drop", _keeping(positions, vit.patch_drop)))
    if rope is not None and vit.dynamic_img_size:
        # It keeps no embedding, and would make one of the strip's size.
        whole = SimpleNamespace(get_embed=partial(rope.get_embed, shape=vit.patch_embed.grid_size))
        changes.append((vit, "rope", whole))
    return changes


def _keeping(positions: Tensor, dropout: nn.Module | None) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """An Eva `patch_drop` for tokens (b, prefix + k, d) that says which ones of the grid they are."""

    def keep(x: Tensor) -> tuple[Tensor, Tensor]:
        x, chosen = (x, None) if dropout is None else dropout(x)
        return x, positions if chosen is None else positions.gather(1, chosen)

    return keep


@contextmanager
def _replaced(changes: list[Change]) -> Iterator[None]:
    """Attributes of modules as `changes` says inside, as they were afterwards."""
    with ExitStack() as after:
        for owner, name, value in changes:
            # An entry here hides a submodule of that name, which stays registered in its place.
            own = vars(owner)
            after.callback(own.__setitem__, name, own[name]) if name in own else after.callback(own.pop, name)
            own[name] = value
        yield


@contextmanager
def token_features(vit: TokenModel) -> Iterator[list[Tensor]]:
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


def reads_attention(vit: TokenModel) -> bool:
    """Whether `attention_to_patches` knows this model's pooling and attention."""
    kinds = (Attention, AttentionRope, EvaAttention) if vit.attn_pool is None else (AttentionPoolLatent,)
    return type(_attention(vit)) in kinds


def _attention(vit: TokenModel) -> Any:
    """The last attention before the head: the pool's, else the last block's."""
    if vit.attn_pool is not None:
        return unwrapped(vit.attn_pool)
    attention = getattr(unwrapped(vit.blocks[-1]), "attn", None)
    return None if attention is None else unwrapped(attention)


@torch.no_grad()
def attention_to_patches(vit: TokenModel, patches: Tensor, positions: Tensor) -> Tensor:
    """How much the pooled output of a ViT attends to each shown patch.

    One extra forward; fused attention stays on in it. [CLS] pooling takes the [CLS] row of
    the last block, average and maximum pooling the mean attention received from the patch
    tokens, attention pooling the pool's own weights; each is a mean over heads.

    Returns:
        (b, k) non-negative weights.

    Raises:
        SettingError: compiled code or a wrapper calls no hook of the attention.
    """
    module = _attention(vit)
    with _listening(module) as heard:
        forward_patches(vit, patches, positions)
    require({"q", "k", "rope"} <= heard.keys(), "model", f"one whose {type(module).__name__} cannot be heard", REMEDY)
    q, k = (heard[each].to(torch.promote_types(heard[each].dtype, torch.float32)) for each in ("q", "k"))
    if heard["rope"] is not None:
        q, k = (_rotated(module, each, heard["rope"]) for each in (q, k))
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)  # heads that share their keys
    shown = patches.shape[1]
    if vit.attn_pool is None:
        q = q[:, :, :1] if vit.global_pool == "token" else q[:, :, -shown:]
    rows = max(1, LARGEST_ATTENTION // (q.shape[0] * q.shape[1] * k.shape[2]))
    total = torch.zeros_like(k[:, 0, :, 0])
    for part in q.split(rows, dim=2):
        total = total + ((part * module.scale) @ k.transpose(-2, -1)).softmax(-1).sum((1, 2))
    return total[:, -shown:] / (q.shape[1] * q.shape[2])


@contextmanager
def _listening(attention: nn.Module) -> Iterator[dict[str, Any]]:
    """The queries and keys (b, heads, tokens, d) that a timm attention normalises, and the rotary embedding it gets."""
    heard: dict[str, Any] = {}
    norms: Any = attention

    def rope(_module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        heard["rope"] = kwargs.get("rope")

    with ExitStack() as after:
        for handle in (
            attention.register_forward_pre_hook(rope, with_kwargs=True),
            norms.q_norm.register_forward_hook(lambda _module, _args, output: heard.update(q=output)),
            norms.k_norm.register_forward_hook(lambda _module, _args, output: heard.update(k=output)),
        ):
            after.callback(handle.remove)
        yield heard


def _rotated(attention: AttentionRope | EvaAttention, x: Tensor, rope: Tensor) -> Tensor:
    """Queries or keys (b, heads, prefix + k, d) turned by their positions; prefix tokens have none."""
    prefix = attention.num_prefix_tokens
    return torch.cat([x[:, :, :prefix], apply_rot_embed_cat(x[:, :, prefix:], rope, half=attention.rotate_half)], dim=2)
