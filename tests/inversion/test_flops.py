import pytest
import torch

from smi_fed.inversion import InversionConfig
from smi_fed.inversion.flops import trajectory_flops
from smi_fed.models import ModelSpec, build_model
from tests.models import masked_model, small_vit


def counted_by_hand(model, tokens):
    """FLOPs of one forward and one backward to the pixels."""
    vit = model.backbone
    width, depth = vit.embed_dim, len(vit.blocks)
    patches = tokens - vit.num_prefix_tokens
    linear = 2 * (patches * 3 * 4 * 4 * width + depth * tokens * 12 * width**2 + width * vit.num_classes)
    attention = 2 * depth * 2 * tokens**2 * width
    return 2 * linear + 3.5 * attention  # fused attention's backward is five products to the forward's two


@pytest.mark.parametrize("kept", [16, 8])
def test_a_stage_costs_what_its_tokens_cost(kept):
    model = small_vit()
    schedule = "" if kept == 16 else "0:0.5"
    config = InversionConfig.paper(iterations=1, schedule=schedule, selection="random", jitter=0, flip=False)
    assert trajectory_flops(model, config) == counted_by_hand(model, kept + 1)


@pytest.mark.parametrize(("name", "saved"), [("deit_base_patch16_224", 0.748), ("deit_tiny_patch16_224", 0.774)])
def test_the_papers_schedule_saves_what_the_readme_says(name, saved):
    with torch.device("meta"):
        model = build_model(ModelSpec(name, num_classes=1000))
    sparse, dense = (trajectory_flops(model, each) for each in (InversionConfig.paper(), InversionConfig.dense()))
    assert 1 - sparse / dense == pytest.approx(saved, abs=0.001)
    assert 1 - sparse / dense >= 0.7409 or "tiny" in name


def test_a_masked_model_saves_nothing():
    model = masked_model("resnet")
    config = InversionConfig.paper(iterations=4, schedule="1:0.5", selection="random", jitter=0, flip=False)
    dense = InversionConfig.dense(iterations=4, jitter=0, flip=False)
    assert trajectory_flops(model, config) == trajectory_flops(model, dense)
