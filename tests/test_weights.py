"""Files of weights: the same logits as the model that they came from, or a refusal that names the path."""

import argparse
import logging
import time

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed, resize_rel_pos_bias_table
from torch.optim.swa_utils import AveragedModel

from smi_fed.checks import SettingError
from smi_fed.models import ModelSpec, build_model
from smi_fed.report import save_student
from tests.models import TINY, randomised, small_spec, small_vit

VIT = "vit_tiny_patch16_224"
IMAGES = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def loaded(path, classes=5, name=VIT, image_size=None, **kwargs):
    return build_model(ModelSpec(name, classes, image_size, {**TINY, **kwargs, "checkpoint_path": str(path)})).eval()


@pytest.fixture
def theirs():
    return small_vit(seed=3)


def prefixed(prefix, weights):
    return {f"{prefix}{key}": value for key, value in weights.items()}


def words_inside(weights):
    return {key.replace("blocks.0.", "blocks.0._orig_mod.").replace("attn.", "attn.module."): value
            for key, value in weights.items()}  # fmt: skip


LAYOUTS = {
    "classifier": lambda model, _: model.state_dict(),
    "timm": lambda _, plain: plain,
    "state_dict": lambda _, plain: {"state_dict": plain, "epoch": 3, "optimizer": {"state": {0: {"m": torch.ones(3)}}}},
    "model": lambda model, _: {"model": model.state_dict(), "args": argparse.Namespace(lr=0.1)},
    "model_ema": lambda _, plain: {"model": {k: 0 * v for k, v in plain.items()}, "model_ema": plain},
    "state_dict_ema": lambda _, plain: {"state_dict": {k: 0 * v for k, v in plain.items()}, "state_dict_ema": plain},
    "student": lambda model, _: {"student": model.state_dict()},
    "teacher": lambda _, plain: {"teacher": prefixed("module.backbone.", plain)},
    "of another student": lambda model, plain: {"student": plain, "teacher": small_vit(embed_dim=36).state_dict()},
    "module.": lambda _, plain: prefixed("module.", plain),
    "_orig_mod.": lambda model, _: torch.compile(model).state_dict(),
    "_orig_mod.module.": lambda _, plain: prefixed("_orig_mod.module.", plain),
    "words inside": lambda _, plain: words_inside(plain),
    "lightning": lambda model, _: {"state_dict": prefixed("net.", model.state_dict())},
    "averaged": lambda model, _: AveragedModel(model.backbone).state_dict(),
    "doubles": lambda _, plain: {key: v.double() if v.is_floating_point() else v for key, v in plain.items()},
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_the_logits_are_the_checkpoints_own(tmp_path, theirs, layout, kind, caplog):
    if kind == "resnet":
        theirs = randomised(build_model(ModelSpec("resnet10t", 5, image_size=16)), seed=1)
    content = LAYOUTS[layout](theirs, theirs.backbone.state_dict())
    if kind == "resnet" and layout == "of another student":
        content["teacher"] = build_model(ModelSpec("resnet18", 5)).state_dict()
    torch.save(content, tmp_path / "theirs.pth")
    kwargs = {"checkpoint_path": str(tmp_path / "theirs.pth")} | (TINY if kind == "vit" else {})
    spec = ModelSpec(theirs.spec.name, 5, 16, kwargs)
    with caplog.at_level(logging.WARNING, "smi_fed"):
        model = build_model(spec).eval()
    torch.testing.assert_close(model(IMAGES), theirs(IMAGES), atol=1e-6, rtol=1e-6)
    assert not caplog.records


@pytest.mark.parametrize("ending", ["safetensors", "bin", "pth"])
def test_safetensors_by_any_ending_and_a_students_own_file(tmp_path, theirs, ending):
    save_file(theirs.backbone.state_dict(), tmp_path / f"theirs.{ending}")
    save_student(tmp_path / f"student.{ending}", theirs)
    for name in ("theirs", "student"):
        assert torch.equal(loaded(tmp_path / f"{name}.{ending}")(IMAGES), theirs(IMAGES))


def test_a_path_is_as_good_as_its_text(tmp_path, theirs):
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    spec = ModelSpec(VIT, 5, kwargs={**TINY, "checkpoint_path": tmp_path / "theirs.pth"})
    assert ModelSpec.from_json(spec.to_json()) == spec
    assert torch.equal(build_model(spec).eval()(IMAGES), theirs(IMAGES))


@pytest.mark.parametrize("how", ["checkpoint_path", "pretrained_cfg_overlay", "pretrained_cfg"])
@pytest.mark.parametrize("classes", [5, 7])
def test_every_way_that_timm_knows_loads_the_head_or_names_it(tmp_path, theirs, how, classes, caplog):
    path = str(tmp_path / "theirs.pth")
    torch.save(theirs.backbone.state_dict(), path)
    ways = {
        "checkpoint_path": {how: path},
        "pretrained_cfg_overlay": {"pretrained": True, how: {"file": path}},
        "pretrained_cfg": {"pretrained": True, how: {**timm.get_pretrained_cfg(VIT).to_dict(), "file": path}},
    }
    with caplog.at_level(logging.WARNING, "smi_fed"):
        model = build_model(ModelSpec(VIT, classes, kwargs={**TINY, **ways[how]})).eval()
    normalised = (IMAGES - 0.5) / 0.5
    assert torch.equal(model.backbone.forward_features(normalised), theirs.backbone.forward_features(normalised))
    if classes == 5:
        assert torch.equal(model(IMAGES), theirs(IMAGES))
        assert not caplog.records
    else:
        text = caplog.text
        assert path in text
        assert "head.weight is (5, 24), expected (7, 24), head.bias is (5,), expected (7,)" in text
        assert model.backbone.head.weight.std() > 0


@pytest.fixture
def hub(theirs, monkeypatch):
    """What the hub would send for any model: the weights of `theirs`, with a head of 1000 classes."""
    known = theirs.backbone.state_dict() | {"head.weight": torch.ones(1000, 24), "head.bias": torch.ones(1000)}
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *_, **__: dict(known))
    return known


