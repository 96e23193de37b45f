import json
import os
import stat

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from smi_fed.files import (
    FileFormatError,
    load_tensors,
    reading,
    replacing,
    save_tensors,
    writable_directory,
    write_json,
)


def names(directory):
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize("old", [None, "old"])
def test_a_block_that_succeeds_replaces(tmp_path, old):
    path = tmp_path / "x.txt"
    if old:
        path.write_text(old)
    with replacing(path) as part:
        assert part.parent == path.parent
        assert part.suffix == ".txt"
        part.write_text("new")
        assert path.exists() == bool(old)
    assert path.read_text() == "new"
    assert names(tmp_path) == ["x.txt"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("old", [None, "old"])
def test_a_block_that_fails_leaves_what_was(tmp_path, old, error):
    path = tmp_path / "x.txt"
    if old:
        path.write_text(old)

    def fail():
        with replacing(path) as part:
            part.write_text("half")
            raise error

    with pytest.raises(error):
        fail()
    assert names(tmp_path) == (["x.txt"] if old else [])
    assert not old or path.read_text() == old


def test_a_device_without_room_is_no_damaged_file(tmp_path):
    with pytest.raises(torch.OutOfMemoryError), reading(tmp_path / "x"):
        raise torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(FileFormatError, match="x: truncated or not what it should be .RuntimeError: no.x1b"):
        with reading(tmp_path / "x"):
            raise RuntimeError("no\x1b")


def test_two_writers_do_not_meet(tmp_path):
    with replacing(tmp_path / "x") as first, replacing(tmp_path / "x") as second:
        assert first != second
        first.write_text("first")
        second.write_text("second")
    assert (tmp_path / "x").read_text() == "first"  # the outer block ends last
    assert names(tmp_path) == ["x"]


@pytest.mark.parametrize("write", [
    lambda path: write_json(path, {}),
    lambda path: save_tensors(path, {"x": torch.zeros(1)}, "kind", 1),
], ids=["json", "tensors"])  # fmt: skip
def test_others_may_read_what_the_umask_lets_them(tmp_path, write):
    before = os.umask(0o027)
    try:
        write(tmp_path / "x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o640


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(values)
def test_json_comes_back(tmp_path_factory, value):
    path = tmp_path_factory.getbasetemp() / "x.json"
    write_json(path, value)
    assert json.loads(path.read_text(encoding="utf-8")) == value


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {"a": [float("-inf")]}, {"a": object()}])
def test_what_is_not_json_leaves_the_old_file(tmp_path, value):
    path = tmp_path / "x.json"
    write_json(path, {"old": 1})
    with pytest.raises((ValueError, TypeError)):
        write_json(path, value)
    assert json.loads(path.read_text()) == {"old": 1}
    assert names(tmp_path) == ["x.json"]


def test_tensors_and_metadata_come_back(tmp_path):
    path = tmp_path / "x.safetensors"
    tensors = {"a": torch.rand(3, 4).T, "b": torch.tensor([True, False]), "c": torch.zeros(0, 2)}
    save_tensors(path, tensors, "kind", 3, note="ü")
    got, metadata = load_tensors(path, "kind", 3)
    assert all(torch.equal(got[name], tensor) for name, tensor in tensors.items())
    assert got.keys() == tensors.keys()
    assert metadata == {"format": "kind", "version": "3", "note": "ü"}


@pytest.mark.parametrize(
    ("kind", "version", "says"),
    [("other", 3, "format is 'kind', expected 'other'"), ("kind", 4, "version is '3'.*version '4'")],
)
def test_another_format_or_version(tmp_path, kind, version, says):
    path = tmp_path / "x.safetensors"
    save_tensors(path, {"a": torch.zeros(1)}, "kind", 3)
    with pytest.raises(FileFormatError, match=says) as error:
        load_tensors(path, kind, version)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t, m: t.update(a=t["a"] + 1), "a does not match its checksum"),
        (lambda t, m: t.update(a=t["a"].double()), "a does not match its checksum"),
        (lambda t, m: t.update(a=t["a"].view(2, 2)), "a does not match its checksum"),
        (lambda t, m: t.pop("b"), "b is missing"),
        (lambda t, m: t.update(c=torch.ones(1)), "c was added"),
        (lambda t, m: m.update(note="other"), "metadata does not match its checksum"),
        (lambda t, m: m.pop("sha256"), "no checksums"),
        (lambda t, m: m.update(sha256="[]"), "no checksums"),
    ],
)
def test_a_changed_file_says_what_was_changed(tmp_path, change, says):
    path = tmp_path / "x.safetensors"
    save_tensors(path, {"a": torch.arange(4.0), "b": torch.tensor(1)}, "kind", 1, note="n")
    with safe_open(path, framework="pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in ("a", "b")}, file.metadata()
    change(tensors, metadata)
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(FileFormatError, match=says) as error:
        load_tensors(path, "kind", 1)
    assert str(path) in str(error.value)


def test_any_flipped_byte_is_seen(tmp_path):
    path = tmp_path / "x.safetensors"
    save_tensors(path, {"a": torch.arange(4.0)}, "kind", 1)
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(FileFormatError):
            load_tensors(path, "kind", 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.bool, torch.int64, torch.float64])
def test_every_dtype_and_no_dimensions(tmp_path, dtype):
    path = tmp_path / "x.safetensors"
    save_tensors(path, {"a": torch.ones((), dtype=dtype), "b": torch.zeros(0, 3, dtype=dtype)}, "kind", 1)
    assert {name: (t.dtype, t.shape) for name, t in load_tensors(path, "kind", 1)[0].items()} == {
        "a": (dtype, ()), "b": (dtype, (0, 3))}  # fmt: skip


@pytest.mark.parametrize("content", [b"", b"{}", b"PK\x03\x04" + bytes(64), b"\xff" * 64])
def test_what_is_not_safetensors(tmp_path, content):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(FileFormatError, match="not a safetensors file") as error:
        load_tensors(path, "kind", 1)
    assert str(path) in str(error.value)


def test_a_directory_is_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        load_tensors(tmp_path, "kind", 1)


def test_a_writable_directory_is_made_and_left_empty(tmp_path):
    directory = tmp_path / "a" / "b"
    assert writable_directory(directory) == directory
    assert writable_directory(str(directory)) == directory
    assert names(directory) == []


@pytest.mark.parametrize("below", ["file", "file/deeper", "file/even/deeper"])
def test_a_directory_that_cannot_be(tmp_path, below):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="cannot write to the directory") as error:
        writable_directory(tmp_path / below)
    assert str(tmp_path / below) in str(error.value)


def test_a_directory_that_refuses_files(tmp_path, monkeypatch):
    def refuses(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("smi_fed.files.tempfile.NamedTemporaryFile", refuses)
    with pytest.raises(PermissionError, match="cannot write to the directory") as error:
        writable_directory(tmp_path / "a")
    assert str(tmp_path / "a") in str(error.value)
