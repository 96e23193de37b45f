"""Which replies the server lets in. A client is not trusted; a user's own spec is.

Before any memory is taken for a model its name and arguments pass the allow-list and its
weights are compared, by key, shape and dtype, with a build on torch's meta device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import median_low
from typing import Any

import torch
from flwr.app import Array
from torch import Tensor

from smi_fed.alignment import class_positions
from smi_fed.checks import SettingError, is_number
from smi_fed.class_statistics import ClassStatistics
from smi_fed.inversion.batch_norm import nonnegative_keys
from smi_fed.inversion.losses import FeatureStatistics, check_statistics
from smi_fed.inversion.teacher import View, adapt
from smi_fed.models import Classifier, ModelSpec, build_model, count_parameters
from smi_fed.policy import AdmissionPolicy
from smi_fed.strategies.allow_list import Expectation, check_spec
from smi_fed.strategies.extents import grid_of, largest_tensor
from smi_fed.strategies.left_out import put_back
from smi_fed.strategies.payloads import decode
from smi_fed.strategies.records import BadReplyError, Claim
from smi_fed.teachers import StoredTeacher, TrainedTeacher
from smi_fed.tokens import is_token_model, to_patches
from smi_fed.wrappers import is_unmerged, matched

LARGEST_IMAGE = 518
LARGEST_GRID, LARGEST_TOKEN_GRID = 128 * 128, 64 * 64
"""Patches of one image, and of one of a token model; a small patch takes memory that no count of weights tells of."""
LARGEST_FEATURE, ROUNDING = 1e6, 1e-9
"""What enters a head is smaller; and what rounding may do to a sum of squares, as a share of it."""
LARGEST_TENSOR = 2**24
"""Numbers in one tensor that a model makes of an image, and in all that it keeps beside its weights: biases of
attention between all patches, for one, have no weights that tell of them."""
LARGEST_COUNT = 2**53
"""Larger whole numbers do not pass every JSON."""


def check_model(text: str, policy: AdmissionPolicy, expected: Expectation) -> Classifier:
    """The model of a spec that a client may have, without memory for its weights.

    Raises:
        BadReplyError: saying what was got and what is allowed.
    """
    with torch.device("meta"):
        shape = _build(check_spec(text, policy, expected))
    if (size := count_parameters(shape)) > policy.max_parameters:
        raise BadReplyError(f"the model has {size} parameters, allowed: at most {policy.max_parameters}")
    most = min(policy.max_parameters, LARGEST_TENSOR)
    if (size := sum(buffer.numel() for buffer in shape.buffers())) > most:
        raise BadReplyError(f"the model keeps {size} more numbers, allowed: at most {most}")
    if len(shape.mean) != expected.channels:
        raise BadReplyError(f"the model takes {len(shape.mean)} channels, expected {expected.channels}")
    if max(shape.image_size) > LARGEST_IMAGE:
        raise BadReplyError(f"the model takes images of {shape.image_size} px, allowed: at most {LARGEST_IMAGE}")
    most = LARGEST_TOKEN_GRID if is_token_model(shape.backbone) else LARGEST_GRID
    if (size := grid_of(shape)) > most:
        raise BadReplyError(f"the model cuts an image into {size} patches, allowed: at most {most}")
    if (size := largest_tensor(shape)) > LARGEST_TENSOR:
        raise BadReplyError(
            f"the model makes a tensor of {size} numbers of an image, allowed: at most {LARGEST_TENSOR}"
        )
    return shape


def admit(claim: Claim, policy: AdmissionPolicy, expected: Expectation, device: torch.device) -> TrainedTeacher:
    """A teacher from a claim that passes every check.

    Raises:
        BadReplyError: saying what was got and what is allowed.
    """
    shape = check_model(claim.spec, policy, expected)
    spec, expected_weights = shape.spec, shape.state_dict()
    # A plain timm model's own names have no "backbone.", and a wrapped one's have more words.
    arrays = matched(put_back(claim, expected.known), expected_weights, ("", "backbone."))
    weights = check_arrays(arrays, expected_weights)
    check_batch_norms(shape, weights)
    model = _build(spec)
    model.load_state_dict(weights)
    model.eval().to(device)
    check_output(model)
    examples, counts = check_counts(claim, spec.num_classes)
    statistics = read_statistics(claim, model) if claim.statistics else None
    classes = class_positions(spec, expected.student)
    sums, most = None, counts or (examples,) * spec.num_classes
    if claim.class_statistics and expected.features:
        sums = read_class_statistics(claim.class_statistics, claim.num_examples, expected, classes, most)
    known = expected.student.num_classes
    return TrainedTeacher(claim.name, model, examples, counts, statistics, classes, known, sums)


def claimed_arrays(
    spec: str, payloads: Sequence[bytes], policy: AdmissionPolicy, expected: Expectation
) -> dict[str, Array]:
    """Arrays that came without names, in the order of the claimed model's state dict; not decoded.

    Raises:
        BadReplyError: a spec that is not admitted, or another number of arrays.
    """
    own = check_model(spec, policy, expected).state_dict()
    if len(own) != len(payloads):
        raise BadReplyError(f"the reply has {len(payloads)} arrays, the model has {len(own)}")
    return {
        key: Array(
            dtype=str(tensor.dtype).removeprefix("torch."),
            shape=tuple(tensor.shape),
            stype="numpy.ndarray",
            data=payload,
        )
        for (key, tensor), payload in zip(own.items(), payloads, strict=True)
    }


def _build(spec: ModelSpec) -> Classifier:
    try:
        return build_model(spec)
    except SettingError as error:
        raise BadReplyError(str(error)) from error
    except Exception as error:  # whatever a stranger's arguments make timm raise, it is that reply's fault
        raise BadReplyError(f"the architecture cannot be built: {type(error).__name__}: {error}") from error


def check_batch_norms(model: Classifier, weights: Mapping[str, Tensor]) -> None:
    """A negative variance makes every logit NaN, or only those of some images.

    Raises:
        BadReplyError: a variance or a count of batches below 0, by its key.
    """
    for key in nonnegative_keys(model):
        if bool((weights[key] < 0).any()):
            raise BadReplyError(f"{key} is {float(weights[key].min())}, expected values >= 0")


@torch.no_grad()
def check_output(model: Classifier) -> None:
    """Finite weights can still overflow, and allowed arguments can still contradict each other.

    One such teacher would spoil the whole ensemble or end the run.

    Raises:
        BadReplyError: the model fails on grey images, whole or one patch of them, or its
            logits are not finite.
    """
    reference = next(model.parameters(), model.mean)
    greys = torch.linspace(0, 1, 3, device=reference.device, dtype=reference.dtype).view(-1, 1, 1, 1)
    images = greys.expand(-1, len(model.mean), *model.image_size)
    try:
        teacher = adapt(model)
        first = torch.zeros(3, 1, dtype=torch.long, device=reference.device)
        patches = to_patches(images, teacher.patch_size)
        logits = [model(images), teacher.logits(View(patches[:, :1], first, patches))]
    except Exception as error:  # as in `_build`
        raise BadReplyError(f"the model does not run: {type(error).__name__}: {error}") from error
    if not all(bool(each.isfinite().all()) for each in logits):
        raise BadReplyError("the model's logits are not finite")


def check_arrays(arrays: Mapping[str, Array], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Decoded weights that agree with `expected` in keys, shapes and dtypes and are finite.

    Raises:
        BadReplyError: naming the first key that does not.
    """
    missing, extra = sorted(set(expected) - set(arrays)), sorted(set(arrays) - set(expected))
    if missing or extra:
        advice = "; merge an adapter of PEFT before: merge_and_unload()" if is_unmerged(extra) else ""
        raise BadReplyError(
            f"weights do not fit the architecture: missing {missing[:3]}, unexpected {extra[:3]}{advice}"
        )
    weights = {}
    for key, like in expected.items():
        array = arrays[key]
        dtype = str(like.dtype).removeprefix("torch.")
        if tuple(array.shape) != tuple(like.shape) or array.dtype != dtype:
            raise BadReplyError(f"{key} is {array.dtype} {tuple(array.shape)}, expected {dtype} {tuple(like.shape)}")
        weights[key] = decode(key, array, like)
    return weights


