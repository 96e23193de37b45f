"""What a client packs is what the server builds, whatever the client's weights are in."""

import pytest
import torch
from flwr.common import ndarrays_to_parameters
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict

from smi_fed.inversion import feature_statistics
from smi_fed.strategies import records
from smi_fed.strategies.admission import AdmissionPolicy, Expectation, admit, claimed_arrays
from tests.models import masked_model, small_spec, small_vit

CPU = torch.device("cpu")
EXPECTED = Expectation(student=small_spec(), channels=3)
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def over_the_wire(content):
    return recorddict_from_proto(ProtoRecordDict.FromString(recorddict_to_proto(content).SerializeToString()))


def model_of(kind):
    return small_vit() if kind == "vit" else masked_model("resnet")


def assert_weights(found, sent):
    """`found`, in float32, has the very values of `sent`."""
    assert found.keys() == sent.keys()
    for key, value in sent.items():
        assert found[key].dtype == (torch.float32 if value.is_floating_point() else value.dtype)
        assert torch.equal(found[key], value.to(found[key].dtype)), key


@pytest.mark.parametrize("kind", ["vit", "resnet"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_arrive_as_they_were(kind, dtype):
    model = model_of(kind).to(dtype)
    known = feature_statistics(model, [torch.rand(4, 3, 16, 16)]) if kind == "vit" else None
    content = records.pack_reply(
        model.spec, model.state_dict(), num_examples=4, train_loss=0.5, name="half", statistics=known
    )
    claim = records.read_reply(over_the_wire(content))
    teacher = admit(claim, AdmissionPolicy(), EXPECTED, CPU)
    assert_weights(teacher.model.state_dict(), model.state_dict())
    assert {weight.dtype for weight in model.parameters()} == {dtype}
    if known is not None:
        for mine, theirs in zip(teacher.statistics.mean, known.mean, strict=True):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_of_the_older_api_arrive_too(dtype):
    model = small_vit().to(dtype)
    arrays, examples, metrics = records.pack_fit(
        model.spec, model.state_dict(), name="half", num_examples=4, train_loss=0.5
    )
    payloads = ndarrays_to_parameters(arrays).tensors
    named = claimed_arrays(str(metrics[records.SPEC_METRIC]), payloads, AdmissionPolicy(), EXPECTED)
    teacher = admit(records.read_fit(metrics, examples, named), AdmissionPolicy(), EXPECTED, CPU)
    assert_weights(teacher.model.state_dict(), model.state_dict())
    assert (teacher.name, teacher.num_examples) == ("half", 4)
