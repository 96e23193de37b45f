import json
from dataclasses import replace

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st

from smi_fed.checks import SettingError
from smi_fed.models import SCHEMA_VERSION, ModelSpec, build_model, count_parameters, input_channels
from tests.models import TINY, randomised, small_spec, small_vit

VIT = "vit_tiny_patch16_224"
NARROW = {"embed_dim": 24, "depth": 1, "num_heads": 2}
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def on_meta(*args, **kwargs):
    with torch.device("meta"):
        return build_model(ModelSpec(*args, **kwargs))


def test_lists_become_tuples_and_names_texts():
    spec = ModelSpec(VIT, 2, mean=[0, 1, 0.5], std=[1, 1, 1], class_names=[7, "b"])
    assert spec == ModelSpec(VIT, 2, mean=(0.0, 1.0, 0.5), std=(1.0, 1.0, 1.0), class_names=("7", "b"))
    assert all(type(x) is float for x in spec.mean + spec.std)


def test_a_spec_keeps_its_own_kwargs():
    kwargs = {"depth": 3}
    spec = ModelSpec(VIT, 2, kwargs=kwargs)
    kwargs["depth"] = 4
    assert spec.kwargs == {"depth": 3}
    assert ModelSpec(VIT, 2).kwargs == {}


kwargs_values = st.integers() | st.booleans() | st.text(max_size=5) | st.lists(st.integers(), max_size=3)
finite = st.floats(-10, 10)


@st.composite
def specs(draw):
    classes, channels = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    several = {"min_size": channels, "max_size": channels}
    return ModelSpec(
        name=draw(st.text(st.characters(exclude_characters=":", exclude_categories=["Cs"]), min_size=1)),
        num_classes=classes,
        image_size=draw(st.none() | st.integers(1, 512)),
        kwargs=draw(st.dictionaries(st.text(max_size=5), kwargs_values, max_size=3)),
        mean=draw(st.none() | st.lists(finite, **several)),
        std=draw(st.none() | st.lists(st.floats(1e-3, 10), **several)),
        class_names=draw(st.none() | st.lists(st.text(), min_size=classes, max_size=classes)),
    )


@given(specs())
def test_json_gives_back_the_spec(spec):
    assert ModelSpec.from_json(spec.to_json()) == spec
    assert json.loads(spec.to_json())["schema"] == SCHEMA_VERSION


def change(**changes):
    return json.dumps({**json.loads(ModelSpec(VIT, 3).to_json()), **changes})


@pytest.mark.parametrize(
    ("text", "key", "says"),
    [
        ("{", "spec", "JSON text"), ("", "spec", "JSON text"), (None, "spec", "JSON text"),
        ("[1]", "spec", "a JSON object"), ("3", "spec", "a JSON object"),
        (change(schema=99), "spec.schema", f"got 99, allowed: version {SCHEMA_VERSION}"),
        (change(schema="1"), "spec.schema", f"got '1', allowed: version {SCHEMA_VERSION}"),
        ('{"name": "a", "num_classes": 2}', "spec.schema", f"got None, allowed: version {SCHEMA_VERSION}"),
        (change(num_classes=0), "spec.num_classes", "got 0, allowed: an int >= 1"),
        (change(mean=0.5), "spec.mean", "got 0.5"), (change(std=[0]), "spec.std", "got [0]"),
        (change(colour="red"), "spec.colour", "got 'red', allowed: a key of the configuration: name | num_classes"),
        ('{"schema": 1, "name": "a"}', "spec.num_classes", "got None, allowed: a value, it has no default"),
    ],
)  # fmt: skip
def test_json_that_is_no_spec(text, key, says):
    with pytest.raises(SettingError) as error:
        ModelSpec.from_json(text)
    assert error.value.key == key
    assert says in str(error.value)


@pytest.mark.parametrize("kwargs", [{}, {"dynamic_img_size": True}])
def test_a_vit_takes_its_size_from_image_size(kwargs):
    model = build_model(ModelSpec(VIT, 5, image_size=32, kwargs={**NARROW, "patch_size": 8, **kwargs}))
    assert model.image_size == (32, 32)
    assert model.backbone.patch_embed.img_size == (32, 32)
    assert model.backbone.patch_embed.grid_size == (4, 4)
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 5)


