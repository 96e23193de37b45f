"""Real data are made from packages; here from stand-ins of the same layout."""

import hashlib
import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from simulations.real import __main__ as real
from simulations.real import models, packages, pictures
from simulations.real.packages import MakingError, Package
from smi_fed.data import DataConfig, load_images
from smi_fed.models import ModelSpec, build_model
from tests.models import masked_model


def emoji(count, category, first):
    codes = [f"{first + number:04X}" for number in range(count)]
    return [
        {"unified": code, "category": category, "image": f"{code.lower()}.png", "has_img_google": True,
         "has_img_twitter": code != codes[0]} for code in codes
    ]  # fmt: skip


EMOJI = [*emoji(9, "Flags", 0x100), *emoji(5, "Objects", 0x200), *emoji(3, "Component", 0x300)]


@pytest.fixture
def roots(tmp_path):
    """Red pictures of one style, half transparent blue ones of another."""
    for style, colour in (("google", (255, 0, 0, 255)), ("twitter", (0, 0, 255, 0))):
        directory = tmp_path / style / "img" / style / "64"
        directory.mkdir(parents=True)
        for each in EMOJI:
            Image.new("RGBA", (64, 64), colour).save(directory / each["image"])
    (tmp_path / "google" / "emoji.json").write_text(json.dumps(EMOJI))
    return {style: tmp_path / style for style in ("google", "twitter")}


def test_pictures_are_divided_alike_in_every_style(roots, tmp_path):
    made = pictures.draw(roots, tmp_path / "out")
    counts = {style: (found["train"], found["test"]) for style, found in made.items()}
    assert counts["google"] == (11, 3)
    assert sum(counts["twitter"]) == 12  # two that this style does not draw
    held = {style: {p.name for p in (tmp_path / "out" / style / "test").rglob("*.webp")} for style in made}
    shown = {style: {p.name for p in (tmp_path / "out" / style / "train").rglob("*.webp")} for style in made}
    assert held["twitter"] <= held["google"]
    assert not (held["google"] | held["twitter"]) & (shown["google"] | shown["twitter"])
    train, test = load_images(DataConfig(source="folder", name=str(tmp_path / "out/google"), image_size=16, channels=3))
    assert (len(train), len(test), train.class_names) == (11, 3, ("flags", "objects"))
    torch.testing.assert_close(train.images[0, :, 8, 8], torch.tensor([1.0, 0, 0]), atol=0.02, rtol=0)
    clear, _ = load_images(DataConfig(source="folder", name=str(tmp_path / "out/twitter"), image_size=16, channels=3))
    assert float(clear.images.min()) > 0.999
    again = pictures.draw(roots, tmp_path / "again")
    assert again == made


def exported(model):
    """A timm ViT as its ONNX file has it: Hugging Face's names, nameless products and positions."""
    own = {key: value.numpy() for key, value in model.state_dict().items()}
    named = {
        "backbone.embeddings.cls_token": own["cls_token"],
        "backbone.embeddings.patch_embeddings.projection.weight": own["patch_embed.proj.weight"],
        "backbone.embeddings.patch_embeddings.projection.bias": own["patch_embed.proj.bias"],
        "backbone.layernorm.weight": own["norm.weight"], "backbone.layernorm.bias": own["norm.bias"],
    }  # fmt: skip
    products = {}
    for number in range(len(model.blocks)):
        layer, node, block = (
            f"backbone.encoder.layer.{number}.",
            f"/backbone/encoder/layer.{number}/",
            f"blocks.{number}.",
        )
        for place, part in enumerate(("query", "key", "value")):
            matrix, bias = (np.split(own[f"{block}attn.qkv.{kind}"], 3)[place] for kind in ("weight", "bias"))
            products[f"{node}attention/attention/{part}/MatMul"] = matrix.T
            named[f"{layer}attention.attention.{part}.bias"] = bias
        products[f"{node}attention/output/dense/MatMul"] = own[f"{block}attn.proj.weight"].T
        named[f"{layer}attention.output.dense.bias"] = own[f"{block}attn.proj.bias"]
        for each in (1, 2):
            products[f"{node}mlp/fc{each}/MatMul"] = own[f"{block}mlp.fc{each}.weight"].T
            named[f"{layer}mlp.fc{each}.bias"] = own[f"{block}mlp.fc{each}.bias"]
            named[f"{layer}layer_scale{each}.lambda1"] = own[f"{block}ls{each}.gamma"]
            named |= {f"{layer}norm{each}.{kind}": own[f"{block}norm{each}.{kind}"] for kind in ("weight", "bias")}
    return named, products, [np.ones((3,), np.float32), own["pos_embed"][:, :1], own["pos_embed"][:, 1:]]


def dinov2(depth, **changes):
    kwargs = {"img_size": 28, "embed_dim": 24, "depth": depth, "num_heads": 2}
    return ModelSpec(real.VIT, 3, kwargs=kwargs, **changes)


