"""The door of models at the edge of what is allowed: their messages are small, and nothing in them is a lie."""

from random import Random

import torch

from smi_fed.models import ModelSpec
from smi_fed.strategies import admission, records
from smi_fed.strategies.records import BadReplyError
from tests.fuzz.door import MEBIBYTE, Case, Door
from tests.fuzz.replies import size_of
from tests.fuzz.server import CPU, EXPECTED, POLICY, require_sound

TOKENS = (
    "vit_tiny_patch16_224", "deit3_small_patch16_224", "beitv2_base_patch16_224", "eva02_tiny_patch14_224",
    "vit_small_patch16_rope_224", "vit_small_patch16_dinov3", "vit_base_patch16_siglip_224",
    "deit_tiny_distilled_patch16_224", "vit_base_patch16_clip_224",
)  # fmt: skip
WINDOWS = ("swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256")
OTHERS = ("resnet10t", "convnext_atto", "mobilenetv3_large_100", "regnety_016", "efficientnet_b0")


def spec_of(rng: Random) -> ModelSpec:
    """A model with few weights and much to do."""
    kind, size = rng.random(), rng.choice((64, 224, 256, 384, 504, 512, 518))
    if kind < 0.15:
        return ModelSpec(rng.choice(OTHERS), 3, image_size=size)
    heads = rng.choice((1, 2, 4, 16, 32))
    if kind < 0.4:
        windows = {"window_size": rng.choice((4, 7, 8, 16)), "patch_size": rng.choice((1, 2, 4)), "embed_dim": heads}
        depths = rng.choice(((1, 1), (2, 1), (1, 1, 1, 1), (2, 2, 2, 2)))
        stages = {"depths": depths, "num_heads": tuple(heads for _ in depths)}
        windows["embed_dim"] = max(8, heads)
        return ModelSpec(rng.choice(WINDOWS), 3, kwargs={"img_size": size, **windows, **stages})
    kwargs = {
        "img_size": size, "patch_size": rng.choice((4, 7, 8, 14, 16)), "embed_dim": 2 * max(4, heads),
        "num_heads": heads, "depth": rng.choice((1, 1, 1, 2, 4)), "mlp_ratio": rng.choice((0.5, 1.0, 8.0)),
    }  # fmt: skip
    return ModelSpec(rng.choice(TOKENS), 3, kwargs=kwargs)


def extreme(rng: Random) -> Case:
    spec, weights = spec_of(rng), {}
    try:
        expected = admission.check_model(spec.to_json(), POLICY, EXPECTED).state_dict()
        draw = torch.Generator().manual_seed(rng.getrandbits(32))
        for key, like in expected.items():
            numbers = torch.randn(like.shape, generator=draw) if like.is_floating_point() else torch.zeros(like.shape)
            weights[key] = (0.02 * numbers).abs().to(like.dtype)
    except BadReplyError:
        weights = {"x": torch.zeros(1)}
    content = records.pack_reply(spec, weights, num_examples=6, train_loss=0.5)

    def enter() -> None:
        teacher = admission.admit(records.read_reply(content), POLICY, EXPECTED, CPU)
        require_sound(teacher, teacher.spec.name)

    return Case(size_of(content), enter)


DOORS = (Door("extremes", "models at the edge of what is allowed", extreme, 0.4, memory=1024 * MEBIBYTE, seconds=60.0),)
