"""Images in directories, as people have them."""

import unicodedata
from pathlib import Path

import pytest
import torch
from PIL import Image

from smi_fed.checks import SettingError
from smi_fed.data import DataConfig, folder_images, load_images
from smi_fed.files import FileFormatError
from tests.test_data import rows


def paint(directory, counts, size=(10, 12)):
    """Class directories of one-coloured PNGs; the colour tells class and number."""
    for index, (name, count) in enumerate(counts.items()):
        (directory / name).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", size, (100 * index, 10 * number, 255)).save(directory / name / f"{number}.png")


def folder(path, **changes):
    return DataConfig(**{"source": "folder", "name": str(path), "image_size": 8, "channels": 3, **changes})


def test_a_folder_with_train_and_test(tmp_path):
    paint(tmp_path / "train", {"cat": 3, "dog": 2})
    paint(tmp_path / "test", {"cat": 1, "dog": 2})
    train, test = load_images(folder(tmp_path))
    assert train.class_names == test.class_names == ("cat", "dog")
    assert train.label_counts().tolist() == [3, 2]
    assert test.label_counts().tolist() == [1, 2]
    assert train.images.shape == (5, 3, 8, 8)
    for image, label in zip(train.images, train.labels, strict=True):
        torch.testing.assert_close(image[0], torch.full((8, 8), 100 * int(label) / 255))
        torch.testing.assert_close(image[2], torch.ones(8, 8))


def test_a_folder_that_is_split(tmp_path):
    paint(tmp_path, {"cat": 8, "dog": 4})
    train, test = folder_images(folder(tmp_path, test_fraction=0.25))
    assert train.label_counts().tolist() == [6, 3]
    assert test.label_counts().tolist() == [2, 1]
    assert len(set(rows(train, test))) == 12
    again = folder_images(folder(tmp_path, test_fraction=0.25))
    assert rows(again[1]) == rows(test)


def test_a_folder_in_grey(tmp_path):
    paint(tmp_path, {"cat": 4, "dog": 4})
    train, _ = folder_images(folder(tmp_path, channels=1, image_size=16))
    assert train.images.shape[1:] == (1, 16, 16)
    assert bool(((train.images >= 0) & (train.images <= 1)).all())


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data.name: got .*nowhere.*a directory of class directories"):
        folder_images(folder(tmp_path / "nowhere"))


def means(images):
    return [round(255 * float(image[0].mean())) for image in images.images]


@pytest.mark.parametrize("name", ["test", "val", "valid", "validation", "Val", "TEST", "testing"])
def test_held_out_images_have_many_names(tmp_path, name):
    paint(tmp_path / "train", {"cat": 3, "dog": 2})
    paint(tmp_path / name, {"cat": 1, "dog": 2})
    train, test = load_images(folder(tmp_path))
    assert (train.label_counts().tolist(), test.label_counts().tolist()) == ([3, 2], [1, 2])


def test_test_comes_before_val(tmp_path):
    for name, count in {"train": 3, "val": 4, "test": 1, "extra": 5}.items():
        paint(tmp_path / name, {"cat": count, "dog": count})
    train, test = load_images(folder(tmp_path))
    assert (len(train), len(test)) == (6, 2)


def test_train_alone_is_split_and_a_class_of_trains_is_a_class(tmp_path):
    paint(tmp_path / "a" / "train", {"cat": 4, "dog": 4})
    train, test = load_images(folder(tmp_path / "a", test_fraction=0.5))
    assert train.class_names == ("cat", "dog")
    assert (len(train), len(test)) == (4, 4)
    paint(tmp_path / "b", {"car": 4, "train": 4})
    assert load_images(folder(tmp_path / "b", test_fraction=0.5))[0].class_names == ("car", "train")


def test_held_out_images_keep_their_class_whatever_its_number(tmp_path):
    paint(tmp_path / "train", {"cat": 2, "dog": 2, "eel": 2})
    paint(tmp_path / "test", {"cat": 0, "dog": 3, "eel": 1})  # without cats torchvision would call a dog 0
    (tmp_path / "test" / "cat").rmdir()
    train, test = folder_images(folder(tmp_path))
    assert train.class_names == test.class_names == ("cat", "dog", "eel")
    assert test.labels.tolist() == [1, 1, 1, 2]
    assert means(test) == [100, 100, 100, 200]


