from dataclasses import replace

import pytest
import torch

from smi_fed.inversion import InversionConfig, invert
from smi_fed.pool import Pool, PoolConfig, start_from
from tests.test_sparse_images import sparse


def images(count, seed=0, targets=None):
    found = sparse(count, seed=seed, soft=False)
    if targets is not None:
        found.targets.copy_(torch.tensor(targets))
    return found


def held(pool):
    return [(entry.round, entry.client, len(entry.images)) for entry in pool.entries]


def test_the_oldest_images_go_first_and_the_bound_holds():
    pool = Pool(PoolConfig(images=7))
    pool.add(1, ["a", "b"], [images(2), images(3)])
    assert held(pool) == [(1, "a", 2), (1, "b", 3)]
    pool.add(2, ["b"], [images(4)])
    assert held(pool) == [(2, "b", 4), (1, "a", 2), (1, "b", 1)]
    pool.add(3, ["c"], [images(5)])
    assert held(pool) == [(3, "c", 5), (2, "b", 2)]
    pool.add(4, ["c", "d"], [images(6), images(6)])
    assert held(pool) == [(4, "c", 6), (4, "d", 1)]
    pool.add(5, [], [])
    assert held(pool) == [(4, "c", 6), (4, "d", 1)]


def test_what_is_cut_off_are_whole_images():
    first = images(3, seed=1)
    pool = Pool(PoolConfig(images=2))
    pool.add(1, ["a"], [first])
    (entry,) = pool.entries
    assert torch.equal(entry.images.images, first.images[:2])
    assert torch.equal(entry.images.mask, first.mask[:2])
    assert len(first) == 3


def test_a_pool_of_no_images_keeps_none():
    pool = Pool(PoolConfig())
    pool.add(1, ["a"], [images(3)])
    assert pool.entries == []
    assert pool.last == {}
    assert pool.shares(2, 3).tolist() == [1, 1, 1]


def test_clients_are_not_silently_mismatched_with_images():
    with pytest.raises(ValueError, match="zip"):
        Pool(PoolConfig(images=9)).add(1, ["a"], [images(1), images(1)])


def test_shares_decay_by_round_and_are_of_one_client_where_asked():
    pool = Pool(PoolConfig(images=20, decay=0.5))
    pool.add(1, ["a", "b"], [images(1), images(2)])
    pool.add(2, ["b"], [images(2)])
    assert held(pool) == [(2, "b", 2), (1, "a", 1), (1, "b", 2)]
    assert pool.shares(3, 2).tolist() == [1, 1, 0.5, 0.5, 0.25, 0.25, 0.25]
    assert pool.shares(3, 2, "b").tolist() == [1, 1, 0.5, 0.5, 0.25, 0.25]
    assert pool.shares(5, 1, "a").tolist() == [1, 0.0625]
    assert pool.shares(3, 0).dtype == torch.float64
    assert Pool(PoolConfig(images=20, decay=1.0), pool.entries).shares(9, 1).tolist() == [1] * 6


def test_entries_are_of_the_client_that_was_asked_for():
    pool = Pool(PoolConfig(images=20))
    pool.add(1, ["a", "b"], [images(1), images(2)])
    pool.add(2, ["b"], [images(3)])
    assert [(e.round, e.client) for e in pool.of("b")] == [(2, "b"), (1, "b")]
    assert pool.of("a") == [pool.entries[1]]
    assert pool.of("c") == []
    assert pool.of() == pool.entries


def test_a_start_is_of_the_clients_last_round_and_of_the_targets_own_classes():
    pool = Pool(PoolConfig(warm=True))
    pool.add(1, ["a", "b"], [images(2, seed=1, targets=[0, 1]), images(1, seed=2, targets=[0])])
    last = images(4, seed=3, targets=[3, 1, 3, 2])
    pool.add(2, ["a"], [last])
    start = start_from(pool.last["a"], torch.tensor([1, 3, 0, 1, 3, 3]))
    assert dict(zip(start.ids.tolist(), start.targets.tolist(), strict=True)) == {0: 1, 1: 3, 4: 3}
    for row, place in enumerate(start.ids.tolist()):
        source = {1: 0, 0: 1, 4: 2}[place]
        assert torch.equal(start.images[row], last.images[source])
    assert start_from(pool.last["b"], torch.tensor([0])).ids.tolist() == [0]


@pytest.mark.parametrize("seed", range(20))
def test_a_start_never_uses_an_image_twice_nor_gives_a_place_two(seed):
    generator = torch.Generator().manual_seed(seed)
    last = images(6, seed, torch.randint(3, (6,), generator=generator).tolist())
    targets = torch.randint(3, (5,), generator=generator)
    start = start_from(last, targets)
    assert len(set(start.ids.tolist())) == len(start)
    assert torch.equal(targets[start.ids], start.targets)
    rows = [next(i for i in range(6) if torch.equal(last.images[i], image)) for image in start.images]
    assert len(set(rows)) == len(rows)
    counts = [torch.bincount(each, minlength=3) for each in (last.targets, targets)]
    assert len(start) == int(torch.minimum(*counts).sum())  # and leaves none that would do


def test_a_trajectory_gives_one_start_the_image_finished_last():
    last = images(6, seed=3, targets=[3, 3, 3, 1, 1, 3])
    last.ids.copy_(torch.tensor([0, 0, 0, 1, 1, 2]))
    start = start_from(last, torch.tensor([3, 3, 3, 3, 1, 1]))
    assert dict(zip(start.ids.tolist(), start.targets.tolist(), strict=True)) == {0: 3, 1: 3, 4: 1}
    sources = {0: 2, 1: 5, 4: 4}
    for image, place in zip(start.images, start.ids.tolist(), strict=True):
        assert torch.equal(image, last.images[sources[place]])


def test_a_rebirth_goes_on_from_where_its_trajectories_ended(vit, generator):
    config = InversionConfig.paper(iterations=6, schedule="2:0.5,4:0.5", stopping="rebirth", jitter=0)
    targets = torch.tensor([2, 0, 2])
    last = invert(vit, targets, config, generator=generator)
    assert last.ids.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    start = start_from(last, targets)
    assert torch.equal(start.images, last.images[[2, 5, 8]])
    assert start.ids.tolist() == [0, 1, 2]
    # A trajectory's last image shows every patch as it was when it detached.
    whole = torch.zeros_like(start.images, dtype=torch.bool)
    for row in range(9):
        own = last.mask[row].repeat_interleave(4, 0).repeat_interleave(4, 1).expand(3, -1, -1)
        trajectory = row // 3
        assert torch.equal(start.images[trajectory][own], last.images[row][own])
        whole[trajectory] |= own
    assert bool(whole.all())
    assert len(invert(vit, targets, config, generator=generator, warm=start)) == 9


def test_there_is_no_start_where_none_fits():
    last = images(2, targets=[0, 1])
    assert start_from(last, torch.tensor([2, 3])) is None
    assert start_from(replace(last, targets=torch.rand(2, 5)), torch.tensor([0])) is None
    cold = Pool(PoolConfig(images=9))
    cold.add(1, ["a"], [last])
    assert not cold.last
