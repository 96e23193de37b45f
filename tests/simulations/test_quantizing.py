"""What a quantized model's line says, on tiny models; and which images it was calibrated on."""

import pytest
import torch

from simulations import quantizing
from simulations.latest import Latest
from simulations.quantizing import STUDY, figure, table, without_inversion
from simulations.runner.ledger import read_lines
from simulations.runner.loop import parsed
from smi_fed.quantization import Bits, quantize
from smi_fed.training import accuracy, predict
from tests.simulations.test_owners import WORDS, real

__all__ = ["real"]
DEIT = ["model.clients.deit.kwargs={img_size: 32, patch_size: 8, embed_dim: 24, depth: 1, num_heads: 2, in_chans: 3}",
        "server.device=cpu"]  # fmt: skip


def lines_of(path):
    return {line["source"]: line for line in read_lines(path / "pieces.jsonl").values()}


def test_a_line_says_what_the_quantized_model_says(tmp_path, monkeypatch):
    monkeypatch.setattr(quantizing, "_TRAINED", Latest())
    words = ["--models", "deit", "--bits", "w2a2", "--sources", "sparse", "real", "--images", "4", "--iterations", "4"]
    assert quantizing.main([*words, "--output", str(tmp_path), "client.training.steps=60", *DEIT]) == 0
    found = lines_of(tmp_path)
    (trained,) = quantizing._TRAINED.values()
    made = quantize(trained.model, without_inversion("real", trained, 4, quantizing.seeded(0, 1, 0)), Bits(2, 2))
    said, before = (predict(each, trained.test.images).argmax(1) for each in (made, trained.model))
    assert found["real"]["accuracy"] == accuracy(made, trained.test)
    assert found["real"]["float_accuracy"] == accuracy(trained.model, trained.test) > found["real"]["accuracy"]
    assert found["real"]["agreement"] == float((said == before).float().mean()) < 1
    seconds = [found[name]["inversion_seconds"] for name in ("real", "sparse")]
    assert seconds[0] == 0 < seconds[1]
    assert {(line["calibrated_on"], line["test_images"]) for line in found.values()} == {(4, 750)}


def test_all_styles_together_are_one_training_set(real, tmp_path, monkeypatch):
    monkeypatch.setattr(quantizing, "_TRAINED", Latest())
    words = ["--models", "dinov2", "--bits", "w8a8", "--sources", "rebirth", "--smoke", "--output", str(tmp_path)]
    small = [word for word in WORDS if not word.startswith(("server.images", "inversion.iter", "inversion.sched"))]
    assert quantizing.main([*words, *small]) == 0
    (trained,) = quantizing._TRAINED.values()
    assert (len(trained.train), len(trained.test)) == (4 * 9 * 4, 4 * 9)
    (line,) = lines_of(tmp_path).values()
    assert (line["model"], line["test_images"], line["calibrated_on"]) == ("dinov2", 36, 4)


def test_noise_has_the_models_mean_and_spread_and_real_pictures_are_its_own():
    class Model:
        mean, std, image_size = torch.tensor([[[0.5]], [[0.4]]]), torch.tensor([[[0.1]], [[0.05]]]), (40, 40)

    class Trained:
        model, train = Model, quantizing.ImageSet(torch.arange(9.0).reshape(9, 1, 1, 1), torch.zeros(9).long(), ("a",))

    noise = without_inversion("noise", Trained, 8, quantizing.seeded(0))
    assert noise.mean((0, 2, 3)).tolist() == pytest.approx([0.5, 0.4], abs=0.005)
    assert noise.std((0, 2, 3)).tolist() == pytest.approx([0.1, 0.05], rel=0.05)
    drawn = [without_inversion("real", Trained, 4, quantizing.seeded(seed)).flatten().tolist() for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) == 4


def test_sparse_and_rebirth_have_the_same_stops_and_dense_has_none():
    cells = STUDY.cells(parsed(STUDY, ["--models", "deit", "--bits", "w8a8"]))
    composed = {cell["source"]: STUDY.compose((*cell.defaults, *cell.overrides)).inversion for cell in cells}
    stops = {source: str(each.schedule) for source, each in composed.items()}
    assert stops["sparse"] == stops["rebirth"] == "25:0.25,50:0.33,75:0.5"
    assert stops["dense"] == ""
    assert (composed["sparse"].selection, composed["rebirth"].selection) == ("attention", "random")
    assert (composed["sparse"].stopping.kind, composed["rebirth"].stopping.kind) == ("keep", "rebirth")
    assert {each.statistics for each in composed.values()} == {0.0}


def line(source, bits, accuracy, seed=0, seconds=0.0):
    return {
        "model": "deit", "source": source, "bits": bits, "seed": seed, "accuracy": accuracy, "float_accuracy": 0.9,
        "agreement": 0.5, "inversion_seconds": seconds, "images": 32,
    }  # fmt: skip


def test_a_column_for_each_source(tmp_path):
    lines = [
        line("sparse", "w8a8", 0.8, seconds=2.0), line("sparse", "w8a8", 0.7, seed=1, seconds=4.0),
        line("sparse", "w4a4", 0.6, seconds=2.0), line("real", "w8a8", 0.85),
    ]  # fmt: skip
    accurate, agreed, seconds = table(lines)
    assert accurate.rows == [
        ["accuracy, %", "float", "sparse", "real"],
        ["deit w8a8", "90.0 ± 0.0", "75.0 ± 7.1", "85.0"],
        ["deit w4a4", "90.0", "60.0", "-"],
    ]
    assert agreed.rows[1:] == [["deit w8a8", "50.0 ± 0.0", "50.0"], ["deit w4a4", "50.0", "-"]]
    assert seconds.rows == [["seconds of inversion", "sparse"], ["deit", "3.0"]]
    figure(lines).savefig(tmp_path / "quantizing.png")
    assert (tmp_path / "quantizing.png").read_bytes().startswith(b"\x89PNG")