def test_a_held_out_class_that_train_does_not_have(tmp_path):
    paint(tmp_path / "train", {"cat": 2, "dog": 2})
    paint(tmp_path / "val", {"dog": 2, "emu": 1})
    with pytest.raises(SettingError, match=r"data.name: got .*val.*train's classes, cat, dog; not of \['emu'\]"):
        folder_images(folder(tmp_path))


def test_what_is_hidden_does_not_count(tmp_path):
    paint(tmp_path, {"cat": 4, "dog": 4, ".ipynb_checkpoints": 2, "__MACOSX": 2, ".git": 1})
    for name in (".DS_Store", "Thumbs.db", "notes.txt", ".hidden.png", "._0.png"):
        (tmp_path / "cat" / name).write_bytes(b"no image")
    (tmp_path / "readme.txt").write_text("cats and dogs")
    paint(tmp_path / "dog", {".ipynb_checkpoints": 3, "small": 1})
    train, test = folder_images(folder(tmp_path, test_fraction=0.25))
    assert train.class_names == ("cat", "dog")
    assert (train.label_counts() + test.label_counts()).tolist() == [4, 5]  # one dog stands deeper


def test_a_hidden_directory_above_does_not_hide_all(tmp_path):
    paint(tmp_path / ".cache" / "pets", {"cat": 2, "dog": 2})
    train, test = folder_images(folder(tmp_path / ".cache" / "pets", test_fraction=0.5))
    assert len(train) + len(test) == 4


@pytest.mark.parametrize("ending", [".JPG", ".Jpeg", ".PNG", ".TIFF", ".tif", ".bmp", ".webp", ".gif", ".jfif", ".ppm"])
def test_endings_in_either_case(tmp_path, ending):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for number in range(2):
            kind = {".jfif": "JPEG"}.get(ending) or Image.registered_extensions()[ending.lower()]
            Image.new("RGB", (9, 9), (255, 255, 255)).save(tmp_path / name / f"{number}{ending}", kind)
    train, test = folder_images(folder(tmp_path, test_fraction=0.5))
    torch.testing.assert_close(torch.cat([train.images, test.images]), torch.ones(4, 3, 8, 8))


def test_names_in_any_script(tmp_path):
    paint(tmp_path / "données" / "train", {"猫": 2, "собака": 2, unicodedata.normalize("NFD", "gefäß"): 2})
    paint(tmp_path / "données" / "test", {"猫": 1, unicodedata.normalize("NFC", "gefäß"): 1})
    train, test = load_images(folder(tmp_path / "données"))
    assert train.class_names == tuple(sorted(("猫", "собака", unicodedata.normalize("NFC", "gefäß"))))
    assert [test.class_names[label] for label in test.labels.tolist()] == ["gefäß", "猫"]


def test_linked_directories_and_the_home_directory(tmp_path, monkeypatch):
    paint(tmp_path / "elsewhere", {"cat": 2, "dog": 2})
    (tmp_path / "home").mkdir()
    for name in ("cat", "dog"):
        (tmp_path / "home" / name).symlink_to(tmp_path / "elsewhere" / name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    train, test = folder_images(folder("~", test_fraction=0.5))
    assert len(train) + len(test) == 4


BROKEN = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("<html>404</html>"),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "header": lambda path: path.write_bytes(path.read_bytes()[:20]),
    "noise": lambda path: path.write_bytes(path.read_bytes()[:40] + bytes(200)),
}


