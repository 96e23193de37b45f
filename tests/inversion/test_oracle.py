"""`invert` against the plain oracle."""

import pytest
import torch

from smi_fed import tokens
from smi_fed.inversion import InversionConfig, invert, randomness
from tests.models import small_vit
from tests.reference.plain_inversion import attention_map, class_attention, plain_inversion

ITERATIONS = 9
SCHEDULE = "3:0.4,6:0.5"


def draws(config, key, image, grid, patch):
    """The engine's random views, handed to the oracle as plain numbers."""
    ids = torch.tensor([image])

    def view(iteration):
        dense = iteration < 3
        largest = config.jitter if dense else config.jitter // patch
        shift = (0, 0)
        if largest:
            shift = randomness.integers(key, ids, iteration, randomness.JITTER, 2, largest)[0].tolist()
        mirrored = config.flip and float(randomness.uniform(key, ids, iteration, randomness.FLIP, 1)) < 0.5
        return (*shift, mirrored)

    return view


@pytest.mark.parametrize("augmented", [False, True], ids=["plain views", "shifted and mirrored views"])
def test_invert_matches_the_plain_oracle(augmented):
    model = small_vit().double()
    vit = model.backbone
    config = InversionConfig.paper(
        iterations=ITERATIONS, schedule=SCHEDULE, jitter=5 if augmented else 0, flip=augmented, tv=0.05
    )
    targets = torch.tensor([1, 4])
    key = randomness.draw_key(torch.Generator().manual_seed(3))
    found = invert(model, targets, config, generator=torch.Generator().manual_seed(3))
    noise = randomness.normal(key, torch.arange(2), 0, randomness.START, 3 * 16 * 16).view(2, 3, 16, 16)
    for image, target in enumerate(targets.tolist()):
        pixels, kept, _ = plain_inversion(
            vit, model.mean, model.std, noise[image], target, ITERATIONS, {3: 0.4, 6: 0.5}, config.learning_rate,
            config.betas, config.tv, draws(config, key, image, vit.patch_embed.grid_size, 4),
        )  # fmt: skip
        assert found.kept[image].tolist() == kept
        torch.testing.assert_close(found.images[image].double(), pixels, atol=1e-7, rtol=0)


def test_oracle_attention_is_timms():
    """The oracle's own seam and `attention_to_patches` agree with timm's extractor on all tokens."""
    model = small_vit().double()
    image = torch.rand(3, 16, 16, dtype=torch.float64)
    every = list(range(16))
    patches = tokens.to_patches(image[None], (4, 4))
    ours = tokens.attention_to_patches(model.backbone, patches, torch.arange(16)[None])
    expected = attention_map(model.backbone, image)[0, 1:]
    torch.testing.assert_close(ours[0], expected, atol=1e-9, rtol=0)
    assert class_attention(model.backbone, image, every) == pytest.approx(expected.tolist(), abs=1e-9)
