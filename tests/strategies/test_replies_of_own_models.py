"""Registered models in a federation, and replies whose keys carry the words of wrappers."""

import numpy as np
import pytest
import torch
from flwr.app import Message
from flwr.common import ndarrays_to_parameters
from flwr.serverapp import strategy as flower
from torch import nn

from smi_fed.checks import SettingError
from smi_fed.models import ModelSpec, build_model, build_seeded
from smi_fed.policy import DEFAULT_ARCHITECTURES
from smi_fed.strategies import AdmissionPolicy, records
from smi_fed.strategies.admission import Expectation, admit, claimed_arrays
from smi_fed.strategies.records import BadReplyError
from tests.models import masked_model, small_spec, small_vit
from tests.own_models import NAME
from tests.strategies.test_every_strategy import SAMPLING, client, run

CPU = torch.device("cpu")
EXPECTED = Expectation(student=small_spec(), channels=3)
OWN = ModelSpec(NAME, 5, kwargs={"width": 6})
OPEN = AdmissionPolicy(architectures=(*DEFAULT_ARCHITECTURES, NAME))


def reply(spec, weights):
    return records.pack_reply(spec, weights, num_examples=10, train_loss=0.5)


def judge(content, policy=OPEN):
    return admit(records.read_reply(content), policy, EXPECTED, CPU)


def prefixed(prefix, weights):
    return {f"{prefix}{key}": value for key, value in weights.items()}


def inside(model):
    for name, child in list(model.backbone.named_children()):
        if isinstance(child, nn.Sequential):
            model.backbone._modules[name] = torch.compile(child)
    return model.state_dict()


WRAPPED = {
    "compiled": lambda model: torch.compile(model).state_dict(),
    "parallel": lambda model: nn.DataParallel(model).state_dict(),
    "compiled, parallel": lambda model: torch.compile(nn.DataParallel(model)).state_dict(),
    "plain, compiled": lambda model: torch.compile(model.backbone).state_dict(),
    "plain, parallel": lambda model: nn.DataParallel(model.backbone).state_dict(),
    "compiled inside": inside,
    "plain, compiled inside": lambda model: {key.removeprefix("backbone."): v for key, v in inside(model).items()},
    "plain": lambda model: model.backbone.state_dict(),
}


@pytest.mark.parametrize("how", WRAPPED)
@pytest.mark.parametrize("kind", ["vit", "resnet", "own"])
def test_a_wrapped_model_is_admitted_as_it_was_sent(how, kind):
    makers = {"vit": small_vit, "resnet": lambda: masked_model("resnet"), "own": lambda: build_seeded(OWN, 0)}
    sent, model = makers[kind](), makers[kind]()
    received = judge(reply(model.spec, WRAPPED[how](model))).model.state_dict()
    assert received.keys() == sent.state_dict().keys()
    assert all(torch.equal(value, received[key]) for key, value in sent.state_dict().items())


def test_a_block_compiled_by_itself_is_admitted():
    model, sent = small_vit(), small_vit().state_dict()
    model.backbone.blocks[0] = torch.compile(model.backbone.blocks[0])
    assert "backbone.blocks.0._orig_mod.norm1.weight" in model.state_dict()
    received = judge(reply(model.spec, model.state_dict())).model.state_dict()
    assert all(torch.equal(value, received[key]) for key, value in sent.items())


def twice():
    weights = small_vit().state_dict()
    return weights | {"_orig_mod.backbone.head.bias": weights["backbone.head.bias"] + 1}


@pytest.mark.parametrize(
    ("weights", "says"),
    [
        (twice, "unexpected"),
        (lambda: prefixed("net.", small_vit().state_dict()), "missing .* unexpected"),
        (lambda: prefixed("base_model.model.", {k.replace("qkv", "qkv.base_layer"): v
                                                for k, v in small_vit().state_dict().items()}), "merge_and_unload"),
        (lambda: small_vit().state_dict() | {"backbone.module": torch.ones(1)}, "unexpected"),
    ],
)  # fmt: skip
def test_other_keys_are_refused(weights, says):
    with pytest.raises(BadReplyError, match=says):
        judge(reply(small_spec(), weights()))


def own_reply(**kwargs):
    return reply(ModelSpec(NAME, 5, kwargs=kwargs), build_model(ModelSpec(NAME, 5, kwargs=kwargs)).state_dict())


