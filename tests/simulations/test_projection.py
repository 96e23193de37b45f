"""Arithmetic over what is counted and what is assumed."""

from simulations import projection
from simulations.projection import Assumptions, Sizes, assumptions, parts
from smi_fed.models import ModelSpec, build_model


def test_what_is_counted_is_of_the_model():
    assumed = Assumptions(model="deit_tiny_patch16_224", classes=10)
    size = projection.sizes(assumed)
    model = build_model(ModelSpec(assumed.model, num_classes=10, kwargs={}))
    assert size.weights == sum(weight.numel() for weight in model.parameters())
    assert size.numbers == 3 * 224 * 224
    assert 2.1e9 < size.forward < 2.6e9  # 1.3 GFLOPs of multiply-adds as DeiT's paper counts, twice, less attention
    assert 20 * size.forward < size.trajectory < 3 * 20 * size.forward


def test_every_part_follows_from_the_assumptions():
    assumed = Assumptions(
        clients=4,
        trajectories=3,
        images=10,
        passes=2,
        batch=2,
        others=1,
        bytes_per_weight=4,
        accelerators=2,
        link=5.0,
        disk=7.0,
    )
    size = Sizes(weights=100, forward=11, trajectory=13, numbers=2**22)  # eight views, four steps, a block
    arrive, inversion, steps, every, blocks, answers, once, images = parts(assumed, size)
    assert (arrive.bytes, arrive.per_second) == (4 * 400, 5.0)
    assert (inversion.flops, inversion.accelerators) == (4 * 3 * 13, 2)
    assert (answers.flops, answers.accelerators) == (4 * 10 * 2 * 11, 2)
    assert (steps.flops, steps.accelerators) == (3 * 2 * 40 * 11, 1)
    assert (every.flops, every.accelerators) == (2 * 4 * 10 * 2 * 11, 1)
    assert (blocks.bytes, once.bytes) == (10 * 4 * 400, 4 * 400)  # eight views ask 16 times, all four clients at most
    assert images.bytes == 2 * 4 * 40 * 2**22


def test_words_change_assumptions(capsys):
    assert assumptions(["clients=7", "rate=1e9"]) == Assumptions(clients=7, rate=1e9)
    assert projection.main(["clients=0"]) == 2
    assert "clients: got 0" in capsys.readouterr().err
