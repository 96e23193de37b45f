"""The bytes of an array that a client sent, without a reader that does more than take them."""

from __future__ import annotations

import io

import numpy as np
import torch
from flwr.app import Array
from flwr.app.message.array import SType
from torch import Tensor

from smi_fed.strategies.records import BadReplyError

START, LENGTH = b"\x93NUMPY\x01\x00", 2
"""Of a payload: numpy's mark with the version that `numpy.save` writes, and the bytes of its header's length."""


def decode(key: str, array: Array, like: Tensor) -> Tensor:
    """The tensor in an array that is of the shape and dtype of `like`, and finite.

    The header is compared with those that such an array can have, and not parsed: `numpy.load`, which Flower calls,
    takes memory for any shape that a header claims, opens zip archives, and raises whatever its parsers do.

    Args:
        like: on any device, torch's meta device too.

    Raises:
        BadReplyError: naming `key`.
    """
    dtype, shape = str(like.dtype).removeprefix("torch."), tuple(like.shape)
    if array.stype != SType.NUMPY:
        raise BadReplyError(f"{key} cannot be decoded: it is packed as {array.stype!r}, expected {SType.NUMPY!r}")
    data, start = memoryview(array.data), len(START) + LENGTH
    length = int.from_bytes(data[len(START) : start], "little")
    header = bytes(data[start : start + length]).strip()
    headers = {_header(dtype, shape, by_columns): by_columns for by_columns in (False, True)}
    if bytes(data[: len(START)]) != START or header not in headers:
        expected = f"{dtype} {shape} as numpy.save writes it"
        raise BadReplyError(f"{key} cannot be decoded: it is not {expected}, but begins with {header[:80]!r}")
    values, size = data[start + length :], like.numel() * like.element_size()
    if len(values) != size:
        raise BadReplyError(f"{key} carries {len(values)} bytes, expected {size}")
    order = "F" if headers[header] else "C"
    tensor = torch.from_numpy(np.frombuffer(values, dtype).reshape(shape, order=order).copy())
    if not bool(tensor.isfinite().all()):
        raise BadReplyError(f"{key} is not finite")
    return tensor


def _header(dtype: str, shape: tuple[int, ...], by_columns: bool) -> bytes:
    """What numpy says before an array of such values, without its padding."""
    buffer = io.BytesIO()
    about = {"descr": np.dtype(dtype).str, "fortran_order": by_columns, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, about)
    return buffer.getvalue()[len(START) + LENGTH :].strip()
