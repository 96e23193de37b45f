"""Which architectures a client may name, and with which arguments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from flwr.app import Array

from smi_fed.alignment import class_positions
from smi_fed.checks import SettingError, is_integer, is_number, printable
from smi_fed.class_statistics import linear_head
from smi_fed.models import Classifier, ModelSpec
from smi_fed.policy import AdmissionPolicy
from smi_fed.registry import registered
from smi_fed.strategies.records import BadReplyError

LONGEST_SPEC, LONGEST_CLASS = 20_000, 200
"""Most characters of a spec, and of the name of a class."""

KWARG_BOUNDS: dict[str, tuple[float, float]] = {
    "img_size": (8, 518), "patch_size": (1, 64), "embed_dim": (8, 1280), "depth": (1, 32), "num_heads": (1, 32),
    "mlp_ratio": (0.5, 8), "in_chans": (1, 4), "init_values": (0.0, 1.0), "reg_tokens": (0, 16), "depths": (1, 32),
    "window_size": (1, 16),
}  # fmt: skip
KWARG_CHOICES: dict[str, tuple[Any, ...]] = {
    "qk_norm": (True, False), "qkv_bias": (True, False), "class_token": (True, False), "no_embed_class": (True, False),
    "pre_norm": (True, False), "global_pool": ("token", "avg", "map"),
}  # fmt: skip
STAGES = 4
"""Most values of an argument that is one number per stage."""
PER_STAGE = frozenset({"depths", "num_heads"})


@dataclass(frozen=True)
class Expectation:
    """What a teacher has to fit: the student's label space, of which it may know a part, and its channels.

    Attributes:
        features: how many enter the student's head, where class statistics are asked for; else 0.
        known: weights that a reply may leave out, by their digests.
    """

    student: ModelSpec
    channels: int
    features: int = 0
    known: Mapping[bytes, Array] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, student: Classifier) -> Expectation:
        """What the student expects."""
        return cls(student.spec, len(student.mean))

    @classmethod
    def with_features(cls, student: Classifier) -> Expectation:
        """The same where class statistics are asked for; raises SettingError for a student without one linear head."""
        return replace(cls.of(student), features=linear_head(student).in_features)


def check_spec(text: str, policy: AdmissionPolicy, expected: Expectation) -> ModelSpec:
    """A claimed spec that is on the allow-list with arguments inside their bounds.

    Raises:
        BadReplyError: naming the first thing that is not allowed.
    """
    if len(text) > LONGEST_SPEC:
        raise BadReplyError(f"the spec has {len(text)} characters, allowed: at most {LONGEST_SPEC}")
    try:
        spec = ModelSpec.from_json(text)
    except SettingError as error:
        raise BadReplyError(str(error)) from error
    if spec.name not in policy.architectures:
        raise BadReplyError(f"architecture {spec.name!r} is not on the allow-list {sorted(policy.architectures)}")
    own = registered(spec.name)
    bounds, choices = (KWARG_BOUNDS, KWARG_CHOICES) if own is None else (own.bounds, own.choices)
    for key, value in spec.kwargs.items():
        _check_kwarg(key, value, bounds, choices, frozenset() if own else PER_STAGE)
    if any(abs(x) > 10 for x in spec.mean or ()) or any(not 1e-3 <= x <= 10 for x in spec.std or ()):
        raise BadReplyError(f"normalisation is {spec.mean}, {spec.std}, allowed: means to 10, deviations 0.001 to 10")
    # Where the student's classes have names, a client's are among them.
    strange = [name for name in spec.class_names or () if name != printable(name, LONGEST_CLASS)]
    if strange and expected.student.class_names is None:
        raise BadReplyError(f"class names are {strange[:3]}, allowed: printable ones of {LONGEST_CLASS} characters")
    try:
        class_positions(spec, expected.student)
    except SettingError as error:
        raise BadReplyError(f"the model's classes are not the student's: {error}") from error
    return spec


def _check_kwarg(
    key: str, value: Any, bounds: Mapping[str, tuple[float, float]], choices: Mapping[str, tuple[Any, ...]],
    per_stage: frozenset[str],
) -> None:  # fmt: skip
    if key in choices:
        if not any(type(value) is type(choice) and value == choice for choice in choices[key]):
            raise BadReplyError(f"argument {key} is {value!r}, allowed: {choices[key]}")
        return
    if key not in bounds:
        raise BadReplyError(
            f"argument {key!r} is not allowed in a client's spec; allowed: {sorted((*bounds, *choices))}"
        )
    low, high = bounds[key]
    integers = is_integer(low) and is_integer(high)
    values: tuple[Any, ...] = value if isinstance(value, tuple) and key in per_stage else (value,)
    if not 1 <= len(values) <= STAGES:
        raise BadReplyError(f"argument {key} has {len(values)} values, allowed: 1 to {STAGES}")
    for each in values:
        whole = not isinstance(each, float) or not integers
        if not is_number(each) or not whole or not low <= each <= high:
            raise BadReplyError(f"argument {key} is {value!r}, allowed: {low} to {high}")
