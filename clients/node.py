"""What a node says of itself by `--node-config`, and the images that follow from it."""

from __future__ import annotations

import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any

import torch

from smi_fed.checks import Count, Fraction, Natural, SettingError, Text, checked, nearest, one_of, read, require
from smi_fed.config import Settings
from smi_fed.data import SOURCES, DataConfig, ImageSet, hold_out, owned_images, partition, shared_images
from smi_fed.files import FileFormatError
from smi_fed.models import ModelSpec, build_model
from smi_fed.strategies.records import clean_name

MANIFESTS = (".csv", ".tsv")
OWN_SOURCES = tuple(source for source in SOURCES if source != "none")


class EmptyPartitionError(RuntimeError):
    """This client has no data to train on."""


class NodeError(RuntimeError):
    """What went wrong at a node that has a name; the message begins with it."""


@checked
class NodeConfig:
    """The keys of `--node-config`, with - for _.

    Args:
        data: the node's own directory, CSV file or hub data set; "" shares the run's source.
        source: folder | hub | manifest | digits | shapes; "" is a manifest for a CSV file, else a folder.
        split: of a hub data set.
        image_column, label_column: of the node's hub data set or CSV file.
        test_fraction: share that this node holds out of its own data.
        name: in logs, reports and pictures.
        arch: a name under `model.clients`.
        partition_id, num_partitions: which part, of how many, of data that nodes share.
    """

    data: Text = ""
    source: Annotated[Text, one_of(("", *OWN_SOURCES))] = ""
    split: Text = ""
    image_column: Text = ""
    label_column: Text = ""
    test_fraction: Fraction | None = None
    name: Text = ""
    arch: Text | None = None
    partition_id: Natural | None = None
    num_partitions: Count | None = None

    def __post_init__(self) -> None:
        name = unicodedata.normalize("NFC", self.name)
        allowed = "at most 64 letters, digits, single spaces and signs of _ . , ' & + -"
        require(clean_name(name) == name, "name", self.name, allowed)
        object.__setattr__(self, "name", name)
        own = {"split": self.split, "image-column": self.image_column, "label-column": self.label_column}
        for key, value in own.items():
            require(not value or self.has_data, key, value, "nothing, where the node has no data of its own")

    @property
    def has_data(self) -> bool:
        """Whether the node has images of its own."""
        return bool(self.data or self.source)

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> NodeConfig:
        """From Flower's node config.

        Raises:
            SettingError: an unknown key or a value that cannot be.
        """
        known = [each.name.replace("_", "-") for each in fields(cls)]  # type: ignore[arg-type]
        for key, value in config.items():
            require(key in known, f"node-config {key}", value, f"a key of --node-config: {nearest(key, known)}")
        return read(cls, {key.replace("-", "_"): value for key, value in config.items()})


@dataclass(frozen=True)
class Node:
    """A client with all that tells it apart.

    Attributes:
        name: for people; "" leaves it to the server.
        number: of its random choices, and of its turn among architectures.
        arch: a name under `model.clients`, or None.
        data: its own source, or the run's; with the share that this node holds out.
        owned: whether nobody else takes part in it.
        part: which part, of how many, of the source is this node's.
    """

    name: str
    number: int
    arch: str | None
    data: DataConfig
    owned: bool
    part: tuple[int, int]

    @property
    def called(self) -> str:
        """What its own log calls it."""
        return self.name or "this node"


def node_of(settings: Settings, config: NodeConfig, node_id: int = 0) -> Node:
    """The node that says `config`.

    Raises:
        SettingError: it has no data, `data.nodes` has another number of places than there are
            clients, or a path that depends on where the process was started.
    """
    number, parts = config.partition_id or 0, config.num_partitions or 1
    name = config.name or ("" if config.partition_id is None else f"client {number}")
    if config.partition_id is None:
        number = zlib.crc32(name.encode()) if name else node_id % 2**32
    part = (config.partition_id or 0, parts)
    share = settings.data.test_fraction if config.test_fraction is None else config.test_fraction
    data = replace(settings.data, test_fraction=share)
    if config.has_data:
        whole = config.num_partitions is None
        return Node(name, number, config.arch, _own_source(data, config), True, (0, 1) if whole else part)
    places = data.nodes
    if places:
        require(parts == len(places), "data.nodes", list(places), f"one place for each of {parts} clients")
        require(part[0] < parts, "partition-id", part[0], f"0 to {parts - 1}")
        own = replace(config, data=places[part[0]])
        name = config.name or _named_by_place(places, part[0])
        return Node(name, number, config.arch, _own_source(data, own), True, (0, 1))
    none = data.source == "none"
    require(not none, "data", "", 'a directory, such as data="/data/images", since data.source is none')
    return Node(name, number, config.arch, data, False, part)


