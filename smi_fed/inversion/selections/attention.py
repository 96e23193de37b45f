"""The paper's selection (Hu et al., 2024, section 3.2): the patches attended to most."""

from torch import Tensor

from smi_fed.inversion.selections.candidates import Candidates


def attention(candidates: Candidates) -> Tensor:
    """The teacher's own importance (b, k); for [CLS] pooling the paper's criterion."""
    return candidates.teacher.importance(candidates.view, candidates.targets)