@pytest.mark.parametrize(
    ("image_size", "img_size", "correct"),
    [(None, 16, (16, 16)), (16, 16, (16, 16)), (None, (16, 32), (16, 32)), (16, (16, 16), (16, 16))],
)
def test_img_size_alone_or_with_image_size(image_size, img_size, correct):
    model = build_model(ModelSpec(VIT, 5, image_size, {**TINY, "img_size": img_size}))
    assert model.image_size == correct
    assert model(torch.rand(1, 3, *correct)).shape == (1, 5)


@pytest.mark.parametrize("size", [32, 64])
def test_a_resnet_by_image_size(size):
    model = build_model(ModelSpec("resnet10t", 5, image_size=size)).eval()
    assert model.image_size == (size, size)
    assert model(torch.rand(1, 3, size, size)).shape == (1, 5)


def test_a_swin_by_image_size():
    kwargs = {"window_size": 4, "embed_dim": 12, "depths": [1, 1], "num_heads": [1, 2]}
    model = build_model(ModelSpec("swin_tiny_patch4_window7_224", 5, image_size=32, kwargs=kwargs))
    assert model.image_size == (32, 32)
    assert model(torch.rand(1, 3, 32, 32)).shape == (1, 5)


@pytest.mark.parametrize(
    ("name", "classes", "patches"), [("deit_tiny_patch16_224", 1000, 196), ("vit_base_patch32_384", 10, 144)]
)
def test_no_arguments_take_timms_defaults(name, classes, patches):
    model = on_meta(name, num_classes=classes, kwargs={})
    size = timm.get_pretrained_cfg(name).input_size[-1]
    assert model.image_size == (size, size)
    assert model.backbone.patch_embed.num_patches == patches
    logits = model(torch.empty(2, 3, size, size, device="meta"))
    assert logits.shape == (2, classes)


def test_meta_takes_no_memory():
    model = on_meta("vit_giant_patch14_224", num_classes=1000, image_size=224)
    assert count_parameters(model) > 10**9
    assert all(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])


def test_parameters_are_counted():
    model = build_model(ModelSpec("resnet10t", 5))
    assert count_parameters(model) == sum(weight.numel() for weight in dict(model.named_parameters()).values())
    assert count_parameters(torch.nn.Linear(3, 2)) == 8


@pytest.mark.parametrize(("name", "kwargs"), [(VIT, TINY), ("resnet10t", {})])
def test_one_channel(name, kwargs):
    model = build_model(ModelSpec(name, 5, kwargs={**kwargs, "in_chans": 1})).eval()
    assert input_channels(model.backbone) == 1
    assert model.mean.shape == model.std.shape == (1, 1, 1)
    assert model(torch.rand(2, 1, 16, 16)).shape == (2, 5)


@pytest.mark.parametrize(
    ("name", "correct"),
    [(VIT, ((0.5,) * 3, (0.5,) * 3)), ("deit_tiny_patch16_224", IMAGENET), ("vit_base_patch16_clip_224", None)],
)
def test_mean_and_std_are_timms(name, correct):
    model = build_model(small_spec(name))
    mean, std = correct or (timm.get_pretrained_cfg(name).mean, timm.get_pretrained_cfg(name).std)
    torch.testing.assert_close(model.mean.flatten(), torch.tensor(mean))
    torch.testing.assert_close(model.std.flatten(), torch.tensor(std))


def test_mean_and_std_of_other_channels_are_averaged():
    model = build_model(small_spec("deit_tiny_patch16_224", in_chans=2))
    for own, all_three in zip((model.mean, model.std), IMAGENET, strict=True):
        torch.testing.assert_close(own.flatten(), torch.full((2,), sum(all_three) / 3))


def test_the_specs_own_mean_and_std_come_first():
    model = build_model(replace(small_spec("deit_tiny_patch16_224"), mean=(0.1, 0.2, 0.3)))
    torch.testing.assert_close(model.mean.flatten(), torch.tensor([0.1, 0.2, 0.3]))
    torch.testing.assert_close(model.std.flatten(), torch.tensor(IMAGENET[1]))


@pytest.mark.parametrize("key", ["mean", "std"])
def test_mean_and_std_have_one_value_per_channel(key):
    with pytest.raises(SettingError, match=f"{key}: got .*3 values, one per input channel"):
        build_model(replace(small_spec(), **{key: (0.5, 0.5)}))


def test_images_in_0_to_1_are_normalised_by_the_model():
    model = randomised(build_model(replace(small_spec(), mean=(0.1, 0.5, 0.9), std=(0.2, 0.5, 2.0))))
    images = torch.rand(2, 3, 16, 16)
    by_hand = torch.stack([(images[:, c] - m) / s for c, (m, s) in enumerate([(0.1, 0.2), (0.5, 0.5), (0.9, 2.0)])], 1)
    torch.testing.assert_close(model(images), model.backbone(by_hand))
    assert not torch.allclose(model(images), model.backbone(images), atol=1e-3)