@pytest.mark.parametrize("ending", ["png", "jpg", "tif", "webp", "bmp", "gif"])
@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_file_is_named(tmp_path, kind, ending):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for number in range(2):
            noise = Image.effect_noise((40, 40), 90).convert("RGB")
            noise.save(tmp_path / name / f"{number} é.{ending}")
    BROKEN[kind](tmp_path / "dog" / f"1 é.{ending}")
    if (kind, ending) in {("noise", "bmp"), ("noise", "tif")}:
        BROKEN["header"](tmp_path / "dog" / f"1 é.{ending}")  # zeros are a dark image there
    with pytest.raises(FileFormatError, match=rf"dog/1 é.{ending}: not a readable image .*replace it or remove it"):
        folder_images(folder(tmp_path, test_fraction=0.5))


def test_a_link_to_nowhere_is_named(tmp_path):
    paint(tmp_path, {"cat": 2, "dog": 2})
    (tmp_path / "dog" / "link.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(FileNotFoundError, match="dog/link.png"):
        folder_images(folder(tmp_path, test_fraction=0.5))


def test_classes_without_images_are_named(tmp_path):
    paint(tmp_path, {"cat": 2, "dog": 0, "eel": 0})
    (tmp_path / "eel" / "eel.txt").write_text("long")
    with pytest.raises(SettingError, match=r"data.name: got .*images \(.jpg .*\) of each class.*\['dog', 'eel'\]"):
        folder_images(folder(tmp_path))


@pytest.mark.parametrize("make", [lambda path: None, lambda path: Image.new("L", (9, 9)).save(path / "1.png")])
def test_no_class_directories(tmp_path, make):
    make(tmp_path)
    with pytest.raises(SettingError, match="data.name: got .*a directory of class directories; there are none"):
        folder_images(folder(tmp_path))


def test_held_out_images_without_class_directories(tmp_path):
    paint(tmp_path / "train", {"cat": 2, "dog": 2})
    (tmp_path / "test").mkdir()
    Image.new("L", (9, 9)).save(tmp_path / "test" / "1.png")
    with pytest.raises(SettingError, match="data.name: got .*test', allowed: class directories with images, as in"):
        folder_images(folder(tmp_path))


def test_one_class_is_refused_by_its_name(tmp_path):
    """Mostly somebody named the directory above the one that was meant."""
    paint(tmp_path / "pets", {"cat": 2, "dog": 2})
    with pytest.raises(SettingError, match=r"data.name: got .*at least two classes; \('pets',\)"):
        load_images(folder(tmp_path))


@pytest.mark.parametrize(
    ("counts", "fraction", "reason"),
    [
        ({"cat": 9, "dog": 1}, 0.25, "data.name: got 'one image of dog', allowed: at least two images of each class"),
        ({"a": 2, "b": 2, "c": 2}, 0.25, "data.test_fraction: got 0.25, allowed: 0.5 to 0.5: 6 images of 3 classes"),
        ({"cat": 10, "dog": 10}, 0.01, "data.test_fraction: got 0.01, allowed: 0.1 to 0.9: 20 images of 2 classes"),
        ({"cat": 10, "dog": 10}, 0.95, "data.test_fraction: got 0.95, allowed: 0.1 to 0.9: 20 images of 2 classes"),
    ],
)
def test_too_few_images_to_split(tmp_path, counts, fraction, reason):
    paint(tmp_path, counts)
    with pytest.raises(SettingError, match=reason):
        folder_images(folder(tmp_path, test_fraction=fraction))


@pytest.mark.parametrize(
    ("counts", "fraction"), [((2, 2, 2), 0.5), ((10, 10), 0.1), ((10, 10), 0.9), ((7, 5, 3), 0.201)]
)
def test_what_the_message_allows_can_be_split(tmp_path, counts, fraction):
    paint(tmp_path, {str(number): count for number, count in enumerate(counts)})
    train, test = folder_images(folder(tmp_path, test_fraction=fraction))
    assert len(train) + len(test) == sum(counts)
    assert min(len(train), len(test)) >= len(counts)


def test_a_path_that_is_a_file(tmp_path):
    path = Path(tmp_path / "pets.zip")
    path.write_bytes(b"PK")
    with pytest.raises(FileNotFoundError, match=r"data.name: got .*pets.zip.*a directory of class directories"):
        folder_images(folder(path))
