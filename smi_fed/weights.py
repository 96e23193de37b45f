"""Files of weights into a model: everything that was not loaded is named, or the file is refused."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from smi_fed.checks import SettingError, require
from smi_fed.wrappers import matched, plain, plain_key, plain_state

log = logging.getLogger("smi_fed")

Tensors = dict[str, Tensor]

KEY = "kwargs.checkpoint_path"
PASSED_OVER = ("mask_token", "decoder", "n_averaged")
"""Parts of a file that no classifier has: of masked pretraining and of averaging."""
LISTED = 8


def local_file(name: str, kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], str | None]:
    """`kwargs` for timm without what names a file of weights, and that file; None where it is no local one.

    timm would drop the head of such a file, or load nothing of it, without a word.

    Raises:
        SettingError: there is no such file.
    """
    kwargs = dict(kwargs)
    path, key = kwargs.pop("checkpoint_path", None), KEY
    if not path and kwargs.get("pretrained"):
        for source in ("pretrained_cfg_overlay", "pretrained_cfg"):
            given = kwargs.get(source)
            if not path and isinstance(given, Mapping) and given.get("file"):
                path, key = given["file"], f"kwargs.{source}.file"
        if not path and name.startswith("local-dir:"):
            path, key = _in_directory(name.removeprefix("local-dir:")), "name"
        if path:
            del kwargs["pretrained"]
    path = str(path) if path else None
    require(path is None or Path(path).is_file(), key, path, "a file of weights")
    return kwargs, path


def _in_directory(directory: str) -> str:
    """The file of weights in a directory of timm's."""
    names = ("model.safetensors", "pytorch_model.safetensors", "pytorch_model.bin", "model.bin", "model.pth")
    return next((str(path) for name in names if (path := Path(directory) / name).is_file()), directory)


def load_weights(backbone: nn.Module, path: str) -> None:
    """Load a file into a model; its head may stay at its random start, which a warning says.

    A head that is not in the file or has another number of classes is left as it is, whole.
    Tables of positions are resampled by timm's own rules where the grid is another one.

    Args:
        backbone: a timm model or another module; on torch's meta device nothing is read.
        path: safetensors, or what `torch.save` wrote, read without running code of the file:
            a state dict of the model or of a `Classifier`, wrapped or not, by itself or
            inside a training checkpoint; or .npz where timm reads that.

    Raises:
        SettingError: with the path, and what is wrong with the file or does not fit.
    """
    own = plain_state(backbone)
    if any(tensor.is_meta for tensor in own.values()):
        return
    if path.endswith((".npz", ".npy")):
        left = _load_arrays(backbone, path, own)
    else:
        tensors, rest = best_part(read_file(path), own, path)
        tensors = _resampled(backbone, matched(tensors, own), own)
        left = _load_tensors(backbone, tensors, own, path)
        if rest:
            log.warning("%s: not loaded, since they are outside of the model: %s", path, _listed(rest, len(rest)))
    if left:
        log.warning("%s: left at their random start, since the file has no head that fits: %s", path,
                    _listed(left, len(left)))  # fmt: skip


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
    wanted = {plain_key(name): tuple(tensor.shape) for name, tensor in own.items()}
    found = []
    for place, tensors in _parts(content):
        for prefix in _prefixes(tensors):
            shared = [name for name in wanted if prefix + name in tensors]
            same = sum(tuple(tensors[prefix + name].shape) == wanted[name] for name in shared)
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
        parts = key.split(".")
        found |= {".".join(parts[:i]) + "." for i in range(1, len(parts))}
    return found


def heads_of(backbone: nn.Module) -> tuple[str, ...]:
    """The names of a model's classification layers: timm's own, else of the last layer that has weights."""
    named = (vars(backbone).get("pretrained_cfg") or {}).get("classifier")
    if named:
        return (named,) if isinstance(named, str) else tuple(named)
    with plain(backbone):
        last = [name for name, module in backbone.named_modules() if name and list(module.parameters(recurse=False))]
    return tuple(last[-1:])


