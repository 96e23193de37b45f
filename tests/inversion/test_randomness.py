import torch
from hypothesis import given
from hypothesis import strategies as st

from smi_fed.inversion import randomness

keys = st.integers(0, 2**62 - 1)


@given(keys, st.integers(0, 10_000), st.integers(0, 10_000), st.integers(1, 50))
def test_a_draw_depends_on_key_id_and_step_alone(key, image, step, count):
    alone = randomness.uniform(key, torch.tensor([image]), step, randomness.JITTER, count)
    batch = randomness.uniform(key, torch.tensor([7, image, 3]), torch.tensor([1, step, 2]), randomness.JITTER, count)
    assert torch.equal(alone[0], batch[1])
    assert bool(((alone >= 0) & (alone < 1)).all())


def test_streams_steps_ids_and_keys_differ():
    ids = torch.arange(3)
    base = randomness.uniform(1, ids, 0, randomness.START, 8)
    assert not torch.equal(base, randomness.uniform(2, ids, 0, randomness.START, 8))
    assert not torch.equal(base, randomness.uniform(1, ids, 1, randomness.START, 8))
    streams = (randomness.START, randomness.JITTER, randomness.FLIP, randomness.SELECT)
    draws = {stream: randomness.uniform(1, ids, 0, stream, 8) for stream in streams}
    assert len({tuple(each.flatten().tolist()) for each in draws.values()}) == len(streams)
    assert len(set(map(tuple, base.tolist()))) == 3


def test_normal_draws_are_standard_and_uncorrelated():
    draws = randomness.normal(5, torch.arange(200), 0, randomness.START, 500)
    assert abs(float(draws.mean())) < 0.02
    assert abs(float(draws.std()) - 1) < 0.02
    assert float(torch.corrcoef(draws[:50]).fill_diagonal_(0).abs().max()) < 0.25
    assert bool(draws.isfinite().all())


def test_integers_reach_both_ends_evenly():
    draws = randomness.integers(9, torch.arange(2000), 3, randomness.JITTER, 2, 2)
    values, counts = draws.unique(return_counts=True)
    assert values.tolist() == [-2, -1, 0, 1, 2]
    assert int(counts.min()) > 650


def test_only_one_integer_is_drawn_from_the_generator():
    first, second = torch.Generator().manual_seed(4), torch.Generator().manual_seed(4)
    randomness.draw_key(first)
    torch.randint(2**62, (), generator=second)
    assert torch.equal(first.get_state(), second.get_state())