def check_counts(claim: Claim, classes: int) -> tuple[int, tuple[int, ...] | None]:
    """Claimed examples and label counts that can be true.

    Raises:
        BadReplyError: naming what cannot.
    """
    examples = claim.num_examples
    if not is_number(examples) or not 1 <= examples <= LARGEST_COUNT or examples != int(examples):
        raise BadReplyError(f"num-examples is {examples!r}, expected an int from 1 to {LARGEST_COUNT}")
    counts = claim.label_counts
    if counts is not None and (len(counts) != classes or min(counts) < 0 or sum(counts) != examples):
        raise BadReplyError(
            f"label counts {counts} are not {classes} counts >= 0 that add up to {int(examples)} examples"
        )
    return int(examples), counts


def read_statistics(claim: Claim, model: Classifier) -> FeatureStatistics:
    """Feature statistics that fit the model.

    Raises:
        BadReplyError: naming what does not.
    """
    teacher = adapt(model)
    if teacher.prefix_tokens < 0:
        raise BadReplyError("feature statistics came with a model that has no patch tokens")
    backbone: Any = model.backbone
    shape = (teacher.prefix_tokens + teacher.grid[0] * teacher.grid[1], backbone.embed_dim)
    layers = range(len(backbone.blocks) + 1)
    expected = {f"{kind}.{i}": torch.empty(shape, device="meta") for kind in ("mean", "std") for i in layers}
    expected["examples"] = torch.empty((), dtype=torch.int64, device="meta")
    tensors = check_arrays(claim.statistics, expected)
    means, stds = (tuple(tensors[f"{kind}.{i}"] for i in layers) for kind in ("mean", "std"))
    statistics = FeatureStatistics(means, stds, int(tensors["examples"]))
    if statistics.examples < 1:
        raise BadReplyError(f"feature statistics are of {statistics.examples} examples, expected at least 1")
    try:
        check_statistics(teacher, statistics)
    except ValueError as error:
        raise BadReplyError(str(error)) from error
    return statistics


