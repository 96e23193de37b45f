"""Are two sets of sparse images one and the same?"""

from dataclasses import fields

import torch

from smi_fed.sparse_images import SparseImages


def assert_same(first, second):
    for name in (field.name for field in fields(SparseImages)):
        mine, theirs = getattr(first, name), getattr(second, name)
        if isinstance(mine, torch.Tensor):
            assert mine.dtype == theirs.dtype, name
            assert torch.equal(mine, theirs), name
        else:
            assert mine == theirs, name
