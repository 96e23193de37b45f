from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from smi_fed import files
from smi_fed.files import FileFormatError
from smi_fed.sparse_images import FORMAT, VERSION, SparseImages
from tests.same import assert_same

FIELDS = [f.name for f in fields(SparseImages)]


def sparse(count=3, grid=(2, 3), patch=(4, 2), kept=2, channels=1, classes=5, soft=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(count, grid[0] * grid[1], generator=generator).argsort(1)
    mask = torch.zeros(order.shape, dtype=torch.bool).scatter(1, order[:, :kept], True).view(count, *grid)
    steps = torch.randint(0, 100, mask.shape, generator=generator)
    size = (grid[0] * patch[0], grid[1] * patch[1])
    return SparseImages(
        images=torch.rand(count, channels, *size, generator=generator),
        mask=mask,
        targets=torch.randint(0, classes, (count,), generator=generator),
        patch_size=patch,
        ids=torch.arange(count),
        teachers=torch.full((count,), 7),
        stopped_at=steps.masked_fill(mask, -1),
        soft_labels=torch.rand(count, classes, generator=generator).softmax(1) if soft else None,
    )


def uneven():
    found = sparse(2)
    mask = torch.zeros(2, 2, 3, dtype=torch.bool)
    mask[0, 0, 0] = mask[1, 0, 1] = mask[1, 1, 1] = True
    return replace(found, mask=mask, stopped_at=torch.where(mask, -1, 4))


def tensors_of(path):
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


shapes = st.fixed_dictionaries(
    {
        "count": st.integers(1, 4),
        "grid": st.tuples(st.integers(1, 4), st.integers(1, 4)),
        "patch": st.tuples(st.integers(1, 3), st.integers(1, 3)),
        "kept": st.integers(0, 20),
        "channels": st.sampled_from([1, 3]),
        "seed": st.integers(0, 99),
    }
)


@settings(max_examples=40, deadline=None)
@given(shapes, st.floats(0, 1, width=32))
def test_kept_and_masked_say_what_the_mask_says(shape, fill):
    found = sparse(**shape)
    rows, columns = found.grid
    assert found.kept.shape == (len(found), min(shape["kept"], rows * columns))
    painted, (ph, pw) = found.masked(fill), found.patch_size
    for image in range(len(found)):
        correct = [row * columns + column for row, column in found.mask[image].nonzero().tolist()]
        assert found.kept[image].tolist() == sorted(correct)
        for patch in range(rows * columns):
            row, column = divmod(patch, columns)
            where = (image, slice(None), slice(row * ph, row * ph + ph), slice(column * pw, column * pw + pw))
            expected = found.images[where] if patch in correct else torch.full_like(found.images[where], fill)
            assert torch.equal(painted[where], expected)
    assert found.kept_fraction == pytest.approx(found.kept.shape[1] / (rows * columns))


def test_masked_is_black_unless_told_and_leaves_the_images():
    found = sparse()
    before = found.images.clone()
    assert torch.equal(found.masked(), found.masked(0.0))
    assert not torch.equal(found.masked(), found.masked(0.5))
    assert torch.equal(found.images, before)


def test_different_numbers_have_a_mask_but_no_kept():
    with pytest.raises(ValueError, match=r"between 1 and 2 patches.*`mask`"):
        uneven().kept  # noqa: B018
    assert uneven().select(torch.tensor([1])).kept.tolist() == [[1, 4]]
    assert uneven().kept_fraction == pytest.approx(3 / 12)


def test_no_images_are_a_set_too(tmp_path):
    nothing = sparse().select(slice(0, 0))
    assert len(nothing) == 0
    assert len(nothing.kept) == 0
    nothing.save(tmp_path / "x.safetensors")
    assert_same(SparseImages.load(tmp_path / "x.safetensors"), nothing)


@pytest.mark.parametrize("soft", [True, False])
def test_select_takes_rows_in_the_order_asked(soft):
    found = sparse(4, soft=soft)
    chosen = found.select(torch.tensor([3, 0, 0]))
    assert chosen.ids.tolist() == [3, 0, 0]
    for name in FIELDS:
        value = getattr(found, name)
        if name == "patch_size" or value is None:
            assert getattr(chosen, name) == value
        else:
            assert torch.equal(getattr(chosen, name), torch.stack([value[3], value[0], value[0]]))
    assert_same(found.select(slice(1, 3)), found.select(torch.tensor([1, 2])))


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=4), st.booleans())
def test_concat_and_select_undo_each_other(lengths, soft):
    whole = sparse(sum(lengths), soft=soft)
    ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    parts = [whole.select(slice(end - length, end)) for end, length in zip(ends, lengths, strict=True)]
    assert_same(SparseImages.concat(parts), whole)


