"""The paper's selection (Hu et al., 2024, section 3.2): the patches attended to most."""

from torch import Tensor

from smi_fed.inversion.selections.look import Look


def attention(look: Look) -> Tensor:
    """The teacher's own importance (b, k); for [CLS] pooling the paper's criterion."""
    return look.teacher.importance(look.view, look.targets)