def test_a_dinov2_is_read_from_its_graph(tmp_path):
    theirs = build_model(dinov2(3))
    found = models.dinov2_weights(*exported(theirs.backbone))
    save_file(found, tmp_path / "whole.safetensors")
    save_file(models.first_blocks(found, 2), tmp_path / "cut.safetensors")
    for depth, name in ((3, "whole"), (2, "cut")):
        own = build_model(dinov2(depth, start=tmp_path / f"{name}.safetensors")).backbone.state_dict()
        known = theirs.backbone.state_dict()
        assert all(torch.equal(own[key], known[key]) for key in own if not key.startswith("head"))


def test_a_lite_model_takes_timms_names(monkeypatch, tmp_path):
    model = masked_model("resnet").backbone
    monkeypatch.setattr(models, "build_model", lambda _: masked_model("resnet"))
    own = enumerate(model.state_dict().items())
    torch.save({f"other.{i}.{key.rsplit('.', 1)[-1]}": value for i, (key, value) in own}, tmp_path / "theirs.pth")
    found = models.lite_weights("resnet10t", (tmp_path / "theirs.pth").read_bytes())
    assert all(torch.equal(found[key], value) for key, value in model.state_dict().items())
    torch.save(dict(reversed(model.state_dict().items())), tmp_path / "theirs.pth")
    with pytest.raises(MakingError, match="resnet10t: got tensors that are not those of timm's model"):
        models.lite_weights("resnet10t", (tmp_path / "theirs.pth").read_bytes())


def test_other_weights_than_the_published_are_refused(tmp_path, monkeypatch):
    weights = {"b": torch.ones(2), "a": torch.zeros(1)}
    assert (
        models.digest_of(weights)
        == hashlib.sha256(b"a" + bytes(4) + b"b" + torch.ones(2).numpy().tobytes()).hexdigest()
    )
    monkeypatch.setitem(real.WEIGHTS, "tiny", models.digest_of(weights))
    real.save(weights, tmp_path, "tiny")
    assert torch.equal(load_file(tmp_path / "tiny.safetensors")["b"], torch.ones(2))
    with pytest.raises(MakingError, match="tiny: got weights with sha256"):
        real.save({**weights, "a": torch.ones(1)}, tmp_path, "tiny")


def test_what_is_there_is_not_made_again_and_nothing_is_left_half_made(tmp_path, monkeypatch, capsys):
    calls = []

    def make(out, name="good"):
        calls.append(name)
        (out / "file").write_text(name)

    def fail(out):
        (out / "half").write_text("")
        raise MakingError("no network")

    monkeypatch.setattr(real, "PARTS", {"good": make, "bad": fail})
    for _ in range(2):
        assert real.main(["--directory", str(tmp_path / "data")]) == 1
        assert "no network" in capsys.readouterr().err
    assert calls == ["good"]
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["good"]
    monkeypatch.setattr(real, "PARTS", {"good": make})
    assert real.main(["--directory", str(tmp_path / "data")]) == 0
    assert "everything is there" in capsys.readouterr().out


def test_a_package_is_the_file_that_it_should_be(tmp_path, monkeypatch):
    """By a stand-in of the registry's client that writes a file."""
    client = tmp_path / "npm"
    only = '[ "$3" = right@1.0 ] || { echo no such package >&2; exit 1; }'
    client.write_text(f"#!/bin/sh\n{only}\nprintf content > right-1.0.tgz\n")
    client.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    digest = hashlib.sha256(b"content").hexdigest()
    for name, sha256, says in (
        ("right", digest, ""), ("right", "0" * 64, "got a file with sha256"), ("wrong", digest, "no such package"),
    ):  # fmt: skip
        directory = tmp_path / f"{name}{sha256[:4]}"
        directory.mkdir()
        package = Package("npm", name, "1.0", sha256)
        if says:
            with pytest.raises(MakingError, match=says):
                package.fetch(directory)
        else:
            assert package.fetch(directory).read_bytes() == b"content"
    monkeypatch.setattr(packages.shutil, "which", lambda _: None)
    with pytest.raises(MakingError, match="got no npm on this machine"):
        Package("npm", "right", "1.0", digest).fetch(tmp_path)


@pytest.mark.parametrize(
    ("error", "says"),
    [(OSError("no library called cairo-2"), "apt-get install libcairo2"), (ImportError(), r"\[real\]")],
)
def test_a_missing_libcairo_is_told_with_its_remedy(monkeypatch, error, says):
    class Finder:
        @staticmethod
        def find_spec(name, *_):
            if name == "cairosvg":
                raise error

    monkeypatch.delitem(sys.modules, "cairosvg", raising=False)
    monkeypatch.setattr("sys.meta_path", [Finder, *sys.meta_path])
    with pytest.raises(MakingError, match=says):
        pictures.require_cairo()
