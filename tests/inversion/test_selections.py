"""Which patches go on."""

import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from smi_fed.inversion import InversionConfig, PyramidConfig, feature_statistics, invert, losses
from smi_fed.inversion.flops import trajectory_flops
from smi_fed.inversion.loop import scores, start
from smi_fed.inversion.problem import pose
from smi_fed.inversion.selections import SELECTIONS, Candidates, best
from smi_fed.inversion.selections.stratified import rank_in_region, regions, share
from smi_fed.inversion.teacher import View, adapt, frozen
from smi_fed.tokens import to_images, to_patches
from tests.models import masked_model, token_model

SPARSE = InversionConfig.paper(iterations=6, schedule="2:0.3,4:0.4", jitter=0, flip=False)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def candidates(importance, grid=(4, 4), ids=None, key=3):
    """The patches of a teacher whose importance is given, (b, n)."""

    class Stub:
        def importance(self, view, targets):
            return importance

    teacher = Stub()
    teacher.grid = grid
    b, n = importance.shape
    positions = torch.arange(n).expand(b, -1)
    ids = torch.arange(b) if ids is None else ids
    view = View(torch.zeros(b, n, 1, 1, 1), positions)
    return Candidates(teacher, view, torch.zeros(b), key, ids, torch.full((b,), 2), lambda: importance)


@pytest.mark.parametrize("name", SELECTIONS)
@pytest.mark.parametrize("kind", ["plain", "average pooled", "swin"])
def test_every_selection_on_every_kind_of_model(name, kind):
    model = masked_model(kind) if kind == "swin" else token_model(kind)
    config = replace(SPARSE, selection=name)
    found = invert(model, torch.tensor([0, 1, 2]), config, generator=seeded())
    assert found.kept.shape == (3, config.schedule.kept_counts(found.mask[0].numel())[-1][1])
    alone = invert(model, torch.tensor([0, 1, 2]), replace(config, batch_size=1), generator=seeded())
    assert torch.equal(alone.mask, found.mask)
    assert trajectory_flops(model, config) > 0


def test_proportional_draws_as_often_as_attention_says():
    weights = torch.tensor([[1.0, 2.0, 3.0, 6.0]])
    rows = candidates(weights.expand(20_000, -1), grid=(2, 2))
    first = SELECTIONS["proportional"](rows).argmax(1)
    shares = first.bincount(minlength=4) / len(first)
    torch.testing.assert_close(shares, weights[0] / 12, atol=0.015, rtol=0)


def test_proportional_never_takes_what_is_not_attended_to():
    rows = candidates(torch.tensor([[0.0, 1.0, 1.0, 0.0]]).expand(500, -1), grid=(2, 2))
    kept = best(SELECTIONS["proportional"](rows), 2)
    assert bool((kept == torch.tensor([1, 2])).all())


def test_tempered_prefers_by_place_and_differs_from_image_to_image():
    """Weights of any size: only their order counts. 4 patches, places 0, 1/4, 1/2, 3/4."""
    for weights in ([1.0, 2.0, 3.0, 4.0], [0.1, 0.1001, 5.0, 900.0]):
        kept = best(SELECTIONS["tempered"](candidates(torch.tensor([weights]).expand(20_000, -1), grid=(2, 2))), 1)
        shares = kept.flatten().bincount(minlength=4) / len(kept)
        draws = torch.rand(200_000, 4, generator=seeded()) + torch.arange(4) / 4
        expected = draws.argmax(1).bincount(minlength=4) / len(draws)
        torch.testing.assert_close(shares, expected, atol=0.015, rtol=0)


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 1000))
def test_stratified_spreads_over_regions(rows, columns, seed):
    importance = torch.rand(1, rows * columns, generator=seeded(seed))
    scores = SELECTIONS["stratified"](candidates(importance, (rows, columns)))
    region = regions(torch.arange(rows * columns)[None], (rows, columns))[0]
    for count in range(1, rows * columns + 1):
        kept = best(scores, count)[0]
        taken = {int(each): int((region[kept] == each).sum()) for each in region.unique()}
        sizes = {int(each): int((region == each).sum()) for each in region.unique()}
        # A region may lag behind another only when it has no patch left.
        most = max(taken.values())
        assert all(taken[each] >= min(sizes[each], most - 1) for each in taken)
        for each, number in taken.items():  # and what it gives are its most important
            inside = importance[0].where(region == each, torch.tensor(-1.0)).topk(number).indices
            assert set(inside.tolist()) == set(kept[region[kept] == each].tolist())


@given(st.integers(1, 20), st.integers(0, 1000))
def test_ranks_against_a_loop(count, seed):
    generator = seeded(seed)
    scores = torch.randint(4, (2, count), generator=generator).double()
    region = torch.randint(3, (2, count), generator=generator)
    for row in range(2):
        for i in range(count):
            higher = sum(
                1 for j in range(count)
                if region[row, j] == region[row, i] and (scores[row, j], -j) > (scores[row, i], -i)
            )  # fmt: skip
            assert int(rank_in_region(scores, region)[row, i]) == higher
    assert bool((share(scores) < 1).all())


def test_gradient_is_the_targets_own(vit):
    """Against autograd by hand, on whole images."""
    teacher = adapt(vit)
    patches = torch.rand(2, 16, 3, 4, 4)
    positions = torch.arange(16).expand(2, -1)
    view, targets = View(patches, positions), torch.tensor([1, 3])
    said = SELECTIONS["gradient"](
        Candidates(teacher, view, targets, 0, torch.arange(2), torch.zeros(2), lambda: patches)
    )
    images = to_images(patches, (4, 4)).requires_grad_()
    vit.backbone(images).gather(1, targets[:, None]).sum().backward()
    torch.testing.assert_close(said, to_patches(images.grad, (4, 4)).abs().sum((2, 3, 4)))


def test_unsettled_keeps_what_the_objective_pulls_at(vit):
    """The pull is the gradient of the whole objective in the patches' pixels, priors included."""
    config = replace(SPARSE, parametrisation=PyramidConfig((2, 4)), statistics=2.0, selection="unsettled")
    known = feature_statistics(vit, [torch.rand(8, 3, 16, 16)])
    problem = pose(vit, config, 0, known)
    state = start(problem, torch.arange(3), torch.tensor([0, 1, 2]))
    with frozen(vit):
        patches = problem.parametrisation.patches(state.parameters, state.kept)
        said = scores(problem, state, patches)
        images = to_images(patches, (4, 4)).detach().requires_grad_()
        shown = to_patches(images, (4, 4))
        logits, layers = problem.teacher.features(View(shown, state.kept))
        prior = losses.statistics_prior(layers, state.kept, problem.teacher, known)
        (torch.nn.functional.cross_entropy(logits, state.targets, reduction="sum") + 3 * 2.0 * prior).backward()
    pull = to_patches(images.grad, (4, 4)).abs().sum((2, 3, 4))
    region = regions(state.kept, (4, 4))
    assert torch.equal(said, share(pull) - rank_in_region(pull, region))
    for row in range(3):  # four regions of four patches: the first four are the one most pulled at of each
        kept = best(said, 4)[row].tolist()
        for each in region[row].unique():
            inside = (region[row] == each).nonzero()[:, 0].tolist()
            assert max(inside, key=lambda patch: float(pull[row, patch])) in kept


def test_each_selection_has_a_file_of_its_own():
    for name, selection in SELECTIONS.items():
        assert selection.__module__ == f"smi_fed.inversion.selections.{name}"
        assert sys.modules[selection.__module__].__doc__
