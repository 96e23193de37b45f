"""Swin, ResNet and ConvNeXt clients: what they may claim, and what BatchNorm's buffers may hold."""

import numpy as np
import pytest
import torch
from flwr.app import Array, Message
from flwr.common import ndarrays_to_parameters
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.supercore.task_identity import TaskIdentity

from smi_fed.alignment import interchangeable
from smi_fed.inversion.batch_norm import batch_norms
from smi_fed.models import ModelSpec, build_model
from smi_fed.policy import DEFAULT_ARCHITECTURES
from smi_fed.strategies import records
from smi_fed.strategies.admission import AdmissionPolicy, Expectation, admit, claimed_arrays
from smi_fed.strategies.records import BadReplyError
from smi_fed.strategies.round_record import describe
from tests.models import masked_model, small_spec

EXPECTED = Expectation(student=small_spec(), channels=3)
SWIN = {"img_size": 32, "window_size": 4, "embed_dim": 12, "depths": [1, 1], "num_heads": [1, 2]}
MEAN, VARIANCE, BATCHES = (
    f"backbone.conv1.1.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")
)


def reply_of(spec, model, **changes):
    content = records.pack_reply(spec, model.state_dict(), num_examples=10, train_loss=0.5)
    for key, array in changes.pop("arrays", {}).items():
        content[records.ARRAYS][key] = Array(array)
    return content


def resnet_reply(**arrays):
    model = masked_model("resnet")
    return reply_of(model.spec, model, arrays=arrays)


def claimed(name, **kwargs):
    """A reply of a spec, with another model's weights: it has to be refused before they matter."""
    model = masked_model("resnet")
    return reply_of(ModelSpec(name, 5, kwargs=kwargs), model)


def over_the_wire(content):
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    message = message_from_proto(message_to_proto(Message(content, dst_node_id=2, message_type="train")))
    return message.content


def judge(content):
    return admit(records.read_reply(content), AdmissionPolicy(), EXPECTED, torch.device("cpu"))


@pytest.mark.parametrize("kind", ["swin", "resnet"])
def test_they_are_admitted_as_they_were_sent(kind):
    model = masked_model(kind)
    for number, norm in enumerate(batch_norms(model).values()):
        norm.num_batches_tracked.fill_(2**40 + number)
        norm.running_var.uniform_(0, 3)
    teacher = judge(over_the_wire(reply_of(model.spec, model)))
    received = teacher.model.state_dict()
    assert all(torch.equal(value, received[key]) for key, value in model.state_dict().items())
    assert all(value.dtype == received[key].dtype for key, value in model.state_dict().items())
    assert teacher.statistics is None
    assert interchangeable(teacher.model, model)


