"""How well a choice of patches finds an object, against masks drawn by hand; and one small cell."""

import json

import pytest
import torch

from simulations import attention
from simulations.attention import STUDY, choices, figure, fitted, known, noisy, scored, spread_out, table
from simulations.masks import coverage, drawn, iou, kept, masked, pointing
from simulations.runner.loop import parsed
from smi_fed.data import ImageSet
from smi_fed.inversion.selections import SELECTIONS, Candidates
from smi_fed.inversion.teacher import adapt
from tests.models import small_vit
from tests.simulations.test_owners import WORDS, real

__all__ = ["real"]


def mask(*rows):
    return torch.tensor([[each == "#" for each in row] for row in rows])


MASKS = torch.stack([mask("##..", "##..", "#...", "...."), mask("....", "....", "..##", "..##")])
COVERED = torch.tensor([[1.0, 0.0, 0.25, 0.0], [0.0, 0.0, 0.0, 1.0]])


def test_iou_and_pointing_against_masks_drawn_by_hand():
    covered = coverage(MASKS, (2, 2))
    assert torch.equal(covered, COVERED)
    scores = torch.tensor([[3.0, 4.0, 1.0, 2.0], [1.0, 2.0, 3.0, 4.0]])
    chosen = kept(scores, 2)
    assert chosen.tolist() == [[True, True, False, False], [False, False, True, True]]
    # Four pixels of both, of five and eight: 4 of 9; and four, of four and eight: 4 of 8.
    assert iou(chosen, covered) == pytest.approx((4 / 9 + 4 / 8) / 2)
    assert pointing(scores, covered) == 0.5  # a quarter of a patch is not in it
    assert pointing(torch.tensor([[0.0, 1.0, 2.0, 1.0], [0.0, 0.0, 0.0, 1.0]]), covered) == 0.5


def test_what_is_drawn_on_white_has_what_its_lines_enclose():
    ring, corner = mask("####.", "#..#.", "####.", "....."), mask("....#", "....#", "....#", "#####")
    images = torch.where(torch.stack([ring, corner])[:, None], torch.tensor([1.0, 0.2, 1.0])[:, None, None], 0.97)
    assert torch.equal(drawn(images), torch.stack([mask("####.", "####.", "####.", "....."), corner]))


def test_pictures_without_masks_get_what_is_drawn_and_others_keep_theirs():
    own = ImageSet(torch.ones(2, 3, 4, 4), torch.zeros(2, dtype=torch.long), ("one",))
    own.images[0, :, 1, 2] = 0.5
    found = masked(own)
    assert found.masks.nonzero().tolist() == [[0, 1, 2]]
    assert masked(found) is found


@pytest.mark.parametrize(("count", "most", "places"), [(5, 5, [0, 1, 2, 3, 4]), (5, 4, [0, 2, 4]), (7, 2, [0, 4])])
def test_places_are_spread_over_all(count, most, places):
    assert spread_out(count, most).tolist() == places


def candidates(model, count, key):
    teacher, ids = adapt(model), torch.arange(count)
    images = torch.rand(count, len(model.mean), *model.image_size, generator=torch.Generator().manual_seed(0))
    view = attention.shown(model, teacher, images)
    return Candidates(teacher, view, torch.zeros_like(ids), key, ids, torch.zeros_like(ids), attention._no_pull)


def test_noise_leaves_the_order_of_attention_or_drowns_it():
    own = candidates(small_vit(), 4, key=1)
    importance = own.teacher.importance(own.view, own.targets)
    clean, loud = noisy(own, 0.0), noisy(own, 1e6) / 1e6
    assert torch.equal(clean.argsort(1), importance.argsort(1))
    assert clean.std(1).tolist() == pytest.approx([1.0] * 4)
    assert 0.5 < float(loud.std()) < 1.5
    again, other = noisy(candidates(small_vit(), 4, key=1), 1e6), noisy(candidates(small_vit(), 4, key=2), 1e6)
    assert torch.equal(again / 1e6, loud)
    assert not torch.allclose(other / 1e6, loud, atol=0.1)


def test_the_oracle_reads_a_bright_patch_in_the_tokens():
    model = small_vit()
    teacher, generator = adapt(model), torch.Generator().manual_seed(0)
    height, width = model.image_size
    (rows, columns), patch = teacher.grid, teacher.patch_size
    place = torch.randint(rows * columns, (200,), generator=generator)
    masks = torch.zeros(200, rows, columns).flatten(1).scatter(1, place[:, None], 1.0).view(200, rows, columns).bool()
    masks = masks.repeat_interleave(patch[0], 1).repeat_interleave(patch[1], 2)
    assert masks.shape[1:] == (height, width)
    images = 0.2 * torch.rand(200, len(model.mean), height, width, generator=generator) + 0.8 * masks[:, None]
    seen = ImageSet(images, torch.zeros(200, dtype=torch.long), ("bright",), masks)
    held, covered, before = seen.select(list(range(150, 200))), coverage(masks[150:], patch), dict(SELECTIONS)
    with known(choices(fitted(model, seen.select(list(range(150)))))):
        assert pointing(scored(model, held, "oracle"), covered) > 0.9
        assert pointing(scored(model, held, "opposite"), covered) < 0.1
    assert before == SELECTIONS