def test_concat_keeps_soft_labels_only_where_all_have_them():
    assert SparseImages.concat([sparse(), sparse(soft=False)]).soft_labels is None
    assert SparseImages.concat([sparse(), sparse()]).soft_labels.shape == (6, 5)


def multi_label(found):
    return replace(found, targets=torch.zeros(len(found), 5))


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ([], "nothing to concatenate"),
        ([sparse(), sparse(patch=(2, 2), grid=(4, 3))], r"\(2, 2\).*\(4, 2\)"),
        ([sparse(), sparse(grid=(2, 2))], r"\(1, 8, 4\).*\(1, 8, 6\)"),
        ([sparse(), sparse(channels=3)], r"\(1, 8, 6\).*\(3, 8, 6\)"),
        ([sparse(), multi_label(sparse())], "different"),
        ([sparse(classes=5), sparse(classes=6)], "different"),
    ],
    ids=["none", "patch size", "image size", "channels", "targets", "classes"],
)
def test_what_cannot_be_one_set(parts, says):
    with pytest.raises(ValueError, match=says):
        SparseImages.concat(parts)


BAD = {
    "uint8 images": ({"images": torch.zeros(3, 1, 8, 6, dtype=torch.uint8)}, "uint8"),
    "no channels": ({"images": torch.zeros(3, 8, 6)}, r"\(3, 8, 6\)"),
    "negative pixels": ({"images": torch.full((3, 1, 8, 6), -0.1)}, "outside"),
    "bright pixels": ({"images": torch.full((3, 1, 8, 6), 1.1)}, "outside"),
    "nan": ({"images": torch.full((3, 1, 8, 6), torch.nan)}, "outside"),
    "float mask": ({"mask": torch.ones(3, 2, 3)}, "mask is torch.float32"),
    "other grid": ({"mask": torch.ones(3, 3, 2, dtype=torch.bool)}, r"mask is .*\(3, 3, 2\).*\(3, 2, 3\)"),
    "flipped mask": ({"mask": ~sparse().mask}, "stopped_at does not agree"),
    "all kept, some stopped": ({"mask": torch.ones(3, 2, 3, dtype=torch.bool)}, "stopped_at does not agree"),
    "float steps": ({"stopped_at": sparse().stopped_at.float()}, "stopped_at"),
    "short steps": ({"stopped_at": sparse().stopped_at[:2]}, "stopped_at"),
    "fewer ids": ({"ids": torch.arange(2)}, "3 images but .*ids"),
    "float ids": ({"ids": torch.arange(3.0)}, "ids"),
    "one teacher": ({"teachers": torch.tensor(0)}, "teachers"),
    "more targets": ({"targets": torch.arange(4)}, "3 images but .*targets"),
    "float classes": ({"targets": torch.zeros(3)}, "targets"),
    "integer multi-label": ({"targets": torch.zeros(3, 5, dtype=torch.long)}, "targets"),
    "too deep targets": ({"targets": torch.zeros(3, 5, 2)}, "targets"),
    "fewer soft labels": ({"soft_labels": torch.zeros(2, 5)}, "3 images but .*soft_labels"),
    "soft labels that are none": ({"soft_labels": torch.full((3, 5), torch.nan)}, "soft_labels"),
    "flat soft labels": ({"soft_labels": torch.zeros(3)}, "soft_labels"),
    "patch that does not divide": ({"patch_size": (3, 2)}, "patch_size"),
    "no patch": ({"patch_size": (0, 0)}, "patch_size"),
    "negative patch": ({"patch_size": (-4, -2)}, "patch_size"),
    "half a patch": ({"patch_size": (4.0, 2.0)}, "patch_size"),
}
every_bad = pytest.mark.parametrize(("change", "says"), BAD.values(), ids=BAD)


