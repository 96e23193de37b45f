"""Images that are decoded when they are asked for: the same as if all were in memory."""

import random
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from smi_fed.data import DataConfig, ImageSet, LazyImages, load_images, shared_images
from smi_fed.data.lazy_images import Kept
from smi_fed.files import FileFormatError
from smi_fed.inversion import feature_statistics
from smi_fed.models import build_model
from smi_fed.training import TrainingConfig, accuracy, predict, train
from tests.models import small_spec, small_vit

SIDE = 16


def write_images(directory, count=12):
    """Images of every kind, of different sizes, in three classes; what they hold as arrays (h, w, 3) in [0, 1]."""
    generator, known = np.random.default_rng(0), {}
    for number in range(count):
        path = directory / "abc"[number % 3] / f"{number:02}"
        path.parent.mkdir(parents=True, exist_ok=True)
        shape = (int(generator.integers(9, 40)), int(generator.integers(9, 40)))
        kind = ("RGB", "L", "16 bits", "clear", "float")[number % 5]
        values = generator.integers(0, 65536 if kind == "16 bits" else 256, shape)
        if kind == "RGB":
            colour = generator.integers(0, 256, (*shape, 3)).astype(np.uint8)
            Image.fromarray(colour).save(f"{path}.png")
            known[path.name] = colour.astype(np.float32) / 255
            continue
        share = values.astype(np.float32) / (65535 if kind == "16 bits" else 255)
        if kind == "clear":
            alpha = generator.integers(0, 256, shape).astype(np.uint8)
            Image.fromarray(np.stack([values, alpha], 2).astype(np.uint8)).save(f"{path}.png")
            a = torch.tensor(alpha).float() / 255
            share = (torch.tensor(share) * a + 1.0 * (1 - a)).numpy()
        elif kind == "float":
            Image.fromarray(share).save(f"{path}.tiff")
        else:
            stored = Image.fromarray(values.astype(np.uint16 if kind == "16 bits" else np.uint8))
            stored.save(f"{path}.{'tiff' if number % 2 else 'png'}")
        known[path.name] = np.repeat(share[:, :, None], 3, 2)
    return known


def config(path, **changes):
    return DataConfig(**{"source": "folder", "name": str(path), "image_size": SIDE, "channels": 3,
                         "test_fraction": 0.0, **changes})  # fmt: skip


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures")
    return path, write_images(path)


@pytest.fixture
def lazy(pictures):
    return shared_images(config(pictures[0]))[0]


@pytest.fixture
def eager(pictures):
    return load_images(config(pictures[0]))[0]


def test_what_fits_is_in_memory_and_what_does_not_is_not(pictures, lazy, eager):
    assert isinstance(eager.images, torch.Tensor)
    assert isinstance(lazy.images, LazyImages)
    assert lazy.images.shape == eager.images.shape == (12, 3, SIDE, SIDE)
    large = load_images(config(pictures[0], image_size=200))[0].images.shape
    assert load_images(config(pictures[0], image_size=200, memory=1))[0].images.shape == large
    assert isinstance(load_images(config(pictures[0], image_size=200, memory=1))[0].images, LazyImages)
    assert isinstance(load_images(config(pictures[0], image_size=200, memory=6))[0].images, torch.Tensor)


def test_both_are_what_a_slow_reading_gives(pictures, lazy, eager):
    names = [str(path)[-7:].split("/")[-1].split(".")[0] for path in lazy.images.decoder.paths]
    slow = torch.stack([
        F.interpolate(torch.tensor(pictures[1][name]).permute(2, 0, 1)[None], (SIDE, SIDE), mode="bilinear",
                      antialias=True, align_corners=False)[0].clamp(0, 1) for name in names
    ])  # fmt: skip
    assert torch.equal(eager.images, lazy.images[:])
    torch.testing.assert_close(eager.images, slow, atol=1e-6, rtol=0)
    assert torch.equal(eager.labels, lazy.labels)


