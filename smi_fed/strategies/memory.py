"""What a Flower strategy was given, and what it remembers from round to round."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord

from smi_fed.strategies.wrapping import layers


def arguments_of(strategy: Any) -> dict[str, str]:
    """What decides a strategy that has not run yet, by name: classes from the outside in, and their arguments.

    Flower's strategies keep their arguments in plain attributes. What they ask of clients for
    evaluation decides nothing.
    """
    found = {"strategy": " around ".join(type(each).__name__ for each in layers(strategy))}
    for depth, layer in enumerate(layers(strategy)):
        for name, value in vars(layer).items():
            if name != "strategy" and "evaluate" not in name:
                found[f"strategy.{'inner.' * depth}{name}"] = _text(value)
    return found


def _text(value: Any) -> str:
    """A value as text that is the same in another process: of functions the name, of arrays a digest."""
    if isinstance(value, ArrayRecord):
        return _text({key: array.numpy() for key, array in value.items()})
    if isinstance(value, Mapping):
        return str({str(key): _text(each) for key, each in value.items()})
    if isinstance(value, list | tuple):
        return str([_text(each) for each in value])
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {value.shape} {hashlib.sha256(value.tobytes()).hexdigest()}"
    if value is None or isinstance(value, bool | int | float | str | bytes):
        return repr(value)
    return str(getattr(value, "__qualname__", type(value).__qualname__))


def remember(strategy: Any) -> tuple[dict[str, np.ndarray[Any, Any]], dict[str, Any]]:
    """What a strategy and those inside it hold from round to round: arrays by path, and numbers.

    Flower's strategies keep their memory in plain attributes: numbers, arrays, and lists,
    dicts and ArrayRecords of arrays. Whatever else an attribute is was given at construction.
    """
    arrays: dict[str, np.ndarray[Any, Any]] = {}
    numbers: dict[str, Any] = {}
    for depth, layer in enumerate(layers(strategy)):
        for name, value in vars(layer).items():
            path = f"{depth}/{name}"
            if isinstance(value, bool | int | float):
                numbers[path] = value
            elif isinstance(value, np.ndarray):
                arrays[path] = value
            elif isinstance(value, list | tuple) and value and all(isinstance(v, np.ndarray) for v in value):
                arrays |= {f"{path}/list/{i}": v for i, v in enumerate(value)}
            elif isinstance(value, ArrayRecord):
                arrays |= {f"{path}/record/{k}": v.numpy() for k, v in value.items()}
                numbers[f"{path}/order"] = list(value)
            elif isinstance(value, dict) and value and all(isinstance(v, np.ndarray) for v in value.values()):
                arrays |= {f"{path}/dict/{k}": v for k, v in value.items()}
                numbers[f"{path}/order"] = list(value)
    return arrays, numbers


def recall(strategy: Any, arrays: Mapping[str, np.ndarray[Any, Any]], numbers: Mapping[str, Any]) -> None:
    """Put back what `remember` gave, into a strategy of the same arguments."""
    owners = list(layers(strategy))
    grouped: dict[tuple[int, str, str], dict[str, np.ndarray[Any, Any]]] = {}
    for path, value in arrays.items():
        depth, name, *rest = path.split("/", 3)
        if not rest:
            setattr(owners[int(depth)], name, value)
        else:
            grouped.setdefault((int(depth), name, rest[0]), {})[rest[1]] = value
    for (depth, name, kind), values in grouped.items():
        if kind == "list":
            setattr(owners[depth], name, [values[str(i)] for i in range(len(values))])
            continue
        order = numbers[f"{depth}/{name}/order"]
        if kind == "dict":
            setattr(owners[depth], name, {key: values[key] for key in order})
        else:
            setattr(owners[depth], name, ArrayRecord({key: Array(values[key]) for key in order}))
    for path, value in numbers.items():
        depth, name, *rest = path.split("/", 2)
        if not rest:
            setattr(owners[int(depth)], name, value)
