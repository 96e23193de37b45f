"""Sparse model inversion as the paper tells it, slow and plain: the oracle for `invert`.

Written from the paper's algorithm (Hu et al., 2024, sections 3.1 and 3.2), one whole image
at a time. Nothing of smi_fed's engine is used: stopped patches are held by putting their
pixels back after each step, tokens are dropped after the position embedding, attention
comes from timm's own extractor, total variation is a loop over pixel pairs.
"""

import math

import torch
from timm.utils import AttentionExtract
from torch.nn import functional as F


def plain_inversion(vit, mean, std, noise, target, iterations, stops, learning_rate, betas, tv, views):
    """One image.

    Args:
        vit: a plain timm ViT with a class token.
        noise: (c, h, w), the start in the normalised space.
        stops: {iteration: ratio}.
        views: iteration -> (rows, columns, mirrored), a shift in pixels while dense and in
            patches afterwards.

    Returns:
        pixels (c, h, w) in [0, 1], kept patches as a sorted list, last logits.
    """
    patch = vit.patch_embed.patch_size[0]
    rows, columns = vit.patch_embed.grid_size
    image = noise.clone()
    low, high = (0 - mean) / std, (1 - mean) / std
    image = torch.minimum(torch.maximum(image, low), high)
    kept = list(range(rows * columns))
    first, second = torch.zeros_like(image), torch.zeros_like(image)
    for iteration in range(iterations):
        if iteration in stops:
            count = max(1, math.floor(len(kept) * (1 - stops[iteration]) + 1e-9))
            scores = class_attention(vit, image, kept)
            best = sorted(range(len(kept)), key=lambda i: -scores[i])[:count]
            kept = sorted(kept[i] for i in best)
        held = image.clone()
        leaf = image.clone().requires_grad_()
        shift_rows, shift_columns, mirrored = views(iteration)
        step = patch if len(kept) < rows * columns else 1
        view = torch.roll(leaf, (shift_rows * step, shift_columns * step), (1, 2))
        places = kept
        if step == patch:
            places = [
                (p // columns + shift_rows) % rows * columns + (p % columns + shift_columns) % columns for p in kept
            ]
        if mirrored:
            view = view.flip(2)
            places = [p // columns * columns + columns - 1 - p % columns for p in places]
        logits = forward_kept(vit, view[None], places)
        loss = F.cross_entropy(logits, torch.tensor([target])) + tv * total_variation(leaf, kept, patch, columns)
        (gradient,) = torch.autograd.grad(loss, leaf)
        first = betas[0] * first + (1 - betas[0]) * gradient
        second = betas[1] * second + (1 - betas[1]) * gradient**2
        t = iteration + 1
        update = (first / (1 - betas[0] ** t)) / ((second / (1 - betas[1] ** t)).sqrt() + 1e-8)
        image = torch.minimum(torch.maximum(image - learning_rate * update, low), high)
        inside = pixel_mask(kept, rows, columns, patch)
        image = torch.where(inside, image, held)
    return (image * std + mean).clamp(0, 1), kept, logits.detach()


def pixel_mask(kept, rows, columns, patch):
    mask = torch.zeros(rows * patch, columns * patch, dtype=torch.bool)
    for p in kept:
        top, left = p // columns * patch, p % columns * patch
        mask[top : top + patch, left : left + patch] = True
    return mask


def total_variation(image, kept, patch, columns):
    """Norm of horizontal plus norm of vertical differences inside the kept region."""
    rows = image.shape[1] // patch
    mask = pixel_mask(kept, rows, columns, patch)
    horizontal, vertical = [], []
    height, width = mask.shape
    for y in range(height):
        for x in range(width):
            if x + 1 < width and mask[y, x] and mask[y, x + 1]:
                horizontal.append(image[:, y, x + 1] - image[:, y, x])
            if y + 1 < height and mask[y, x] and mask[y + 1, x]:
                vertical.append(image[:, y + 1, x] - image[:, y, x])
    return sum(torch.stack(each).square().sum().sqrt() for each in (horizontal, vertical) if each)


def forward_kept(vit, images, places):
    """Logits with all other tokens dropped after the position embedding."""
    tokens = vit._pos_embed(vit.patch_embed(images))
    prefix = vit.num_prefix_tokens
    tokens = torch.cat([tokens[:, :prefix], tokens[:, prefix:][:, places]], dim=1)
    tokens = vit.norm(vit.blocks(vit.norm_pre(tokens)))
    return vit.forward_head(tokens)


def class_attention(vit, image, kept):
    """Attention of the class token to each kept patch in the last block, mean over heads."""

    class Kept(torch.nn.Module):
        def forward(self, tokens):
            prefix = vit.num_prefix_tokens
            return torch.cat([tokens[:, :prefix], tokens[:, prefix:][:, kept]], dim=1)

    before = vit.patch_drop
    vit.patch_drop = Kept()
    try:
        return attention_map(vit, image)[0, vit.num_prefix_tokens :].tolist()
    finally:
        vit.patch_drop = before


def attention_map(vit, image):
    """The last block's attention (tokens, tokens), mean over heads, by timm's own extractor."""
    fused = [block.attn.fused_attn for block in vit.blocks]
    try:
        for block in vit.blocks:
            block.attn.fused_attn = False
        extract = AttentionExtract(vit, names=[f"blocks.{len(vit.blocks) - 1}.attn.softmax"], method="fx")
        with torch.no_grad():
            (attention,) = extract(image[None]).values()
    finally:
        for block, flag in zip(vit.blocks, fused, strict=True):
            block.attn.fused_attn = flag
    return attention[0].mean(0)