@pytest.mark.parametrize("room", [0, 3000, 10**9])
@pytest.mark.parametrize(
    "rows",
    [slice(2, 7), torch.tensor([3, 3, 0]), torch.zeros(0, dtype=torch.long), [5, 1], torch.arange(12) % 5 == 0, 4],
)
def test_rows_are_the_same_however_many_are_kept(lazy, eager, rows, room):
    kept = Kept(room)
    object.__setattr__(lazy.images, "kept", kept)
    for _ in range(2):
        assert torch.equal(lazy.images[rows], eager.images[rows])
    assert sum(image.nbytes for image in kept.places.values()) <= room
    assert bool(kept.places) == bool(room and lazy.images[rows].numel())


def test_what_is_kept_takes_no_more_bytes_than_uint8_at_its_own_size_or_the_image(lazy):
    lazy.images[:]
    sizes = {number: lazy.images.decoder.pixels(number) for number in range(12)}
    for number, kept in lazy.images.kept.places.items():
        assert kept.nbytes <= 4 * 3 * SIDE**2
        if sizes[number].dtype == torch.uint8:
            assert kept.nbytes <= sizes[number].nbytes
    assert {image.dtype for image in lazy.images.kept.places.values()} == {torch.uint8, torch.float32}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(SIDE, SIDE), (24, 8)])
def test_selected_and_resized(pictures, channels, size):
    lazy = shared_images(config(pictures[0], channels=channels))[0]
    eager = lazy.loaded()
    rows = torch.tensor([7, 2, 9, 2])
    for _ in range(2):
        assert torch.equal(lazy.select(rows).resized(size).images[:], eager.select(rows).resized(size).images)
    assert torch.equal(lazy.resized(size).select(rows).loaded().images, eager.resized(size).images[rows])
    some = lazy.of_classes(["c", "a"])
    assert torch.equal(some.images[:], eager.of_classes(["c", "a"]).images)
    assert isinstance(some.images, LazyImages)


@pytest.mark.parametrize("count", [1, 5, 12, 50])
def test_batches_in_order(lazy, eager, count):
    found, expected = list(lazy.images.split(count)), list(eager.images.split(count))
    assert [len(each) for each in found] == [len(each) for each in expected]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert list(lazy.select([]).images.split(count)) == []


def test_a_loop_that_ends_early_leaves_no_thread(lazy):
    before = threading.active_count()
    for _ in lazy.images.split(2):
        break
    assert threading.active_count() <= before + 1
    iterator = lazy.images.split(2)
    next(iterator)
    iterator.close()
    assert threading.active_count() == before


@pytest.mark.parametrize("room", [0, 10**9])
@pytest.mark.parametrize("own", [True, False])
def test_a_model_trains_to_the_same_bits(lazy, eager, room, own):
    """The same rows in the same order from the same generator, be it torch's, with dropout and random views too."""
    object.__setattr__(lazy.images, "kept", Kept(room))
    config_ = TrainingConfig(steps=5, batch_size=4, augmentation="standard", validation=0.25)
    states = []
    for data in (eager, lazy):
        torch.manual_seed(0)
        model = build_model(small_spec(num_classes=3, drop_rate=0.2))
        generator = torch.Generator().manual_seed(1) if own else torch.default_generator
        loss = train(model, data, config_, generator=generator)
        states.append((loss, model.state_dict(), accuracy(model, data)))
    (a, first, right), (b, second, also) = states
    assert (a, right) == (b, also)
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_the_rows_of_training_are_what_they_were():
    """Draws of the loop, written down: results of in-memory sets must not change."""
    seen = []

    class Watched(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, images):
            seen.append(images[:, 0, 0, 0].tolist())
            return self.weight * images.flatten(1)[:, :2]

    data = ImageSet(torch.arange(50.0).view(50, 1, 1, 1).expand(50, 1, 4, 4) / 50, torch.arange(50) % 2, ("a", "b"))
    config_ = TrainingConfig(steps=3, batch_size=4, jitter=1, optimiser="adamw")
    train(Watched(), data, config_, generator=torch.Generator().manual_seed(7))
    generator = torch.Generator().manual_seed(7)
    for batch in seen:
        rows = torch.randint(50, (4,), generator=generator)
        torch.randint(-1, 2, (2, 4), generator=generator)
        assert batch == data.images[rows, 0, 0, 0].tolist()


