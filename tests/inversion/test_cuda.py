"""What only a GPU can show. `python -m pytest -m cuda`"""

from dataclasses import replace

import pytest
import torch

from smi_fed.inversion import InversionConfig, invert
from smi_fed.inversion.loop import run, start
from smi_fed.inversion.memory import bytes_per_image, fitting_batch
from smi_fed.inversion.problem import pose
from smi_fed.inversion.teacher import frozen

pytestmark = pytest.mark.cuda

CONFIG = InversionConfig.paper(iterations=8, schedule="2:0.3,5:0.4", jitter=5)
TARGETS = torch.tensor([0, 1, 2, 3])


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_loop_never_waits_for_the_device(vit, precision):
    config = replace(CONFIG, precision=precision)
    problem = pose(vit.cuda(), config, 5)
    with frozen(vit):
        state = start(problem, torch.arange(4, device="cuda"), TARGETS.cuda())
        steps = run(problem, state)
        next(steps)  # reads the batch's age once
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in steps:
                pass
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_a_checkpoint_goes_on_to_the_same_images(vit, tmp_path):
    whole = invert(vit.cuda(), TARGETS, CONFIG, generator=torch.Generator().manual_seed(0))

    def killed(now):
        if now.done == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        invert(vit, TARGETS, CONFIG, generator=torch.Generator().manual_seed(0), checkpoint=tmp_path,
               checkpoint_interval=0, progress=killed)  # fmt: skip
    found = invert(vit, TARGETS, CONFIG, generator=torch.Generator().manual_seed(0), checkpoint=tmp_path)
    torch.testing.assert_close(found.images, whole.images, atol=1e-4, rtol=0)


def test_the_chosen_batch_fits_in_free_memory(vit):
    problem = pose(vit.cuda(), CONFIG, 5)
    with frozen(vit):
        one = bytes_per_image(problem, TARGETS[:1].cuda())
        assert 0 < one * fitting_batch(problem, TARGETS.cuda()) < torch.cuda.mem_get_info()[0]
