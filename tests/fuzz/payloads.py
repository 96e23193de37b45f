"""Hostile bytes of arrays and of files of tensors, pickles among them."""

import io
import json
import pickle
import zipfile
from random import Random

import numpy as np
import torch
from flwr.app import Array

from smi_fed.strategies.payloads import decode
from tests.fuzz.mutations import as_json, number, scrambled, text, tree


def npy(header: str, body: bytes = b"", version: tuple[int, int] = (1, 0)) -> bytes:
    return b"\x93NUMPY" + bytes(version) + len(header).to_bytes(2 if version < (2, 0) else 4, "little") + (
        header.encode("latin1") + body
    )  # fmt: skip


class Planted:
    """Touches `Planted.loaded` when somebody unpickles it."""

    loaded = 0

    def __reduce__(self):
        return _count, ()


def _count():
    Planted.loaded += 1


def pickled() -> list[bytes]:
    """Payloads with a pickle in them, in every wrapping that some reader of numpy or torch would open."""
    bare, objects, zipped = pickle.dumps(Planted()), io.BytesIO(), io.BytesIO()
    np.save(objects, np.array([Planted()], dtype=object), allow_pickle=True)
    np.savez(zipped, x=np.array([Planted()], dtype=object))
    like_torch = io.BytesIO()
    with zipfile.ZipFile(like_torch, "w") as file:
        file.writestr("archive/data.pkl", bare)
        file.writestr("archive/version", "3\n")
    return [bare, objects.getvalue(), zipped.getvalue(), like_torch.getvalue()]


HEADERS = (
    "{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000000,), }",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (3000000000,), }",
    "{'descr': ('<f4', (100000000,)), 'fortran_order': False, 'shape': (8,), }",
    "{'descr': '<U100000000', 'fortran_order': False, 'shape': (8,), }",
    "{'descr': '|V0', 'fortran_order': False, 'shape': (9000000000000000000,), }",
    "{'descr': '|O', 'fortran_order': False, 'shape': (8,), }",
    "{'descr': '>f4', 'fortran_order': True, 'shape': (-8,), }",
    "{'descr': [('a', '<f4'), ('b',)], 'fortran_order': False, 'shape': (8,), }",
    "{'descr': '<f4', 'fortran_order': 2, 'shape': (8L,), }",
    "{'descr': '<f4',\n  'x\n y",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (" + "9" * 300 + ",), }",
    "{[]: 1}",
    "{'descr': " + "(" * 190 + "'<f4'" + ",)" * 190 + ", 'fortran_order': False, 'shape': (8,), }",
    "-" * 5000 + "1",
    "[" * 5000,
    "",
)


def payload(rng: Random, data: bytes) -> bytes:
    """Other bytes than an array's own."""
    kind = rng.randrange(6)
    if kind < 2:
        return scrambled(rng, data)
    if kind == 2:
        return rng.choice(pickled())
    if kind == 3:
        header = rng.choice(HEADERS)
        return npy(header, data[128:], rng.choice(((1, 0), (1, 0), (2, 0), (3, 0), (9, 9))))
    if kind == 4:
        return rng.choice((b"", b"PK\x03\x04", b"\x93NUMPY", b"PK\x05\x06" + bytes(18), data[: len(data) // 2]))
    return data + bytes(rng.choice((1, 1000, 100_000)))


def values_of(known: Array):
    """The values of an array; None where it was changed before and has none any more."""
    try:
        like = torch.empty(known.shape, dtype=getattr(torch, known.dtype), device="meta")
        return decode("x", known, like).numpy()
    except Exception:  # whatever torch says of such a dtype or shape; numpy.load would copy elements without end
        return None


def array(rng: Random, known: Array) -> Array:
    """An array with other values, another payload, or another opinion of itself."""
    kind = rng.randrange(8)
    values = values_of(known)
    if kind < 3 and values is not None:
        values = values.astype(np.uint8) if values.dtype == bool and kind == 2 else values
        if values.size and kind < 2:
            with np.errstate(all="ignore"):
                values.reshape(-1)[rng.randrange(values.size)] = np.float64(number(rng)).astype(values.dtype)
            return Array(values)
        change = rng.randrange(6)
        with np.errstate(all="ignore"):
            others = (values[..., None], values.ravel()[:-1], values * 1e30, -values, values.T, values * 0)
            return Array(np.asarray(others[change], rng.choice((values.dtype, "<f2", "<f8", "<c8", ">f4", "<i8", "?"))))
    parts = {"dtype": known.dtype, "shape": known.shape, "stype": known.stype, "data": known.data}
    if kind == 3:
        parts["dtype"] = rng.choice(("float64", "float16", "object", "", "O", "bfloat16", text(rng)))
    elif kind == 4:
        parts["shape"] = rng.choice(((), (0,), (2**62,), (-1, 8), (1,) * 100, tuple(known.shape)[::-1]))
    elif kind == 5:
        parts["stype"] = rng.choice(("torch.tensor", "pickle", "numpy", "", text(rng)))
    else:
        parts["data"] = payload(rng, known.data)
    return Array(**parts)


DTYPES = (
    "F32", "F64", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL", "U16", "U32", "U64", "F8_E4M3", "F8_E5M2",
    "F8_E8M0", "F4", "F6_E2M3", "F6_E3M2", "C64", "F128", "I4", "",
)  # fmt: skip


def safetensors_file(rng: Random, data: bytes) -> bytes:
    """The bytes of a file of tensors, with other bytes or another header."""
    if rng.random() < 0.4:
        return scrambled(rng, data)
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    for _ in range(rng.randrange(1, 4)):
        tensors = [key for key, value in header.items() if isinstance(value, dict) and "dtype" in value]
        if rng.random() < 0.5 or not tensors:
            header = tree(rng, header, ("__metadata__", "data_offsets", "shape", "dtype"))
            if not isinstance(header, dict):
                break
            continue
        about = dict(header[key := rng.choice(tensors)])
        change = rng.randrange(3)
        if change == 0:
            about["dtype"] = rng.choice(DTYPES)
        elif change == 1:
            sides = ([], [0], [2**62], [2**32, 2**32], [-1], [1] * 200, [0, 2**62], [10**30], [1.5], "x")
            about["shape"] = rng.choice(sides)
        else:
            about["data_offsets"] = rng.choice(([0, 0], [0, 2**62], [-1, 8], [len(body), len(body)], [8, 0], [0]))
        header[key] = about
    found = as_json(rng, header).encode(errors="replace")
    size = rng.choice((len(found),) * 9 + (0, len(found) + 1, 2**40, 2**63))
    return size.to_bytes(8, "little") + found + body