@pytest.mark.usefixtures("uncounted")
def test_a_cell_is_measured_and_kept(tmp_path, monkeypatch):
    few = attention.TEACHERS["registers"]._replace(choices=("dense", "oracle", "real"))
    monkeypatch.setitem(attention.TEACHERS, "registers", few)
    words = ["--output", str(tmp_path), "--teachers", "registers", "--images", "8", "--smoke", "--seeds", "3",
             "distillation.batch_size=8", "client.training.steps=2"]  # fmt: skip
    assert attention.main(words) == 0
    dense, oracle, real = (json.loads(each) for each in (tmp_path / "pieces.jsonl").read_text().splitlines())
    assert (dense["kept_fraction"], oracle["kept_fraction"]) == (1.0, 14 / 64)
    assert "iou" not in dense
    assert "inversion_seconds" not in real
    assert oracle["iou_by_chance"] < oracle["iou"] < oracle["iou_of_masks"]
    assert oracle["pointing"] > oracle["pointing_by_chance"]
    assert 0 < oracle["synthetic_iou"] < 1
    assert (tmp_path / "attention.png").read_bytes().startswith(b"\x89PNG")


def test_choices_differ_in_what_goes_on_alone():
    cells = STUDY.cells(parsed(STUDY, ["--teachers", "supervised"]))[2:]
    found = [STUDY.compose((*STUDY.words, *cell.defaults, *cell.overrides)).inversion for cell in cells[:2]]
    assert [cell["choice"] for cell in cells[:2]] == ["dense", "opposite"]
    assert [str(each.schedule) for each in found] == ["", "5:0.77"]
    assert [cell["choice"] for cell in cells][-2:] == ["attention", "oracle"]


def test_teachers_of_real_pictures_keep_their_backbone_or_tune_a_part():
    cells = STUDY.cells(parsed(STUDY, ["--teachers", "self-distilled", "tuned"]))
    found = {cell["teacher"]: STUDY.compose((*cell.defaults, *cell.overrides)) for cell in cells}
    assert {name: each.client.training.trainable for name, each in found.items()} == {
        "self-distilled": "head", "tuned": "last:3",
    }  # fmt: skip
    assert {(x.inversion.iterations, str(x.inversion.schedule), x.distillation.trainable) for x in found.values()} == {
        (12, "2:0.77", "head"),
    }  # fmt: skip


@pytest.mark.usefixtures("uncounted", "real")
def test_a_cell_of_real_pictures(tmp_path, monkeypatch):
    few = attention.TEACHERS["tuned"]._replace(choices=("dense", "oracle"))
    monkeypatch.setitem(attention.TEACHERS, "tuned", few)
    small = [word for word in WORDS if not word.startswith(("server.images", "inversion.", "client.training.epochs"))]
    assert attention.main(["--output", str(tmp_path / "out"), "--teachers", "tuned", "--images", "4", "--smoke", *small,
                           "client.training.steps=2", "inversion.parametrisation.levels=[4,7]"]) == 0  # fmt: skip
    dense, oracle = (json.loads(each) for each in (tmp_path / "out" / "pieces.jsonl").read_text().splitlines())
    assert (dense["kept_fraction"], oracle["data"]) == (1.0, "real")
    assert oracle["iou_of_masks"] == pytest.approx(oracle["kept_fraction"])  # plain colours are objects all over


def line(choice, accuracy, seed=0, **more):
    return {
        "teacher": "supervised", "choice": choice, "seed": seed, "student_test_accuracy": accuracy,
        "ensemble_test_accuracy": 0.9, "inversion_seconds": 2.0, **more,
    }  # fmt: skip


def test_a_row_of_each_choice(tmp_path):
    looks = {"pointing": 0.8, "synthetic_iou": 0.3, "iou_by_chance": 0.2, "pointing_by_chance": 0.25,
             "iou_of_masks": 0.7}  # fmt: skip
    attended = [line("attention", 0.5, iou=0.4) | looks, line("attention", 0.6, 1, iou=0.5) | looks]
    control = line("noise", 0.2)
    del control["inversion_seconds"]
    lines = [line("dense", 0.7), *attended, control]
    (found,) = table(lines)
    assert found.rows[1:] == [
        ["supervised", "dense", "", "", "", "70.0", "2.0"],
        ["supervised", "attention", "45.0 ± 7.1", "80.0 ± 0.0", "30.0 ± 0.0", "55.0 ± 7.1", "2.0"],
        ["supervised", "noise", "", "", "", "20.0", ""],
    ]
    assert "By chance IoU is 20.0 % and pointing 25.0 %" in found.notes[0]
    figure(lines).savefig(tmp_path / "attention.png")
    figure(lines[:1])


def test_each_data_set_has_a_table_and_its_own_bounds(tmp_path):
    looks = {"iou": 0.3, "pointing": 0.8, "synthetic_iou": 0.3, "pointing_by_chance": 0.25, "iou_of_masks": 0.7}
    lines = [line("attention", 0.5, iou_by_chance=0.2, **looks), line("oracle", 0.6, iou_by_chance=0.4, **looks)]
    lines[1] |= {"teacher": "tuned", "data": "real", "ensemble_test_accuracy": 0.7}
    shapes, real = table(lines)
    assert (shapes.rows[1][:2], real.rows[1][:2]) == (["supervised", "attention"], ["tuned", "oracle"])
    assert [each.notes[0][:24] for each in (shapes, real)] == ["By chance IoU is 20.0 % ", "By chance IoU is 40.0 % "]
    assert [each.notes[1] for each in (shapes, real)] == [
        f"The teachers' own accuracy: {said} %." for said in ("supervised 90.0", "tuned 70.0")
    ]
    figure(lines).savefig(tmp_path / "attention.png")
