"""Layers of settings, such as YAML files and overrides, as nested mappings.

A layer is merged into those before it key by key. A choice of another kind replaces instead,
since the keys of the kind before are none of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from smi_fed.checks import kinds_of

ABSENT = object()
"""In a layer: what it takes away. Elsewhere: what is not there."""


def choice_paths(kind: Any, prefix: str = "") -> Iterator[str]:
    """Dotted paths of all choices below a `checked` class."""
    for name, each in getattr(kind, "__pydantic_fields__", {}).items():
        if kinds_of(each.annotation):
            yield prefix + name
        else:
            yield from choice_paths(each.annotation, f"{prefix}{name}.")


def dotted_keys(node: Any, prefix: str = "") -> Iterator[str]:
    """Dotted paths of all keys of nested mappings."""
    for key, value in node.items() if isinstance(node, Mapping) else ():
        yield f"{prefix}{key}"
        yield from dotted_keys(value, f"{prefix}{key}.")


def dotted(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted path, value) of all that is no mapping in nested mappings; a list is one text."""
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from dotted(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", ", ".join(map(str, value)) if isinstance(value, list | tuple) else value


def nested(path: str, value: Any) -> Any:
    """A layer that says `value` at a dotted path; "" is the root."""
    for key in reversed(path.split(".") if path else ()):
        value = {key: value}
    return value


def settled(paths: Sequence[str], layers: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    """Each choice of `paths` that stands in `layers`, as it is after the last of them."""
    found = dict.fromkeys(paths, ABSENT)
    for layer in layers:
        for path in paths:
            *parents, last = path.split(".")
            place = layer
            for key in parents:
                place = place.get(key) if isinstance(place, Mapping) else None
            if isinstance(place, Mapping) and last in place:
                found[path] = merged(found[path], place[last])
    return ((path, value) for path, value in found.items() if value is not ABSENT)


def merged(base: Any, value: Any) -> Any:
    """A choice after a layer said `value` of it, each a mapping or a kind alone."""
    if not isinstance(value, Mapping):
        same = isinstance(base, Mapping) and base.get("kind") == value
        return base if same else value
    if not isinstance(base, Mapping):
        base = {} if base is ABSENT else {"kind": base}
    if "kind" in value and value["kind"] != base.get("kind"):
        base = {}
    return {key: each for key, each in {**base, **value}.items() if each is not ABSENT}
