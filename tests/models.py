"""Small models of many kinds, with weights that are not symmetric."""

import torch

from smi_fed.models import Classifier, ModelSpec, build_model

TINY = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}

TOKEN_MODELS = {
    "plain": ("vit_tiny_patch16_224", {}),
    "layerscale": ("vit_tiny_patch16_224", {"init_values": 0.5}),
    "registers": ("vit_small_patch14_reg4_dinov2", {}),
    "distilled": ("deit_tiny_distilled_patch16_224", {}),
    "average pooled": ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}),
    "attention pooled": ("vit_base_patch16_siglip_224", {}),
    "clip": ("vit_base_patch16_clip_224", {}),
    "no embed class": ("vit_tiny_patch16_224", {"no_embed_class": True}),
    "dynamic size": ("vit_tiny_patch16_224", {"dynamic_img_size": True}),
    "qk norm": ("vit_tiny_patch16_224", {"qk_norm": True}),
    "eva": ("eva_giant_patch14_224", {}),
    "eva02": ("eva02_tiny_patch14_224", {}),
    "rotary": ("vit_small_patch16_rope_224", {"num_heads": 3}),
    "rotary mixed": ("vit_small_patch16_rope_mixed_ape_224", {"num_heads": 3}),
    "rotary dynamic size": ("vit_small_patch16_rope_224", {"num_heads": 3, "dynamic_img_size": True}),
    "rotary registers": ("vit_medium_patch16_rope_reg1_gap_256", {"num_heads": 3}),
    "dinov3": ("vit_small_patch16_dinov3", {"num_heads": 3}),
    "dinov3 cls": ("vit_small_patch16_dinov3_qkvb", {"num_heads": 3, "global_pool": "token"}),
    "perception encoder": ("vit_pe_core_tiny_patch16_384", {"num_heads": 3, "attn_pool_num_heads": 3}),
    "shared keys": ("vit_base_patch16_sapiens2", {"num_kv_heads": 1}),
}
MASKED_MODELS = {
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"img_size": 32, "window_size": 4, "embed_dim": 12, "depths": (1, 1), "num_heads": (1, 2)},
    ),
    "resnet": ("resnet10t", {}),
}


def small_spec(name: str = "vit_tiny_patch16_224", num_classes: int = 5, **kwargs) -> ModelSpec:
    return ModelSpec(name, num_classes=num_classes, kwargs={**TINY, **kwargs})


def small_vit(seed: int = 0, **kwargs) -> Classifier:
    return randomised(build_model(small_spec(**kwargs)), seed)


def token_model(kind: str) -> Classifier:
    name, kwargs = TOKEN_MODELS[kind]
    return randomised(build_model(small_spec(name, **kwargs)))


def masked_model(kind: str) -> Classifier:
    name, kwargs = MASKED_MODELS[kind]
    return randomised(build_model(ModelSpec(name, num_classes=5, image_size=32, kwargs=kwargs)))


def randomised(model: Classifier, seed: int = 0) -> Classifier:
    """Weights of a size that matters: timm starts heads and positions near zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(1 + 0.1 * noise if "norm" in name and name.endswith("weight") else 0.15 * noise)
    return model.eval()
