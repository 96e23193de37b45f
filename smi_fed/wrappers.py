"""Models inside wrappers: `torch.compile`, DataParallel and its kind, adapters of PEFT."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from timm.utils.model_ema import ModelEmaV2, ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel

T = TypeVar("T")

COMPILED, CHECKPOINTED = "_orig_mod", "_checkpoint_wrapped_module"
WORDS = frozenset({"module", COMPILED, CHECKPOINTED})
"""What wrappers put into the keys of a state dict."""
HOLDERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel, ModelEmaV2, ModelEmaV3)
"""They compute what their `module` computes. An unknown class with a `module` may do more than that."""

REMEDY = "the model itself: what torch.compile was given, the .module of a wrapper, PEFT's merge_and_unload()"


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside wrappers that compute the same; any other module as it is."""
    while (inner := _inside(model)) is not None:
        model = inner
    return model


def _inside(model: nn.Module) -> nn.Module | None:
    children = dict(model.named_children())
    for name in (COMPILED, CHECKPOINTED):
        if name in children:
            return children[name]
    if isinstance(model, HOLDERS):
        return model.module
    base = children.get("base_model")
    if base is not None and _holds_only(model, "base_model") and _holds_only(base, "model"):
        return base.model  # type: ignore[return-value]  # PEFT; its adapters are layers of that model
    return None


def _holds_only(model: nn.Module, name: str) -> bool:
    own = [*model.parameters(recurse=False), *model.buffers(recurse=False)]
    return [child for child, _ in model.named_children()] == [name] and not own


@contextmanager
def plain(model: nn.Module) -> Iterator[None]:
    """No wrapper below `model` and no compiled code inside; all of it is back afterwards.

    Compiled code calls no hook, and a wrapper hides the attributes and the type of a layer.
    """
    with ExitStack() as after:
        for module in list(model.modules()):
            compiled = getattr(module, "_compiled_call_impl", None)
            if compiled is not None:
                after.callback(setattr, module, "_compiled_call_impl", compiled)
                module._compiled_call_impl = None
            for name, child in list(module._modules.items()):
                if child is not None and (inner := unwrapped(child)) is not child:
                    after.callback(module._modules.__setitem__, name, child)
                    module._modules[name] = inner
        yield


def plain_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict that the model has without wrappers around it or inside."""
    model = unwrapped(model)
    with plain(model):
        return dict(model.state_dict())


def plain_key(key: str) -> str:
    """A key of a state dict without the words of wrappers, wherever they stand."""
    return ".".join(part for part in key.split(".") if part not in WORDS)


def matched(weights: Mapping[str, T], expected: Collection[str], prefixes: Iterable[str] = ("",)) -> dict[str, T]:
    """`weights` under the names that a model expects; what it does not expect keeps its own name.

    Args:
        weights: by the keys of a state dict, perhaps of a wrapped model.
        expected: the keys of the model's own.
        prefixes: what may have to be put before a key; that which fits most keys is.
    """
    places = {plain_key(name): name for name in expected}
    if len(places) < len(expected):  # the model has parts that are called like wrappers
        places = {name: name for name in expected}
    keys = {key: plain_key(key) for key in weights}
    if len(set(keys.values())) < len(keys):
        keys = {key: key for key in weights}
    before = max(prefixes, key=lambda prefix: sum(f"{prefix}{plain}" in places for plain in keys.values()))
    return {places.get(f"{before}{plain}", key): weights[key] for key, plain in keys.items()}


def is_unmerged(keys: Iterable[Any]) -> bool:
    """Whether these are keys of a model with adapters of PEFT that are not merged into its weights."""
    return any("lora_" in str(key) or ".base_layer." in str(key) for key in keys)
