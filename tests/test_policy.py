"""Which architectures are let in, unless the server says otherwise."""

import pytest
import timm
import torch

from smi_fed.models import ModelSpec, architecture_of, build_model, count_parameters
from smi_fed.policy import DEFAULT_ARCHITECTURES, PATTERNS, AdmissionPolicy
from smi_fed.strategies.admission import check_model
from smi_fed.strategies.allow_list import Expectation
from smi_fed.strategies.records import BadReplyError
from smi_fed.tuning import trained_weights

FAMILIES = {
    "dinov2": "vit_small_patch14_dinov2", "registers": "vit_small_patch14_reg4_dinov2",
    "dinov3": "vit_small_patch16_dinov3", "clip": "vit_base_patch16_clip_224", "siglip": "vit_base_patch16_siglip_224",
    "eva-02": "eva02_tiny_patch14_224", "deit iii": "deit3_small_patch16_224", "swin": "swin_tiny_patch4_window7_224",
    "lite": "tf_efficientnet_lite0", "convnext": "convnext_tiny", "resnet": "resnet50",
}  # fmt: skip
EXPECTED = Expectation(ModelSpec("resnet18", 9), 3)


def admitted(spec):
    """The model without memory, as the server sees it first."""
    return check_model(architecture_of(spec).to_json(), AdmissionPolicy(), EXPECTED)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_pattern_names_something_that_timm_has(pattern):
    assert set(timm.list_models(pattern)) <= set(DEFAULT_ARCHITECTURES)
    assert timm.list_models(pattern)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_let_in_and_can_be_tuned(family):
    model = admitted(ModelSpec(FAMILIES[family], 9))
    assert len(trained_weights(model, "last:2")) > len(trained_weights(model, "head")) > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", DEFAULT_ARCHITECTURES)
def test_every_name_is_let_in(name):
    assert count_parameters(admitted(ModelSpec(name, 9))) <= AdmissionPolicy().max_parameters


def test_images_to_518_pixels():
    """What DINOv2 was trained at last."""
    assert admitted(ModelSpec("vit_small_patch14_dinov2", 9)).image_size == (518, 518)
    assert admitted(ModelSpec("vit_small_patch14_dinov2", 9, 112)).image_size == (112, 112)
    with pytest.raises(BadReplyError, match=r"allowed: at most 518"):
        admitted(ModelSpec("vit_small_patch14_dinov2", 9, 532))


@pytest.mark.parametrize("start", [None, "pretrained", "/data/dinov2.safetensors"])
def test_a_tagged_name_is_let_in_by_its_architecture(start):
    model = admitted(ModelSpec("vit_small_patch14_dinov2.lvd142m", 9, 112, start=start))
    with torch.device("meta"):
        plain = build_model(ModelSpec("vit_small_patch14_dinov2", 9, 112))
    assert model.spec.name == "vit_small_patch14_dinov2"
    assert model.state_dict().keys() == plain.state_dict().keys()