def from_hub(classes, **kwargs):
    source = {"hf_hub_id": "timm/", "url": "", "custom_load": False}
    kwargs = {**TINY, "pretrained": True, "pretrained_cfg_overlay": source, **kwargs}
    return build_model(ModelSpec(VIT, classes, kwargs=kwargs)).eval()


def test_what_comes_from_the_hub_names_its_new_head(hub, theirs, caplog):
    model, images = from_hub(5), (IMAGES - 0.5) / 0.5
    assert torch.equal(model.backbone.forward_features(images), theirs.backbone.forward_features(images))
    assert "left at their random start, since it has no head that fits: head.weight, head.bias" in caplog.text
    assert bool(model.backbone.head.weight.isfinite().all())
    caplog.clear()
    assert torch.equal(from_hub(1000).backbone.head.weight, hub["head.weight"])
    assert not caplog.records
    grey = from_hub(1000, in_chans=1)
    correct = theirs.backbone.patch_embed.proj.weight.sum(1, keepdim=True)
    torch.testing.assert_close(grey.backbone.patch_embed.proj.weight, correct)
    with torch.device("meta"):
        from_hub(5)


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("classes", [5, 1000])
@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"depth": 3}, r"blocks\.2\.norm1\.weight is missing"),
        ({"depth": 1}, r"blocks\.1\.norm1\.weight has no place"),
        ({"embed_dim": 36}, "size mismatch"), ({"init_values": 0.1}, r"blocks\.0\.ls1\.gamma is missing"),
    ],
)  # fmt: skip
def test_a_hub_model_that_does_not_fit_is_refused(classes, kwargs, says):
    with pytest.raises(SettingError, match=f"(?s)kwargs.pretrained: got 'timm/.*{says}"):
        from_hub(classes, **kwargs)


def test_a_state_dict_in_the_arguments(theirs, caplog):
    kwargs = {**TINY, "pretrained": True, "pretrained_cfg_overlay": {"state_dict": theirs.state_dict()}}
    assert torch.equal(build_model(ModelSpec(VIT, 5, kwargs=kwargs)).eval()(IMAGES), theirs(IMAGES))
    assert not caplog.records
    foreign = {"pretrained": True, "pretrained_cfg_overlay": {"state_dict": {"a": torch.ones(2)}}}
    with pytest.raises(SettingError, match="not one tensor has a name of its own"):
        build_model(ModelSpec(VIT, 5, kwargs=TINY | foreign))


