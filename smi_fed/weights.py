"""Files of weights into a model: everything that was not loaded is named, or the file is refused."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping
from functools import partial
from inspect import signature
from math import isqrt
from pathlib import Path
from typing import Any

import timm
from timm.layers import resample_abs_pos_embed
from torch import nn
from torch.nn import functional as F

from smi_fed.checks import SettingError, printable, require
from smi_fed.model_inputs import input_channels
from smi_fed.spec import ModelSpec
from smi_fed.weight_files import KEY, PASSED_OVER, Tensors, best_part, read_file
from smi_fed.wrappers import matched, plain, plain_state

log = logging.getLogger("smi_fed")

HUB, PRETRAINED = "kwargs.pretrained", "pretrained"
LISTED, LONGEST_NAME = 8, 200


def local_source(spec: ModelSpec) -> tuple[dict[str, Any], Any]:
    """The arguments for timm without what names weights that are here: a file, or a state dict; None where none does.

    timm would drop the head of such a file, or load nothing of it, without a word.

    Raises:
        SettingError: there is no such file.
    """
    kwargs = dict(spec.kwargs)
    path, key = kwargs.pop("checkpoint_path", None), KEY
    if spec.start == PRETRAINED:
        kwargs["pretrained"] = True
    elif spec.start is not None:
        require(Path(spec.start).is_file(), "start", spec.start, f"{PRETRAINED}, or a file of weights on this machine")
        return kwargs, spec.start
    if not path and kwargs.get("pretrained"):
        for source in ("pretrained_cfg_overlay", "pretrained_cfg"):
            given = kwargs.get(source)
            if not path and isinstance(given, Mapping):
                path, key = given.get("state_dict") or given.get("file"), f"kwargs.{source}.file"
        if not path and spec.name.startswith("local-dir:"):
            path, key = _in_directory(spec.name.removeprefix("local-dir:")), "name"
    if not path:
        return kwargs, None
    kwargs.pop("pretrained", None)
    if isinstance(path, Mapping):
        return kwargs, path
    require(Path(str(path)).is_file(), key, str(path), "a file of weights")
    return kwargs, str(path)


def _in_directory(directory: str) -> str:
    """The file of weights in a directory of timm's."""
    names = ("model.safetensors", "pytorch_model.safetensors", "pytorch_model.bin", "model.bin", "model.pth")
    return next((str(path) for name in names if (path := Path(directory) / name).is_file()), directory)


def load_weights(backbone: nn.Module, source: str | Mapping[str, Any]) -> None:
    """Load a file, or what one holds, into a model; its head may stay at its random start, which a warning says.

    A head that is not in the file or has another number of classes is left as it is, whole.
    Tables of positions are resampled by timm's own rules where the grid is another one.

    Args:
        backbone: a timm model or another module; on torch's meta device nothing is read.
        source: safetensors, or what `torch.save` wrote, read without running code of the file:
            a state dict of the model or of a `Classifier`, wrapped or not, by itself or
            inside a training checkpoint; or .npz where timm reads that.

    Raises:
        SettingError: with the path, and what is wrong with the file or does not fit.
    """
    own = plain_state(backbone)
    if any(tensor.is_meta for tensor in own.values()):
        return
    path = source if isinstance(source, str) else "a state dict"
    if path.endswith((".npz", ".npy")):
        left = _load_by(lambda: backbone.load_pretrained(path), backbone, path)  # type: ignore[operator]
    else:
        tensors, rest = best_part(read_file(path) if isinstance(source, str) else source, own, path)
        tensors = _regridded(_resampled(backbone, matched(tensors, own), own), own)
        left = _load_tensors(backbone, tensors, own, path)
        if rest:
            log.warning("%s: not loaded, since they are outside of the model: %s", path, _listed(rest, len(rest)))
    _name_the_left(left, path)


