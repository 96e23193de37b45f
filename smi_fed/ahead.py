"""Work that a thread does while the caller uses what it did before."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

Made = TypeVar("Made")


def in_turn(pieces: Iterable[Callable[[], Made]]) -> Generator[Made]:
    """What each piece of work makes, when it is asked for."""
    return (piece() for piece in pieces)


def ahead(pieces: Iterable[Callable[[], Made]], device: torch.device) -> Generator[Made]:
    """What each piece of work makes, in order; a thread makes the next one while the caller uses the last.

    So two of them are in memory at a time. What a piece raises reaches the caller in its place. Close
    the generator (`contextlib.closing`) to leave early: it waits for the piece in hand. The thread's
    work must not draw from torch's own random state, nor change what the caller uses.

    Args:
        device: on CUDA the thread has a stream of its own.
    """
    pool = ThreadPoolExecutor(1, thread_name_prefix="smi-fed-ahead")
    try:
        coming = None
        for piece in pieces:
            ready, coming = coming, pool.submit(_apart(piece, device))
            if ready is not None:
                yield ready.result()
                del ready
        if coming is not None:
            yield coming.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _apart(piece: Callable[[], Made], device: torch.device) -> Callable[[], Made]:
    """The piece on a CUDA stream of its own, after what the caller has asked of the device; elsewhere as it is."""
    if device.type != "cuda":
        return piece
    own, callers = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    own.wait_stream(callers)

    def run() -> Made:
        with torch.cuda.stream(own):
            made = piece()
        own.synchronize()
        _hand_over(made, callers)
        return made

    return run


def _hand_over(made: object, stream: torch.cuda.Stream) -> None:
    """Tensors of one stream whose memory another one uses must not be given away while it does."""
    if isinstance(made, Tensor) and made.is_cuda:
        made.record_stream(stream)
    elif isinstance(made, list | tuple):
        for each in made:
            _hand_over(each, stream)