@every_bad
def test_fields_that_do_not_fit(change, says):
    with pytest.raises(ValueError, match=f"(?s)not a set of sparse images: .*(?:{says})"):
        replace(sparse(), **change)


@every_bad
def test_a_file_whose_fields_do_not_fit(tmp_path, change, says):
    path = tmp_path / "x.safetensors"
    sparse().save(path)
    changed = {name: torch.as_tensor(value) for name, value in change.items()}
    files.save_tensors(path, tensors_of(path)[0] | changed, FORMAT, VERSION)
    with pytest.raises(FileFormatError, match=says) as error:
        SparseImages.load(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("kind", ["plain", "soft", "multi-label", "uneven"])
def test_a_file_gives_back_every_field(tmp_path, kind):
    found = {
        "plain": sparse(soft=False),
        "soft": sparse(channels=3),
        "multi-label": multi_label(sparse()),
        "uneven": uneven(),
    }[kind]
    found.save(tmp_path / "x.safetensors")
    assert_same(SparseImages.load(tmp_path / "x.safetensors"), found)
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_fields_may_share_their_memory(tmp_path):
    zeros = torch.zeros(3, dtype=torch.long)
    found = replace(sparse(), targets=zeros, ids=zeros, teachers=zeros)
    found.save(tmp_path / "x.safetensors")
    assert_same(SparseImages.load(tmp_path / "x.safetensors"), found)


@pytest.mark.parametrize("pixels", [0.0, 0.5, 1.0])
def test_the_mask_is_stored_and_not_guessed(tmp_path, pixels):
    found = sparse()
    found = replace(found, images=torch.full_like(found.images, pixels))  # kept and stopped patches look alike
    found.save(tmp_path / "x.safetensors")
    assert torch.equal(SparseImages.load(tmp_path / "x.safetensors").mask, sparse().mask)


@pytest.mark.parametrize("path_type", [str, lambda path: path], ids=["str", "Path"])
def test_a_missing_file(tmp_path, path_type):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.safetensors"):
        SparseImages.load(path_type(tmp_path / "nowhere.safetensors"))


@pytest.mark.parametrize("size", [0, 4, 40, -1])
def test_a_truncated_file(tmp_path, size):
    path = tmp_path / "x.safetensors"
    sparse().save(path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(FileFormatError, match="truncated") as error:
        SparseImages.load(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        (None, f"format is None, expected '{FORMAT}'"),
        ({"format": "pt"}, f"format is 'pt', expected '{FORMAT}'"),
        ({"format": FORMAT}, f"version is None.*'{VERSION}'"),
        ({"format": FORMAT, "version": "99"}, f"version is '99'.*'{VERSION}'"),
    ],
    ids=["no metadata", "foreign", "no version", "unknown version"],
)
def test_a_foreign_file(tmp_path, metadata, says):
    path = tmp_path / "x.safetensors"
    sparse().save(path)
    save_file(tensors_of(path)[0], path, metadata=metadata)
    with pytest.raises(FileFormatError, match=says) as error:
        SparseImages.load(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("name", ["mask", "images", "patch_size", "ids", "stopped_at"])
def test_a_file_that_lacks_a_field(tmp_path, name):
    path = tmp_path / "x.safetensors"
    sparse().save(path)
    tensors, metadata = tensors_of(path)
    del tensors[name]
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(FileFormatError, match=name) as error:
        SparseImages.load(path)
    assert str(path) in str(error.value)


def test_a_file_with_a_field_too_many(tmp_path):
    path = tmp_path / "x.safetensors"
    sparse().save(path)
    tensors, metadata = tensors_of(path)
    save_file(tensors | {"colour": torch.zeros(3)}, path, metadata=metadata)
    with pytest.raises(FileFormatError, match="colour"):
        SparseImages.load(path)


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_save_that_fails_midway_leaves_the_old_file(tmp_path, monkeypatch, error):
    path = tmp_path / "x.safetensors"
    sparse(seed=1).save(path)

    def fails(_tensors, part, **_):
        part.write_bytes(b"half")
        raise error

    monkeypatch.setattr(files, "save_file", fails)
    with pytest.raises(type(error)):
        sparse(seed=2).save(path)
    assert_same(SparseImages.load(path), sparse(seed=1))
    assert [each.name for each in tmp_path.iterdir()] == ["x.safetensors"]