def read_class_statistics(
    arrays: Mapping[str, Array], examples: float, expected: Expectation, classes: Sequence[int], counts: Sequence[int]
) -> ClassStatistics:
    """Class statistics that some images have.

    Args:
        examples: most images of all classes together.
        classes: for each of the client's classes its index among the student's.
        counts: most examples of each.

    Raises:
        BadReplyError: naming what does not fit the student's head, or no images can have.
    """
    number, width = expected.student.num_classes, expected.features
    shapes = {"counts": (number,), "sums": (number, width), "moments": (width, width)}
    like = {key: torch.empty(shape, dtype=torch.float64, device="meta") for key, shape in shapes.items()}
    known = ClassStatistics(**check_arrays(arrays, like))
    most, total = torch.zeros_like(known.counts), float(known.counts.sum())
    most[list(classes)] = torch.tensor(counts, dtype=most.dtype)
    wrong = (known.counts != known.counts.round()) | (known.counts < 0) | (known.counts > most)
    for place in wrong.nonzero()[:1, 0].tolist():
        got, allowed = float(known.counts[place]), int(most[place])
        raise BadReplyError(
            f"class statistics of class {place} are of {got} images, expected an int from 0 to {allowed}"
        )
    if total > examples:
        raise BadReplyError(f"class statistics are of {total} images, expected at most {examples}")
    if bool(known.sums[known.counts == 0].any()):
        raise BadReplyError("class statistics have sums of a class without images, expected 0")
    _check_moments(known, total)
    return known


def _check_moments(known: ClassStatistics, total: float) -> None:
    """Features within each class have a covariance: its matrix is symmetric, and nowhere negative."""
    sums, moments, most = known.sums, known.moments, total * LARGEST_FEATURE
    if bool((sums.abs() > most).any()) or bool((moments.abs() > most * LARGEST_FEATURE).any()):
        raise BadReplyError(f"class statistics are of features beyond {LARGEST_FEATURE:g}")
    slack = max(1e-12, ROUNDING * float(moments.diagonal().max()))
    within = moments - sums.T @ (sums / known.counts.clamp(min=1)[:, None])
    symmetric = float((moments - moments.T).abs().max()) <= slack
    _, failed = torch.linalg.cholesky_ex(within + slack * torch.eye(len(within), dtype=within.dtype))
    if not symmetric or bool(failed):
        raise BadReplyError("the moments of the class statistics are not those of features with such sums")


def cap_claims(teachers: Sequence[StoredTeacher], policy: AdmissionPolicy) -> list[StoredTeacher]:
    """The same teachers with their claimed examples cut; what a client says of its proportions stays."""
    if not teachers:
        return []
    typical = median_low(teacher.num_examples for teacher in teachers)
    most = int(min(policy.max_examples, policy.max_claim_ratio * max(1, typical)))
    return [replace(teacher, num_examples=min(teacher.num_examples, most)) for teacher in teachers]
