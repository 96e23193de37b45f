"""Files of weights that are refused, each by its path and by what does not fit."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed

from smi_fed.checks import SettingError
from smi_fed.models import ModelSpec, build_model
from tests.models import TINY, randomised, small_spec, small_vit
from tests.test_weights import VIT, loaded


@dataclass
class Foreign:
    weight: int = 3


def weights_of(**kwargs):
    return build_model(small_spec(**kwargs)).state_dict()


def without(key):
    return {name: value for name, value in weights_of().items() if not name.endswith(key)}


def with_change(key, change):
    weights = weights_of()
    weights[key] = change(weights[key])
    return weights


MISFITS = {
    "one tensor is missing": (lambda: without("blocks.1.attn.proj.bias"), r"blocks\.1\.attn\.proj\.bias is missing"),
    "a deeper network": (lambda: weights_of(depth=3), r"blocks\.2\.norm1\.weight has no place in the model"),
    "a shallower network": (lambda: weights_of(depth=1), r"blocks\.1\.norm1\.weight is missing"),
    "a wider network": (lambda: weights_of(embed_dim=36), r"blocks\.0\.norm1\.weight is \(36,\), expected \(24,\)"),
    "other patches": (
        lambda: weights_of(patch_size=8), r"proj\.weight is \(24, 3, 8, 8\), expected \(24, 3, 4, 4\)",
    ),
    "other channels": (lambda: weights_of(in_chans=1), r"proj\.weight is \(24, 1, 4, 4\), expected \(24, 3, 4, 4\)"),
    "layer scale": (lambda: weights_of(init_values=0.1), r"blocks\.0\.ls1\.gamma has no place"),
    "registers": (lambda: weights_of(reg_tokens=2, no_embed_class=True), "reg_token"),
    "whole numbers": (
        lambda: with_change("backbone.norm.weight", lambda w: w.to(torch.int8)), r"norm\.weight is torch\.int8",
    ),
    "another architecture": (lambda: build_model(ModelSpec("resnet10t", 5)).state_dict(), "is missing|not one tensor"),
    "not one key": (lambda: {"a.b": torch.ones(2), "c": torch.ones(3)}, r"not one tensor.*cls_token.*a\.b, c"),
    "two students": (lambda: {"one": weights_of(), "two": weights_of()}, r"several that fit: one\.backbone\., two\."),
    "no tensors": (lambda: {"epoch": 3}, "tensors by name"),
    "a list": (lambda: [torch.ones(3)], "tensors by name"),
    "a tensor": (lambda: torch.ones(3), "tensors by name"),
    "a whole model": (small_vit, r"a whole file of tensors.*(Unpickling|unpickl)"),
    "an object": (lambda: {"state_dict": weights_of(), "extra": Foreign()}, "a whole file of tensors.*Unpickling"),
}  # fmt: skip


@pytest.mark.parametrize("kind", MISFITS)
def test_what_does_not_fit_is_refused_by_path_and_tensor(tmp_path, kind):
    content, says = MISFITS[kind]
    torch.save(content(), tmp_path / "theirs.pth")
    with pytest.raises(SettingError, match=f"(?s)kwargs.checkpoint_path: got .*theirs.pth', allowed: .*{says}"):
        loaded(tmp_path / "theirs.pth")


def test_positions_that_timm_leaves_alone_are_resampled(tmp_path):
    kwargs = {"embed_dim": 24, "depth": 1, "num_heads": 2, "patch_size": 8}
    theirs = randomised(build_model(ModelSpec("cait_xxs24_224", 5, 32, kwargs)))
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    model = build_model(ModelSpec("cait_xxs24_224", 5, 64, kwargs | {"checkpoint_path": str(tmp_path / "theirs.pth")}))
    correct = resample_abs_pos_embed(theirs.backbone.pos_embed, (8, 8), num_prefix_tokens=0)
    torch.testing.assert_close(model.backbone.pos_embed, correct)


def truncated(path):
    torch.save(weights_of(), path)
    path.write_bytes(path.read_bytes()[:-5000])


def truncated_safetensors(path):
    save_file(weights_of(), path)
    path.write_bytes(path.read_bytes()[:-500])


BROKEN = {
    "missing.pth": lambda path: None,
    "directory.pth": lambda path: path.mkdir(),
    "empty.pth": lambda path: path.touch(),
    "empty.safetensors": lambda path: path.touch(),
    "text.safetensors": lambda path: path.write_text("these are no weights"),
    "text.pth": lambda path: path.write_text("these are no weights"),
    "json.safetensors": lambda path: path.write_text('{"a": 1, "b": [2]}'),
    "cut.pth": truncated,
    "cut.safetensors": truncated_safetensors,
    "torch.safetensors": lambda path: torch.save(weights_of(), path),
    "zeros.bin": lambda path: path.write_bytes(bytes(500)),
    "other.npz": lambda path: np.savez(path, a=np.ones(3)),
    "text.npz": lambda path: path.write_text("these are no weights"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_that_is_none_is_refused_by_its_path(tmp_path, name):
    BROKEN[name](tmp_path / name)
    with pytest.raises(SettingError, match=rf"kwargs.checkpoint_path: got '.*/{name}', allowed: "):
        loaded(tmp_path / name)
    with pytest.raises(SettingError, match=rf"{name}', allowed: "):
        build_model(
            ModelSpec(VIT, 5, kwargs={**TINY, "pretrained": True, "pretrained_cfg_overlay": {"file": tmp_path / name}})
        )


def test_a_pickle_runs_nothing(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (tmp_path.joinpath("ran").touch, ())

    torch.save({"state_dict": weights_of(), "x": Bomb()}, tmp_path / "theirs.pth")
    with pytest.raises(SettingError, match=r"theirs\.pth"):
        loaded(tmp_path / "theirs.pth")
    assert not (tmp_path / "ran").exists()