def test_a_local_directory_of_timms(tmp_path, theirs, caplog):
    from timm.models import save_for_hf

    save_for_hf(theirs.backbone, tmp_path, model_args=TINY)
    name = f"local-dir:{tmp_path}"
    assert torch.equal(build_model(ModelSpec(name, 5, kwargs={"pretrained": True})).eval()(IMAGES), theirs(IMAGES))
    build_model(ModelSpec(name, 4, kwargs={"pretrained": True}))
    assert "head.weight is (5, 24), expected (4, 24)" in caplog.text


@pytest.mark.parametrize("gone", [("head.bias",), ("head.weight", "head.bias")])
def test_a_file_without_its_head_leaves_the_head_whole(tmp_path, theirs, gone, caplog):
    weights = {key: value for key, value in theirs.backbone.state_dict().items() if key not in gone}
    torch.save(weights, tmp_path / "theirs.pth")
    model = loaded(tmp_path / "theirs.pth")
    assert all(f"{key} is missing" in caplog.text for key in gone)
    assert "head.weight" in caplog.text
    assert not torch.equal(model.backbone.head.weight, theirs.backbone.head.weight)
    assert torch.equal(model.backbone.blocks[1].mlp.fc2.weight, theirs.backbone.blocks[1].mlp.fc2.weight)


def test_both_heads_of_a_distilled_model_are_named(tmp_path, caplog):
    name = "deit_tiny_distilled_patch16_224"
    torch.save(build_model(small_spec(name)).state_dict(), tmp_path / "theirs.pth")
    loaded(tmp_path / "theirs.pth", classes=3, name=name)
    assert all(f"{head}.weight is (5, 24), expected (3, 24)" in caplog.text for head in ("head", "head_dist"))


@pytest.mark.parametrize("classes", [5, 3])
def test_positions_of_another_grid_are_resampled(tmp_path, theirs, classes):
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    model = loaded(tmp_path / "theirs.pth", classes=classes, img_size=24)
    correct = resample_abs_pos_embed(theirs.backbone.pos_embed, (6, 6), num_prefix_tokens=1)
    torch.testing.assert_close(model.backbone.pos_embed, correct)
    assert torch.equal(model.backbone.blocks[0].attn.qkv.weight, theirs.backbone.blocks[0].attn.qkv.weight)
    theirs.backbone.set_input_size(24)
    if classes == 5:
        images = torch.rand(2, 3, 24, 24)
        torch.testing.assert_close(model(images), theirs.backbone((images - 0.5) / 0.5))


def test_relative_positions_of_another_window_are_resampled(tmp_path):
    kwargs = {"embed_dim": 12, "depths": (1, 1), "num_heads": (1, 2), "img_size": 32, "window_size": 4}
    name, key = "swin_tiny_patch4_window7_224", "layers.0.blocks.0.attn.relative_position_bias_table"
    theirs = randomised(build_model(ModelSpec(name, 5, kwargs=kwargs)))
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    spec = ModelSpec(name, 5, kwargs=kwargs | {"window_size": 8, "checkpoint_path": str(tmp_path / "theirs.pth")})
    found, own = build_model(spec).backbone.state_dict(), theirs.backbone.state_dict()
    torch.testing.assert_close(found[key], resize_rel_pos_bias_table(own[key], (8, 8), found[key].shape))
    assert found[key].shape != own[key].shape
    assert torch.equal(found["head.fc.weight"], own["head.fc.weight"])


def test_what_old_files_keep_of_a_swin_is_passed_over(tmp_path):
    kwargs = {"embed_dim": 12, "depths": (1, 1), "num_heads": (1, 2), "img_size": 32, "window_size": 4}
    theirs = randomised(build_model(ModelSpec("swin_tiny_patch4_window7_224", 5, kwargs=kwargs)))
    index = {"layers.0.blocks.0.attn.relative_position_index": torch.zeros(16, 16, dtype=torch.long)}
    torch.save(theirs.backbone.state_dict() | index, tmp_path / "theirs.pth")
    kwargs["checkpoint_path"] = str(tmp_path / "theirs.pth")
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(build_model(ModelSpec(theirs.spec.name, 5, kwargs=kwargs)).eval()(images), theirs(images))