def test_the_next_batch_is_decoded_while_a_step_is_computed_and_no_more(lazy, monkeypatch):
    seen, read, steps = [], lazy.images.decoder.pixels, []
    monkeypatch.setattr(type(lazy.images.decoder), "pixels", lambda _, number: seen.append(number) or read(number))
    object.__setattr__(lazy.images, "kept", Kept(0))

    def loss(model, images, labels):
        steps.append(len(images))
        due, late = 4 * min(len(steps) + 1, 6), time.monotonic() + 20
        while len(seen) < due and time.monotonic() < late:
            time.sleep(0.001)
        assert len(seen) == due
        return model(images).square().mean()

    train(small_vit(), lazy, TrainingConfig(steps=6, batch_size=4), generator=torch.Generator(), loss=loss)
    assert (steps, len(seen)) == ([4] * 6, 24)


def test_predictions_and_statistics_go_batch_by_batch(lazy, eager):
    model = small_vit()
    object.__setattr__(lazy.images, "kept", Kept(0))
    assert torch.equal(predict(model, lazy.images, 5), predict(model, eager.images, 5))
    found, expected = (feature_statistics(model, data.images.split(5)) for data in (lazy, eager))
    assert found.examples == 12
    assert all(torch.equal(a, b) for a, b in zip(found.mean + found.std, expected.mean + expected.std, strict=True))


def test_counting_and_dividing_decode_nothing(pictures, monkeypatch):
    monkeypatch.setattr("smi_fed.data.lazy_images.read_pixels", lambda *_: pytest.fail("an image was decoded"))
    train_, test = shared_images(config(pictures[0], test_fraction=0.25))
    assert (train_.label_counts() + test.label_counts()).tolist() == [4, 4, 4]
    assert train_.of_classes(["b"]).select([0]).label_counts().tolist() == [1]


def test_only_the_selected_are_decoded(pictures, monkeypatch):
    seen, read = [], __import__("smi_fed.data.decoding", fromlist=["x"]).read_pixels
    monkeypatch.setattr("smi_fed.data.lazy_images.read_pixels", lambda path, c: seen.append(path) or read(path, c))
    lazy = shared_images(config(pictures[0]))[0]
    lazy.select([3, 8]).loaded()
    assert sorted(seen) == sorted(lazy.images.decoder.paths[number] for number in (3, 8))


def large(path, **changes):
    return config(path, image_size=512, memory=1, **changes)


def test_files_that_are_no_images_are_all_named_before_training(tmp_path):
    write_images(tmp_path)
    for number in (3, 6, 9):
        next((tmp_path / "a").glob(f"{number:02}.*")).write_text("no image")
    with pytest.raises(FileFormatError) as error:
        load_images(large(tmp_path))
    assert all(f"a/{number:02}." in str(error.value) for number in (3, 6, 9))
    for path in [*(tmp_path / "b").iterdir(), *(tmp_path / "c").iterdir()]:
        path.write_text("no image")
    with pytest.raises(FileFormatError, match="; and 6 more$"):
        load_images(large(tmp_path))


def test_a_file_that_is_cut_off_is_named_when_its_turn_comes(tmp_path):
    write_images(tmp_path)
    Image.effect_noise((64, 64), 90).save(tmp_path / "b" / "04x.png")
    data = (tmp_path / "b" / "04x.png").read_bytes()
    (tmp_path / "b" / "04x.png").write_bytes(data[: len(data) // 2])
    lazy = load_images(large(tmp_path))[0]
    place = [str(path).endswith("04x.png") for path in lazy.images.decoder.paths].index(True)
    lazy.images[[each for each in range(13) if each != place]]

    def trained():
        train(small_vit(), lazy.resized((16, 16)), TrainingConfig(steps=20), generator=torch.Generator())

    for read in (lambda: lazy.images[[0, place]], lambda: list(lazy.images.split(4)), trained):
        with pytest.raises(FileFormatError, match="b/04x.png: not a readable image .*replace it or remove it"):
            read()


def test_many_threads_read_the_same(pictures, eager):
    lazy = shared_images(config(pictures[0], workers=8))[0]
    rows = [random.Random(0).randrange(12) for _ in range(100)]
    assert torch.equal(lazy.images[rows], eager.images[rows])
