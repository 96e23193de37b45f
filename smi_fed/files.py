"""Files that are either whole or absent."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from smi_fed.checks import printable

CHECKSUMS = "sha256"


class FileFormatError(ValueError):
    """A file that is truncated, changed, foreign or of an unknown version; the message names it."""


PUZZLED = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What reading raises where a file holds something else than it should."""


@contextmanager
def reading(path: str | os.PathLike[str]) -> Iterator[None]:
    """Around all that takes a file's content apart.

    Raises:
        FileFormatError: whatever is wrong with it, naming `path`. One that is raised inside stays as it is, and so
            does the error of a device without room.
    """
    try:
        yield
    except (FileFormatError, torch.OutOfMemoryError):
        raise
    except PUZZLED as error:
        reason = printable(f"{type(error).__name__}: {error}")
        raise FileFormatError(f"{path}: truncated or not what it should be ({reason})") from error


def read_json(path: str | os.PathLike[str]) -> Any:
    """What a file of JSON says.

    Raises:
        FileNotFoundError, FileFormatError: there is none, or it is truncated or not JSON.
    """
    with reading(path):
        return json.loads(Path(path).read_text(encoding="utf-8"))


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block succeeds."""
    target = Path(path)
    part = target.with_name(f".{target.name}.{secrets.token_hex(8)}{target.suffix}")
    part.touch(exist_ok=False)
    mode = part.stat().st_mode  # the umask's; tempfile and safetensors would let nobody else read an artefact
    try:
        yield part
        part.chmod(mode)
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` as indented JSON, atomically; NaN and infinities are refused."""
    text = json.dumps(value, indent=2, allow_nan=False)
    with replacing(path) as part:
        part.write_text(text + "\n", encoding="utf-8")


def save_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, torch.Tensor], kind: str, version: int, **metadata: str
) -> None:
    """Write tensors as safetensors, atomically, with format name, version and checksum in the metadata."""
    header = {"format": kind, "version": str(version), **metadata}
    # Clones, because safetensors refuses tensors that share memory.
    own = {name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}
    with replacing(path) as part:
        save_file(own, part, metadata=header | {CHECKSUMS: json.dumps(checksums(own, header))})


def checksums(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """SHA-256 of each CPU tensor (dtype, shape, bytes), and under "" of the metadata.

    Tells a damaged file from a whole one. It is no signature: who can write the file can
    write the sums.
    """
    sums = {"": hashlib.sha256(json.dumps(dict(metadata), sort_keys=True).encode()).hexdigest()}
    for name, tensor in tensors.items():
        found = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        sums[name] = found.hexdigest()
    return sums


def format_of(path: str | os.PathLike[str]) -> str:
    """The format's name of a file of `save_tensors`, empty where it has none.

    Raises:
        FileFormatError: no safetensors file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return str((file.metadata() or {}).get("format", ""))
    except SafetensorError as error:
        raise FileFormatError(f"{path}: truncated or not a safetensors file ({error})") from error


def load_tensors(
    path: str | os.PathLike[str], kind: str, version: int, *, verify: bool = True
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Read what `save_tensors` wrote.

    Args:
        verify: compare with the checksums. Without it the tensors are memory-mapped and read when they are used.

    Raises:
        FileNotFoundError: nothing stands at `path`.
        FileFormatError: the file is truncated, not safetensors, of another format, of an
            unknown version (both versions are named) or changed after it was written.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with reading(path), safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
    except SafetensorError as error:
        raise FileFormatError(f"{path}: truncated or not a safetensors file ({error})") from error
    if metadata.get("format") != kind:
        raise FileFormatError(f"{path}: format is {metadata.get('format')!r}, expected {kind!r}")
    if metadata.get("version") != str(version):
        raise FileFormatError(
            f"{path}: {kind} version is {metadata.get('version')!r}, this smi-fed reads version {str(version)!r}"
        )
    if not verify:
        metadata.pop(CHECKSUMS, None)
        return tensors, metadata
    with reading(path):
        changed = _changed(tensors, metadata)
    if changed:
        raise FileFormatError(f"{path}: changed after it was written: {changed}")
    return tensors, metadata


def _changed(tensors: Mapping[str, torch.Tensor], metadata: dict[str, str]) -> str:
    """What does not agree with the stored checksums, which are taken out of `metadata`; empty if all does."""
    try:
        stored = json.loads(metadata.pop(CHECKSUMS, ""))
        assert isinstance(stored, dict)
    except (ValueError, RecursionError, AssertionError):
        return "it has no checksums"
    own = checksums(tensors, metadata)
    wrong = {name or "metadata": "is missing" for name in stored.keys() - own.keys()}
    wrong |= dict.fromkeys(own.keys() - stored.keys(), "was added")
    wrong |= {name or "metadata": "does not match its checksum" for name in own.keys() & stored.keys()
              if own[name] != stored[name]}  # fmt: skip
    return ", ".join(f"{name} {what}" for name, what in sorted(wrong.items()))


def writable_directory(path: str | os.PathLike[str]) -> Path:
    """Create `path` if needed and prove that files can be written there.

    Raises:
        PermissionError or another OSError naming the path.
    """
    directory = Path(path)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=directory, prefix=".probe."):
            pass
    except OSError as error:
        raise type(error)(f"cannot write to the directory {directory}: {error}") from error
    return directory