def _own_source(data: DataConfig, config: NodeConfig) -> DataConfig:
    source = config.source or ("manifest" if config.data.lower().endswith(MANIFESTS) else "folder")
    if source in ("folder", "manifest"):
        require(bool(config.data), "data", config.data, f"a path, for source {source}")
        absolute = Path(config.data).expanduser().is_absolute()
        require(absolute, "data", config.data, "an absolute path, or source=hub and a hub data set")
    image, label = config.image_column or data.image_column, config.label_column or data.label_column
    return replace(
        data, source=source, name=config.data, split=config.split, nodes=(), image_column=image, label_column=label
    )  # fmt: skip


def _named_by_place(places: tuple[str, ...], number: int) -> str:
    """A simulated client's name: that of its directory or file, where no other has the same."""
    names = [clean_name(Path(place).expanduser().absolute().stem) for place in places]
    name = names[number]
    return name if name and Counter(names)[name] == 1 else f"client {number}"


def node_images(settings: Settings, node: Node, spec: ModelSpec) -> tuple[ImageSet, ImageSet, ModelSpec]:
    """`node_split` at the size that the node's model takes."""
    train, held_out, spec = node_split(settings, node, spec)
    with torch.device("meta"):
        size = build_model(spec).image_size
    return train.resized(size), held_out.resized(size), spec


def node_split(settings: Settings, node: Node, spec: ModelSpec) -> tuple[ImageSet, ImageSet, ModelSpec]:
    """(train, held out) of a node, of the classes that its model knows; and the model with its classes.

    Nothing is decoded yet; `loaded` does it where all fit into memory. Of a source that all
    share, a node holds out of its part only where clients evaluate: the test split is the server's.

    Raises:
        EmptyPartitionError: there is no image.
        SettingError: a class that the federation does not know, or a part that does not exist.
        FileNotFoundError: naming what is missing.
    """
    if node.owned:
        train, held_out, spec = _owned(settings, node, spec)
    else:
        images, _ = shared_images(settings.data)
        parts = partition(images.labels, settings.data, node.part[1], settings.seed)
        if not node.part[0] < len(parts):
            raise EmptyPartitionError(f"partition-id: got {node.part[0]}, allowed: 0 to {len(parts) - 1}")
        own = images.select(parts[node.part[0]])
        train, held_out = hold_out(own, node.data.test_fraction if settings.clients_evaluate else 0.0)
    train, held_out = (each.of_classes(spec.class_names) for each in (train, held_out))
    if not len(train):
        raise EmptyPartitionError(
            f"partition {node.part[0]} of {node.part[1]} is empty: this client has nothing to train on"
            if not node.owned or node.part[1] > 1
            else f"data: got {node.data.name!r}, allowed: images of the model's classes, {spec.class_names}"
        )
    return train, held_out, spec


def _owned(settings: Settings, node: Node, spec: ModelSpec) -> tuple[ImageSet, ImageSet, ModelSpec]:
    """Images in the federation's classes; where these have no names, they have those of this node's own."""
    known = settings.model.student.class_names
    train, held_out = owned_images(node.data, known, node.part, settings.seed)
    if known is None and spec.class_names is None:
        names, count = train.class_names, spec.num_classes
        allowed = f"{count} classes, as model.student.num_classes says, or names in model.student.class_names"
        require(len(names) == count, "data", f"{len(names)} classes, {', '.join(names)}", allowed)
        spec = replace(spec, class_names=names)  # the server refuses nodes that do not agree
    return train, held_out, spec


@contextmanager
def telling(name: str) -> Iterator[None]:
    """Begin whatever error leaves with the node's name: the server knows a failed client by a number alone."""
    try:
        yield
    except Exception as error:
        if not name:
            raise
        plain = isinstance(error, SettingError | FileFormatError | OSError | EmptyPartitionError)
        text = re.sub(r"^data\.name\b", "data", str(error))
        raise NodeError(f"{name}: {text if plain else f'{type(error).__name__}: {text}'}") from error
