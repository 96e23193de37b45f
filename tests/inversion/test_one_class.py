"""A model of one class: softmax over it always says 1, so that it needs labels of its own kind."""

import pytest
import torch

from smi_fed.inversion import InversionConfig, invert
from tests.models import small_vit

CONFIG = InversionConfig.dense(iterations=150, jitter=0, flip=False)


def test_integer_targets_are_refused_with_the_remedy():
    with pytest.raises(ValueError, match=r"for a model of one class.* allowed: floats \(b, 1\) in \[0, 1\]"):
        invert(small_vit(num_classes=1), torch.tensor([0, 0]), CONFIG)


def test_float_targets_push_the_logit_both_ways():
    model = small_vit(num_classes=1)
    found = invert(model, torch.tensor([[1.0], [0.0]]), CONFIG, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        present, absent = model(found.images).flatten().sigmoid().tolist()
    assert present > 0.9
    assert absent < 0.1