def load_pretrained(backbone: nn.Module, num_classes: int, cache_dir: Any = None) -> None:
    """Load what timm keeps for a model, from the hub; a head of another class count is named in a warning.

    timm itself adapts the stem to other channels, and would leave any layer at its random start.

    Raises:
        SettingError: it cannot be had, or does not fit.
    """
    own, cfg = backbone.state_dict(), vars(backbone)["pretrained_cfg"]
    if any(tensor.is_meta for tensor in own.values()):
        return
    channels, change, heads = input_channels(backbone), _filter_of(backbone), heads_of(backbone)
    name = str(cfg.get("hf_hub_id") or cfg.get("url") or cfg.get("architecture"))
    parts = {key.split(".")[0] for key in own}

    def checked(tensors: Tensors, model: nn.Module) -> Tensors:
        tensors = tensors if change is None else change(tensors, model)
        extra = [key for key in tensors if key not in own and key.split(".")[0] in parts and not _below(key, heads)]
        _refuse([f"{key} has no place in the model" for key in extra], backbone, name, HUB)
        return tensors

    def load() -> None:
        timm.models.load_pretrained(backbone, cfg, num_classes, channels, checked, strict=False, cache_dir=cache_dir)

    _name_the_left(_load_by(load, backbone, name, HUB), name)


def _name_the_left(left: list[str], source: str) -> None:
    if left:
        log.warning("%s: left at their random start, since it has no head that fits: %s", source,
                    _listed(left, len(left)))  # fmt: skip


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
    for name, expected in own.items():
        got = tensors.get(name)
        if got is None:
            if not name.endswith("num_batches_tracked"):  # old files have no such counts
                found[name] = f"{name} is missing"
        elif got.shape != expected.shape:
            found[name] = f"{name} is {tuple(got.shape)}, expected {tuple(expected.shape)}"
        elif got.is_floating_point() != expected.is_floating_point():
            found[name] = f"{name} is {got.dtype}, expected {expected.dtype}"
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


def _regridded(tensors: Tensors, own: Tensors) -> Tensors:
    """The same tensors at the model's grid: positions (1, n, d) or (1, d, h, w) that timm leaves alone."""
    got, expected = tensors.get("pos_embed"), own.get("pos_embed")
    if got is None or expected is None or got.shape == expected.shape or got.ndim != expected.ndim:
        return tensors
    old, new = (isqrt(table.shape[1]) for table in (got, expected))
    if got.ndim == 4 and got.shape[:2] == expected.shape[:2]:
        got = F.interpolate(got.float(), expected.shape[2:], mode="bicubic", antialias=True)
    elif got.ndim == 3 and got.shape[2] == expected.shape[2] and (old**2, new**2) == (got.shape[1], expected.shape[1]):
        got = resample_abs_pos_embed(got, [new, new], [old, old], num_prefix_tokens=0)
    return tensors | {"pos_embed": got}


def _filter_of(backbone: nn.Module) -> Callable[..., Tensors] | None:
    """What timm makes of a checkpoint of this architecture before it loads it."""
    for kind in type(backbone).__mro__:
        module = sys.modules.get(kind.__module__)
        if kind.__module__.startswith("timm."):
            found = getattr(module, "checkpoint_filter_fn", None) or getattr(module, "_filter_fn", None)
            if found is not None:
                scaled = "adapt_layer_scale" in signature(found).parameters  # DeiT III's own names of its layer scale
                return partial(found, adapt_layer_scale=True) if scaled else found
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


def _load_by(load: Callable[[], Any], backbone: nn.Module, source: str, key: str = KEY) -> list[str]:
    """Let timm load in its own way; the head's tensors that it left, at their start."""
    own = plain_state(backbone)
    before = {name: tensor.clone() for name, tensor in own.items()}
    for tensor in own.values():
        if tensor.is_floating_point():
            tensor.fill_(float("nan"))  # what still is one afterwards was not loaded
    try:
        load()
    except SettingError:
        raise
    except Exception as error:  # as in `read_file`; a model that reads no arrays has no such method
        where = "" if key == KEY else ", from the hub or, where that cannot be reached, from a file that `start` names"
        raise SettingError(key, source, f"weights that {type(backbone).__name__} reads{where} ({error})") from error
    left = [name for name, tensor in own.items() if bool(tensor.isnan().any())]
    heads = heads_of(backbone)
    _refuse([f"{name} is missing" for name in left if not _below(name, heads)], backbone, source, key)
    for name in left:
        own[name].copy_(before[name])
    return left


def _refuse(reasons: list[str], backbone: nn.Module, path: str, key: str = KEY) -> None:
    if reasons:
        raise SettingError(key, path, f"weights that fit this {type(backbone).__name__}: {_listed(reasons)}")


def _listed(names: list[str], most: int = LISTED) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(printable(name, LONGEST_NAME) for name in names[:most]) + more