def test_buffers_arrive_by_the_older_api_too():
    model = masked_model("resnet")
    arrays, examples, metrics = records.pack_fit(
        model.spec, model.state_dict(), name="client 0", num_examples=10, train_loss=0.5
    )
    payloads = ndarrays_to_parameters(arrays).tensors
    named = claimed_arrays(model.spec.to_json(), payloads, AdmissionPolicy(), EXPECTED)
    teacher = admit(records.read_fit(metrics, examples, named), AdmissionPolicy(), EXPECTED, torch.device("cpu"))
    received = teacher.model.state_dict()
    assert all(torch.equal(value, received[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", DEFAULT_ARCHITECTURES)
def test_every_name_of_the_allow_list_is_one_that_timm_builds(name):
    with torch.device("meta"):
        assert build_model(ModelSpec(name, 5)).backbone.num_classes == 5


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        (VARIANCE, np.full(24, -1e-3, np.float32), f"{VARIANCE} is -0.001.*, expected values >= 0"),
        (VARIANCE, np.r_[-5.0, np.ones(23)].astype(np.float32), f"{VARIANCE} is -5.0, expected values >= 0"),
        (VARIANCE, np.full(24, np.nan, np.float32), f"{VARIANCE} is not finite"),
        (VARIANCE, np.full(24, np.inf, np.float32), f"{VARIANCE} is not finite"),
        (VARIANCE, np.ones(23, np.float32), r"expected float32 \(24,\)"),
        (MEAN, np.full(24, np.nan, np.float32), f"{MEAN} is not finite"),
        (BATCHES, np.array(-1, np.int64), f"{BATCHES} is -1.0, expected values >= 0"),
        (BATCHES, np.array(1.0, np.float32), rf"{BATCHES} is float32 \(\), expected int64 \(\)"),
        (BATCHES, np.array([1], np.int64), rf"{BATCHES} is int64 \(1,\), expected int64 \(\)"),
    ],
)
def test_buffers_that_cannot_be_are_refused(key, value, reason):
    with pytest.raises(BadReplyError, match=reason):
        judge(over_the_wire(resnet_reply(**{key: value})))


@pytest.mark.parametrize(
    ("name", "kwargs", "reason"),
    [
        ("swin_tiny_patch4_window7_224", {"depths": [1] * 5}, "depths has 5 values, allowed: 1 to 4"),
        ("swin_tiny_patch4_window7_224", {"depths": []}, "depths has 0 values"),
        ("swin_tiny_patch4_window7_224", {"depths": [1, 33]}, r"depths is \(1, 33\), allowed: 1 to 32"),
        ("swin_tiny_patch4_window7_224", {"depths": [1, True]}, r"depths is \(1, True\)"),
        ("swin_tiny_patch4_window7_224", {"depths": [1, 1.5]}, r"depths is \(1, 1.5\)"),
        ("swin_tiny_patch4_window7_224", {"depths": [[1], [1]]}, "depths is"),
        ("swin_tiny_patch4_window7_224", {"depths": "11"}, "depths is '11'"),
        ("swin_tiny_patch4_window7_224", {"num_heads": [64]}, "num_heads is"),
        ("swin_tiny_patch4_window7_224", {"window_size": 17}, "window_size is 17, allowed: 1 to 16"),
        ("swin_tiny_patch4_window7_224", {"window_size": [7, 7]}, r"window_size is \(7, 7\)"),
        ("swin_tiny_patch4_window7_224", {"embed_dim": [8, 8]}, "embed_dim is"),
        ("swin_tiny_patch4_window7_224", {**SWIN, "num_heads": [1]}, "kwargs|cannot be built"),
        ("swin_tiny_patch4_window7_224", {**SWIN, "num_heads": [32, 32]}, "kwargs|cannot be built"),
        ("swin_tiny_patch4_window7_224", {**SWIN, "img_size": 512, "patch_size": 1, "window_size": 16,
                                          "depths": [8, 8]}, "keeps .* more numbers, allowed"),
        ("swin_tiny_patch4_window7_224", {**SWIN, "img_size": 512, "patch_size": 1}, "262144 patches, allowed"),
        ("vit_tiny_patch16_224", {"img_size": 512, "patch_size": 2, "embed_dim": 8, "num_heads": 1}, "65536 patches"),
        ("vit_tiny_patch16_224", {"num_heads": [1, 2]}, "kwargs|cannot be built"),
        ("convnext_atto", {"patch_size": 1}, "50176 patches|kwargs"),
        ("resnet10t", {"channels": [1, 1, 1, 1]}, "argument 'channels' is not allowed"),
        ("resnet10t", {"depths": [1]}, "kwargs"),
        ("resnet10t", {"in_chans": 1}, "1 channels"),
        ("resnet101", {}, "allow-list"),
    ],
)  # fmt: skip
def test_arguments_out_of_bounds_are_refused_before_memory_is_taken(name, kwargs, reason, monkeypatch):
    def on_meta(spec):
        assert torch.get_default_device().type == "meta"
        return build_model(spec)

    content = claimed(name, **kwargs)
    monkeypatch.setattr("smi_fed.strategies.admission.build_model", on_meta)
    with pytest.raises(BadReplyError, match=reason):
        judge(content)


def test_a_list_in_a_spec_is_the_same_as_a_tuple():
    lists, tuples = (
        ModelSpec("swin_tiny_patch4_window7_224", 5, kwargs={**SWIN, "depths": d}) for d in ([1, 1], (1, 1))
    )
    assert lists == tuples == ModelSpec.from_json(lists.to_json())
    assert describe(lists) == "swin_tiny_patch4_window7_224 (window 4, width 12, depths 1+1, heads 1+2)"