def _misfits(tensors: Tensors, own: Tensors) -> dict[str, str]:
    """By name, what a file lacks, has in another shape, or has too much."""
    found = {}
    for name, wanted in own.items():
        got = tensors.get(name)
        if got is None:
            if not name.endswith("num_batches_tracked"):  # old files have no such counts
                found[name] = f"{name} is missing"
        elif got.shape != wanted.shape:
            found[name] = f"{name} is {tuple(got.shape)}, expected {tuple(wanted.shape)}"
        elif got.is_floating_point() != wanted.is_floating_point():
            found[name] = f"{name} is {got.dtype}, expected {wanted.dtype}"
    extra = [name for name in tensors if name not in own and not name.startswith(PASSED_OVER)]
    return found | {name: f"{name} has no place in the model" for name in extra}


def _below(name: str, heads: tuple[str, ...]) -> bool:
    return any(name.startswith(f"{head}.") for head in heads)


def _resampled(backbone: nn.Module, tensors: Tensors, own: Tensors) -> Tensors:
    """The same tensors after timm's own filter, where they do not fit as they are.

    Only tables of positions may change their shapes: a patch embedding of another size is another model.
    """
    heads = heads_of(backbone)
    change = _filter_of(backbone)
    if change is None or all(_below(name, heads) for name in _misfits(tensors, own)):
        return tensors
    try:
        changed = change(dict(tensors), backbone)
    except Exception as error:  # the filter of one architecture trips over the file of another in its own ways
        log.info("timm's filter of checkpoints does not take this one: %s", error)
        return tensors
    for name in tensors.keys() & changed.keys():
        if tensors[name].shape == changed[name].shape:
            continue
        if "pos" in name:
            log.info("%s: resampled from %s to %s", name, tuple(tensors[name].shape), tuple(changed[name].shape))
        else:
            changed[name] = tensors[name]
    return changed


def _filter_of(backbone: nn.Module) -> Callable[..., Tensors] | None:
    """What timm makes of a checkpoint of this architecture before it loads it."""
    for kind in type(backbone).__mro__:
        module = sys.modules.get(kind.__module__)
        if kind.__module__.startswith("timm."):
            found = getattr(module, "checkpoint_filter_fn", None) or getattr(module, "_filter_fn", None)
            if found is not None:
                return found
    return None


def _load_tensors(backbone: nn.Module, tensors: Tensors, own: Tensors, path: str) -> list[str]:
    """Load what fits; the head's tensors that were left."""
    heads, wrong = heads_of(backbone), _misfits(tensors, own)
    refused = [reason for name, reason in wrong.items() if not _below(name, heads)]
    if not own.keys() & tensors.keys():
        raise SettingError(KEY, path, f"weights of a {type(backbone).__name__}; not one tensor has a name of its own, "
                           f"such as {_listed(list(own), 2)}; the file has {_listed(list(tensors), 2)}")  # fmt: skip
    _refuse(refused, backbone, path)
    spoiled = tuple(head for head in heads if any(_below(name, (head,)) for name in wrong))
    with plain(backbone):
        fitting = {name: tensors[name] for name in own if name in tensors and not _below(name, spoiled)}
        backbone.load_state_dict(fitting, strict=False)
    return [wrong.get(name, name) for name in own if _below(name, spoiled)]


def _load_arrays(backbone: nn.Module, path: str, own: Tensors) -> list[str]:
    """Let timm read an .npz of JAX; the head's tensors that it left."""
    before = {name: tensor.clone() for name, tensor in own.items()}
    for tensor in own.values():
        if tensor.is_floating_point():
            tensor.fill_(float("nan"))  # what still is one afterwards was not loaded
    try:
        backbone.load_pretrained(path)  # type: ignore[operator]
    except Exception as error:  # as in `read_file`; models that read no arrays have no such method
        raise SettingError(KEY, path, f"weights that {type(backbone).__name__} reads ({error})") from error
    left = [name for name, tensor in own.items() if bool(tensor.isnan().any())]
    heads = heads_of(backbone)
    _refuse([f"{name} is missing" for name in left if not _below(name, heads)], backbone, path)
    for name in left:
        own[name].copy_(before[name])
    return left


def _refuse(reasons: list[str], backbone: nn.Module, path: str) -> None:
    if reasons:
        raise SettingError(KEY, path, f"weights that fit this {type(backbone).__name__}: {_listed(reasons)}")


def _listed(names: list[str], most: int = LISTED) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
