import gc

import pytest
import torch

from tests.models import small_vit

torch.set_num_threads(1)  # with small models and busy cores more threads mostly wait for each other


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def vit():
    return small_vit()


@pytest.fixture
def uncounted(monkeypatch):
    """For tests that are not about FLOPs, whose count takes longer than a small inversion."""
    for name in ("trajectory_flops", "spent_flops"):
        monkeypatch.setattr(f"smi_fed.pipeline.{name}", lambda *_: 0)


def pytest_collection_finish():
    """Flower collects garbage with every reply, which takes long with all that torch and pytest hold."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish():
    gc.unfreeze()


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if "cuda" in item.keywords:
            item.add_marker(skip)
