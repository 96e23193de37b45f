"""What files of weights hold, and which part of it is a model."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from smi_fed.checks import SettingError, require
from smi_fed.wrappers import plain_key

Tensors = dict[str, Tensor]

KEY = "kwargs.checkpoint_path"
DEEPEST = 32
"""Words before a model's own names; a file may have keys of thousands."""
PASSED_OVER = ("mask_token", "decoder", "n_averaged")
"""Parts of a file that no classifier has: of masked pretraining and of averaging."""


def read_file(path: str) -> Any:
    """What a file of weights holds.

    Raises:
        SettingError: it is empty, truncated, of no known format, or holds other objects than tensors.
    """
    with Path(path).open("rb") as file:
        start = file.read(9)
    try:
        if start[8:] == b"{" or path.endswith(".safetensors"):
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):  # timm's training keeps its arguments so
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a stranger's file makes a reader raise
        reason = str(error).strip().splitlines() or ["it is empty"]
        raise SettingError(
            KEY, path, f"a whole file of tensors, safetensors or by torch.save ({type(error).__name__}: {reason[0]})"
        ) from error


def best_part(content: Any, own: Tensors, path: str) -> tuple[Tensors, list[str]]:
    """The tensors of a checkpoint that are the model's, by its names, and the names of those beside them.

    Where a checkpoint holds the model twice the moving average is taken, as timm does.

    Raises:
        SettingError: no tensors, or several models that fit as well.
    """
    expected = {plain_key(name): tuple(tensor.shape) for name, tensor in own.items()}
    found = []
    for place, tensors in _parts(content):
        for prefix in _prefixes(tensors):
            shared = [name for name in expected if prefix + name in tensors]
            same = sum(tuple(tensors[prefix + name].shape) == expected[name] for name in shared)
            found.append(((same, len(shared)), place, prefix, tensors))
    require(bool(found), KEY, path, "a file that holds tensors by name")
    best = max(score for score, *_ in found)
    equal = [each for each in found if each[0] == best]
    equal = [each for each in equal if "ema" in f"{each[1]}.{each[2]}".lower()] or equal
    if best == (0, 0):
        equal = [("", "", "", max((tensors for *_, tensors in found), key=len))]
    names = [f"{place}{prefix}" for _, place, prefix, _ in equal]
    require(len(equal) == 1, KEY, path, f"a file of one model; it holds several that fit: {', '.join(names)}")
    (_, _, prefix, tensors) = equal[0]
    inside = {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}
    rest = [key for key in tensors if not key.startswith(prefix) and not key.startswith(PASSED_OVER)]
    return inside, rest


def _parts(content: Any, place: str = "") -> Iterator[tuple[str, Tensors]]:
    """Every mapping inside a checkpoint that holds tensors by name, with its place, less the words of wrappers."""
    if not isinstance(content, Mapping):
        return
    tensors = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    renamed = {plain_key(key): value for key, value in tensors.items()}
    if tensors:
        yield place, renamed if len(renamed) == len(tensors) else tensors
    for key, value in content.items():
        yield from _parts(value, f"{place}{key}.")


def _prefixes(tensors: Tensors) -> set[str]:
    found = {""}
    for key in tensors:
        parts = key.split(".", DEEPEST)
        found |= {".".join(parts[:i]) + "." for i in range(1, len(parts))}
    return found