def test_a_registered_name_has_to_stand_on_the_list():
    with pytest.raises(BadReplyError, match=f"'{NAME}' is not on the allow-list"):
        judge(own_reply(), AdmissionPolicy())
    assert judge(own_reply(width=16, pool="max")).model.spec.kwargs == {"width": 16, "pool": "max"}
    with pytest.raises(SettingError, match="timm model name"):
        AdmissionPolicy(architectures=("nobody-knows",))


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"width": 17}, "width is 17, allowed: 4 to 16"), ({"width": 3}, "width is 3"),
        ({"width": 4.0}, "width is 4.0"), ({"width": True}, "width is True"), ({"width": [4]}, r"width is \(4,\)"),
        ({"width": "4"}, "width is '4'"), ({"pool": "min"}, "pool is 'min', allowed"),
        ({"secret": 1}, r"'secret' is not allowed in a client's spec; allowed: \['pool', 'width'\]"),
        ({"checkpoint_path": "/etc/passwd"}, "'checkpoint_path' is not allowed"), ({"depth": 2}, "'depth'"),
        ({"img_size": 32}, "'img_size' is not allowed"),
    ],
)  # fmt: skip
def test_a_client_sets_only_what_the_registration_names(kwargs, says, monkeypatch):
    monkeypatch.setattr("smi_fed.strategies.admission.build_model", lambda spec: pytest.fail("built"))
    forged = reply(ModelSpec(NAME, 5), small_vit().state_dict())
    forged[records.MODEL][records.SPEC] = ModelSpec(NAME, 5, kwargs=kwargs).to_json()
    with pytest.raises(BadReplyError, match=says):
        judge(forged)


def test_a_registered_model_is_built_without_memory_first(monkeypatch):
    devices = []

    def watched(spec):
        devices.append(torch.get_default_device().type)
        return build_model(spec)

    monkeypatch.setattr("smi_fed.strategies.admission.build_model", watched)
    judge(own_reply())
    assert devices == ["meta", "cpu"]


def test_the_older_api_takes_a_registered_model():
    model = build_seeded(ModelSpec(NAME, 5), 0)
    arrays, examples, metrics = records.pack_fit(
        model.spec, torch.compile(model).state_dict(), name="a", num_examples=10, train_loss=0.5
    )
    named = claimed_arrays(model.spec.to_json(), ndarrays_to_parameters(arrays).tensors, OPEN, EXPECTED)
    received = admit(records.read_fit(metrics, examples, named), OPEN, EXPECTED, CPU).model.state_dict()
    assert all(torch.equal(value, received[key]) for key, value in model.state_dict().items())


def ask(message, context):
    """Client 0 has a ViT; the others the registered model, one of them compiled."""
    number = context.node_config["partition-id"]
    if number == 0:
        return client(message, context)
    model = build_seeded(OWN, number)
    weights = (torch.compile(model) if number == 2 else model).state_dict()
    content = records.pack_reply(OWN, weights, name=f"client {number}", num_examples=10, train_loss=1.0)
    return Message(content, reply_to=message)


@pytest.mark.parametrize("student", [small_spec(depth=1, embed_dim=16), OWN], ids=["vit", "own"])
@pytest.mark.parametrize("projection", ["ensemble", "per_teacher"])
def test_a_federation_with_a_registered_model(student, projection):
    places = {1 + number: {"partition-id": number} for number in range(3)}
    wrapped, rounds = run(
        flower.FedAvg(**SAMPLING), ask=ask, places=places, student=student, policy=OPEN, projection=projection
    )
    assert [len(record.teachers) for record in wrapped.rounds] == [3, 3]
    sent = build_seeded(OWN, 2).state_dict()
    received = wrapped.rounds[-1].teachers[2].load().model.state_dict()
    assert all(torch.equal(value, received[key]) for key, value in sent.items())
    assert np.isfinite(rounds[-1].returned).all()
    assert np.abs(rounds[-1].returned - rounds[0].sent).max() > 1e-4
    closed, _ = run(flower.FedAvg(**SAMPLING), ask=ask, places=places, student=student, projection=projection,
                    num_rounds=1, min_teachers=1)  # fmt: skip
    reasons = [verdict.reason for verdict in closed.rounds[0].verdicts]
    assert ["allow-list" in reason for reason in reasons] == [False, True, True]
