"""How much memory a training on many images takes, in a process of its own."""

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

MEMORY = """
import re, sys, torch
from pathlib import Path
from smi_fed.data import DataConfig, load_images
from smi_fed.models import ModelSpec, build_model
from smi_fed.training import TrainingConfig, train
torch.set_num_threads(1)
config = DataConfig(source="folder", name=sys.argv[1], image_size=224, channels=3, test_fraction=0.1)
data, held_out = load_images(config)
kwargs = {"img_size": 224, "patch_size": 16, "embed_dim": 96, "depth": 2, "num_heads": 3}
model = build_model(ModelSpec("vit_tiny_patch16_224", 2, kwargs=kwargs))
train(model, data, TrainingConfig(steps=150, batch_size=32), generator=torch.Generator().manual_seed(0))
kept = data.images.kept
most = re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]
print(len(data), len(held_out), len(kept.places), most)
"""


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux how much memory was used")
def test_twenty_thousand_images_train_in_two_gigabytes(tmp_path):
    ramp, encoded = np.tile(np.arange(224, dtype=np.uint8), (224, 1)), []
    for number in range(64):
        colour = np.stack([np.roll(ramp, number, 1), ramp.T if number % 2 else ramp, ramp // 2], 2)
        Image.fromarray(colour).save(file := io.BytesIO(), "jpeg", quality=70)
        encoded.append(file.getvalue())
    for name in "ab":
        (tmp_path / name).mkdir()
    for number in range(20_000):
        (tmp_path / "ab"[number % 2] / f"{number}.jpg").write_bytes(encoded[number % 64])
    done = subprocess.run([sys.executable, "-c", MEMORY, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    train_size, held_out, kept, kilobytes = map(int, done.stdout.split())
    assert (train_size, held_out) == (18_000, 2_000)
    assert kept == 256 * 2**20 // (3 * 224**2)  # the budget is used, and no more
    assert kilobytes < 2_000_000, kilobytes