def test_other_networks_in_the_file_are_named_and_a_decoder_is_passed_over(tmp_path, theirs, caplog):
    more = {"head.mlp.weight": torch.ones(3, 3), "ibot.weight": torch.ones(2)}
    torch.save({"teacher": prefixed("backbone.", theirs.backbone.state_dict()) | more}, tmp_path / "dino.pth")
    assert torch.equal(loaded(tmp_path / "dino.pth")(IMAGES), theirs(IMAGES))
    assert "head.mlp.weight, ibot.weight" in caplog.text
    caplog.clear()
    more = {"decoder_blocks.0.weight": torch.ones(3), "mask_token": torch.ones(1, 1, 24)}
    torch.save({"model": theirs.backbone.state_dict() | more}, tmp_path / "mae.pth")
    assert torch.equal(loaded(tmp_path / "mae.pth")(IMAGES), theirs(IMAGES))
    assert not caplog.records


def jax_arrays(model, classes):
    """A ViT of one block as Google's files have it, with the values of `model`."""
    w = {key: value.detach().numpy() for key, value in model.backbone.state_dict().items()}
    block, heads, d = "Transformer/encoderblock_0/", 2, 24
    qkv, bias = w["blocks.0.attn.qkv.weight"].reshape(3, d, d), w["blocks.0.attn.qkv.bias"].reshape(3, d)
    attention = f"{block}MultiHeadDotProductAttention_1/"
    arrays = {
        "embedding/kernel": w["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": w["patch_embed.proj.bias"], "cls": w["cls_token"],
        "Transformer/posembed_input/pos_embedding": w["pos_embed"],
        "Transformer/encoder_norm/scale": w["norm.weight"], "Transformer/encoder_norm/bias": w["norm.bias"],
        "head/kernel": w["head.weight"].T[:, :classes], "head/bias": w["head.bias"][:classes],
        f"{attention}out/kernel": w["blocks.0.attn.proj.weight"].T.reshape(heads, d // heads, d),
        f"{attention}out/bias": w["blocks.0.attn.proj.bias"],
    }  # fmt: skip
    for i, name in enumerate(("query", "key", "value")):
        arrays[f"{attention}{name}/kernel"] = qkv[i].T.reshape(d, heads, d // heads)
        arrays[f"{attention}{name}/bias"] = bias[i].reshape(heads, d // heads)
    for i in (0, 1):
        arrays[f"{block}MlpBlock_3/Dense_{i}/kernel"] = w[f"blocks.0.mlp.fc{i + 1}.weight"].T
        arrays[f"{block}MlpBlock_3/Dense_{i}/bias"] = w[f"blocks.0.mlp.fc{i + 1}.bias"]
        for kind, own in (("scale", "weight"), ("bias", "bias")):
            arrays[f"{block}LayerNorm_{2 * i}/{kind}"] = w[f"blocks.0.norm{i + 1}.{own}"]
    return arrays


@pytest.mark.parametrize("classes", [5, 3])
def test_arrays_of_jax_load_or_their_head_is_named(tmp_path, classes, caplog):
    theirs = randomised(build_model(small_spec(depth=1)), seed=2)
    np.savez(tmp_path / "theirs.npz", **jax_arrays(theirs, classes))
    model = loaded(tmp_path / "theirs.npz", depth=1)
    assert all(bool(weight.isfinite().all()) for weight in model.parameters())
    if classes == 5:
        torch.testing.assert_close(model(IMAGES), theirs(IMAGES))
        assert not caplog.records
    else:
        assert "head.weight, head.bias" in caplog.text
        normalised = (IMAGES - 0.5) / 0.5
        torch.testing.assert_close(
            model.backbone.forward_features(normalised), theirs.backbone.forward_features(normalised)
        )


def test_a_key_of_thousands_of_words_is_no_work(tmp_path, theirs):
    key = "a." * 30_000 + "x"
    save_file({**theirs.backbone.state_dict(), key: torch.zeros(1)}, tmp_path / "x.safetensors")
    started = time.process_time()
    with pytest.raises(SettingError, match="a.a.a.*….*a.a.x has no place in the model") as error:
        loaded(tmp_path / "x.safetensors")
    assert len(str(error.value)) < 2000
    assert time.process_time() - started < 5  # every prefix of it by itself took minutes


def test_a_build_without_memory_reads_no_file(tmp_path, theirs):
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    with torch.device("meta"):
        assert all(weight.is_meta for weight in loaded(tmp_path / "theirs.pth").parameters())
