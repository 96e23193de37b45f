"""Images that are decoded when they are asked for."""

from __future__ import annotations

import ctypes
import math
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import count
from typing import Any, Protocol

import torch
from torch import Tensor

from smi_fed.data.config import DataConfig
from smi_fed.data.decoding import check_header, finished, read_pixels, resize
from smi_fed.files import FileFormatError

ALIGNED = 16
"""Bytes; floats may not begin anywhere."""

TRIMMED = 320
"""After so many decoded images free memory goes back to the system."""

NAMED = 5
"""Most broken files that one error names."""


class Decoder(Protocol):
    """Where images come from, by number."""

    def __len__(self) -> int:
        """How many there are."""
        ...

    def pixels(self, number: int) -> Tensor:
        """One image as `to_pixels` gives it; a FileFormatError names one that cannot be read."""
        ...

    def check(self, number: int) -> None:
        """Raise where a look at the beginning tells that it cannot be read."""
        ...


@dataclass(frozen=True)
class Files:
    """Image files."""

    paths: Sequence[str]
    config: DataConfig

    def __len__(self) -> int:
        return len(self.paths)

    def pixels(self, number: int) -> Tensor:
        """See `Decoder`."""
        return read_pixels(self.paths[number], self.config)

    def check(self, number: int) -> None:
        """See `Decoder`."""
        check_header(self.paths[number])


class Kept:
    """Images in memory, as long as there is room; nothing is ever thrown out for another.

    Rows are drawn at random, so that whichever half is kept, half of the draws find theirs.
    All lie in one piece of memory: single ones among the decoders' short-lived arrays would
    leave holes of several times their own size.
    """

    def __init__(self, room: int) -> None:
        self.room, self.used, self.lock = room, 0, threading.Lock()
        self.places: dict[int, Tensor] = {}
        self.decoded = count(1)

    @cached_property
    def memory(self) -> Tensor:
        """(room,) uint8; the system hands its pages out when they are written."""
        return torch.empty(self.room, dtype=torch.uint8)

    def offer(self, number: int, image: Tensor) -> None:
        """Keep an image if there is room."""
        with self.lock:
            end = self.used + image.nbytes
            if end > self.room or number in self.places:
                return
            place = self.memory[self.used : end].view(image.dtype).view(image.shape)
            self.places[number] = place.copy_(image)
            self.used = -(-end // ALIGNED) * ALIGNED

    def get(self, number: int) -> Tensor | None:
        """The image, if it is kept."""
        return self.places.get(number)


def trim_memory() -> None:
    """Have glibc give free pages back, which it keeps in a heap for each thread; nothing elsewhere."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


@dataclass(frozen=True, eq=False)
class LazyImages:
    """Stands for the float32 tensor (n, c, h, w) of all its images, and decodes those that are asked for.

    Threads decode, not processes: decoders let go of Python's lock, and a client of Flower
    has threads of its own that forks do not survive. A decoded image is kept as uint8 at the
    size of its file where that is smaller, up to `config.memory` in all.

    Args:
        decoder: of all images.
        config: size, channels, and how much memory and how many threads may be used.
        numbers: (n,) int64, which of the decoder's images these are.
        size: (h, w) that the images are resized to after `config.image_size`.
        device: of what is handed out.
    """

    decoder: Decoder
    config: DataConfig
    numbers: Tensor
    size: tuple[int, int]
    device: torch.device = torch.device("cpu")
    kept: Kept = field(default_factory=lambda: Kept(0), repr=False)

    @classmethod
    def of(cls, decoder: Decoder, config: DataConfig) -> LazyImages:
        """All images of `decoder`."""
        kept = Kept(config.memory * 2**20)
        return cls(decoder, config, torch.arange(len(decoder)), (config.image_size, config.image_size), kept=kept)

    @property
    def shape(self) -> torch.Size:
        """(n, c, h, w)."""
        return torch.Size((len(self.numbers), self.config.channels, *self.size))

    @property
    def ndim(self) -> int:
        """4."""
        return len(self.shape)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, rows: Any) -> Tensor:
        """The images at `rows` (whatever indexes a tensor's first dimension), decoded now.

        Raises:
            FileFormatError: naming an image that cannot be read.
        """
        numbers = self.numbers[rows.cpu() if isinstance(rows, Tensor) else rows]
        images = self._decode(numbers.flatten().tolist(), keep=True)
        return images.view(*numbers.shape, *images.shape[1:]).to(self.device)

    def select(self, rows: Tensor) -> LazyImages:
        """The images at `rows`, still not decoded."""
        return replace(self, numbers=self.numbers[rows.cpu()])

    def resized(self, size: tuple[int, int]) -> LazyImages:
        """The same at `size`, (h, w)."""
        return replace(self, size=tuple(size))

    def to(self, device: torch.device) -> LazyImages:
        """The same, handed out on `device`."""
        return replace(self, device=device)

    def split(self, size: int) -> Iterator[Tensor]:
        """All images in order, `size` at a time."""
        return self.batches(slice(start, start + size) for start in range(0, len(self), size))

    def batches(self, rows: Iterable[Any]) -> Iterator[Tensor]:
        """`self[each]` for each of `rows`; the next one is decoded while its predecessor is in use."""
        with ThreadPoolExecutor(1) as ahead:
            waiting = None
            for each in rows:
                following = ahead.submit(self.__getitem__, each)
                if waiting is not None:
                    yield waiting.result()
                waiting = following
            if waiting is not None:
                yield waiting.result()

    def loaded(self) -> Tensor | LazyImages:
        """The tensor, where it fits `config.memory`; else the same, after a look at the beginning of each image.

        Raises:
            FileFormatError: naming images that cannot be read.
        """
        numbers = self.numbers.tolist()
        largest = max(math.prod(self.size), self.config.image_size**2)
        if 4 * len(numbers) * self.config.channels * largest <= self.config.memory * 2**20:
            return self._decode(numbers, keep=False).to(self.device)
        with ThreadPoolExecutor(self.config.workers) as threads:
            broken = [each for each in threads.map(self._fault, numbers) if each]
        if broken:
            more = f"; and {len(broken) - NAMED} more" if len(broken) > NAMED else ""
            raise FileFormatError("; ".join(broken[:NAMED]) + more)
        return self

    def _fault(self, number: int) -> str:
        try:
            self.decoder.check(number)
        except (FileFormatError, OSError) as error:
            return str(error)
        return ""

    def _decode(self, numbers: list[int], keep: bool) -> Tensor:
        images = torch.empty((len(numbers), self.config.channels, *[self.config.image_size] * 2))

        def fill(place: int) -> None:
            images[place] = self._image(numbers[place], keep)

        with ThreadPoolExecutor(self.config.workers) as threads:
            for _ in threads.map(fill, range(len(numbers))):  # raises what `fill` raised
                pass
        return resize(images, self.size)

    def _image(self, number: int, keep: bool) -> Tensor:
        """(c, h, w) at the configured size."""
        known = self.kept.get(number)
        if known is not None:
            return finished(known, self.config) if known.dtype == torch.uint8 else known
        pixels = self.decoder.pixels(number)
        if not next(self.kept.decoded) % TRIMMED:
            trim_memory()
        image = finished(pixels, self.config)
        if keep:
            small = pixels.dtype == torch.uint8 and pixels.nbytes <= image.nbytes
            self.kept.offer(number, pixels if small else image)
        return image