def test_mean_and_std_are_no_weights():
    model = small_vit()
    assert {name.split(".")[0] for name in model.state_dict()} == {"backbone"}
    assert model.double().mean.dtype == torch.float64


@pytest.mark.parametrize("name", ["vit_tinny", "", "vit tiny"])
def test_an_unknown_architecture(name):
    with pytest.raises(SettingError, match="allowed: a timm model name") as error:
        build_model(ModelSpec(name, 5))
    assert (error.value.key, error.value.got) == ("name", name)


@pytest.mark.parametrize(
    ("name", "kwargs", "says"),
    [
        (VIT, {"widht": 3}, "widht"),
        (VIT, {**NARROW, "num_heads": 5}, "num_heads"),
        ("resnet10t", {"patch_size": 4}, "patch_size"),
        ("resnet10t", {"img_size": 32}, "img_size"),
    ],
)
@pytest.mark.parametrize("image_size", [None, 32])
def test_an_argument_that_is_not_taken(name, kwargs, says, image_size):
    with pytest.raises(SettingError, match=f"what {name} takes .*{says}") as error:
        build_model(ModelSpec(name, 5, image_size, kwargs))
    assert error.value.key == "kwargs"
    assert error.value.got.items() >= kwargs.items()


@pytest.mark.parametrize(
    ("image_size", "kwargs", "patch"),
    [
        (None, {**TINY, "patch_size": 3}, 3), (None, {**TINY, "patch_size": 0}, 0),
        (None, {**TINY, "patch_size": -4}, -4), (None, {**TINY, "patch_size": 4.0}, 4.0),
        (None, {**TINY, "patch_size": "4"}, "4"), (None, {**TINY, "patch_size": (4, 3)}, (4, 3)),
        (None, {**TINY, "img_size": "16"}, 4), (None, {**TINY, "img_size": 16.0}, 4),
        (None, {**TINY, "img_size": (16, 18)}, 4),
        (40, NARROW, (16, 16)), (None, {**NARROW, "img_size": 40}, (16, 16)),
    ],
)  # fmt: skip
def test_a_patch_size_that_does_not_divide(image_size, kwargs, patch):
    with pytest.raises(SettingError, match=r"patch_size: got .*an int that divides the image size") as error:
        build_model(ModelSpec(VIT, 5, image_size, kwargs))
    assert error.value.got == patch


@pytest.mark.parametrize("img_size", [16, (32, 16), [16, 32]])
def test_sizes_that_contradict_each_other(img_size):
    with pytest.raises(SettingError, match=r"kwargs.img_size: got .*allowed: image_size, 32"):
        build_model(ModelSpec(VIT, 5, 32, {**TINY, "img_size": img_size}))


@pytest.fixture
def checkpoint(tmp_path):
    theirs = randomised(timm.create_model(VIT, num_classes=5, **TINY))
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    return theirs, str(tmp_path / "theirs.pth")


@pytest.mark.parametrize("image_size", [None, 16])
def test_weights_from_a_local_checkpoint(checkpoint, image_size):
    theirs, path = checkpoint
    kwargs = {**TINY, "checkpoint_path": path}
    if image_size:
        del kwargs["img_size"]
    model = build_model(ModelSpec(VIT, 5, image_size, kwargs)).eval()
    weights = model.backbone.state_dict()
    assert all(torch.equal(weights[key], value) for key, value in theirs.state_dict().items())
    images = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(model(images), theirs((images - 0.5) / 0.5))


def test_a_checkpoint_of_another_shape(checkpoint):
    with pytest.raises(SettingError, match=r"kwargs.checkpoint_path: got .*cls_token is \(1, 1, 24\), expected \("):
        build_model(ModelSpec(VIT, 5, kwargs={**TINY, "embed_dim": 12, "checkpoint_path": checkpoint[1]}))


def test_a_checkpoint_that_is_not_there(tmp_path):
    path = str(tmp_path / "no.pth")
    with pytest.raises(SettingError, match=r"kwargs\.checkpoint_path: got .*no\.pth', allowed: a file of weights"):
        build_model(ModelSpec(VIT, 5, kwargs={**TINY, "checkpoint_path": path}))


def test_the_classifier_remembers_its_spec():
    assert small_vit().spec == small_spec()
