"""Bad replies, each refused with its reason and without harm."""

import json
from dataclasses import replace
from io import BytesIO

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, MessageType, Metadata, MetricRecord, RecordDict
from flwr.app.message import make_message

from smi_fed.inversion import feature_statistics
from smi_fed.models import build_model
from smi_fed.pipeline import TrainedTeacher
from smi_fed.strategies import records
from smi_fed.strategies.admission import AdmissionPolicy, Expectation, admit, cap_claims
from smi_fed.strategies.payloads import decode
from smi_fed.strategies.records import BadReplyError
from tests.models import small_spec, small_vit

EXPECTED = Expectation(student=small_spec(), channels=3)
CPU = torch.device("cpu")


def good_reply(**changes):
    model = small_vit()
    arguments = {
        "name": "client 0", "num_examples": 10, "train_loss": 0.5, "label_counts": [4, 3, 2, 1, 0],
        "statistics": feature_statistics(model, [torch.rand(4, 3, 16, 16)]),
    }  # fmt: skip
    return records.pack_reply(changes.pop("spec", model.spec), model.state_dict(), **{**arguments, **changes})


def judge(content, policy=None):
    return admit(records.read_reply(content), policy or AdmissionPolicy(), EXPECTED, CPU)


def with_spec(**changes):
    content = good_reply()
    spec = json.loads(content[records.MODEL][records.SPEC])
    spec.update(changes)
    content[records.MODEL][records.SPEC] = json.dumps(spec)
    return content


def with_model_text(text):
    content = good_reply()
    content[records.MODEL][records.SPEC] = text
    return content


def with_kwargs(**changes):
    return with_spec(kwargs={**small_spec().kwargs, **changes})


def with_array(key, array, record=records.ARRAYS):
    content = good_reply()
    if array is None:
        del content[record][key]
    else:
        content[record][key] = array if isinstance(array, Array) else Array(np.asarray(array))
    return content


def test_a_good_reply_is_admitted_as_it_was_sent():
    model, teacher = small_vit(), judge(good_reply())
    received = teacher.model.state_dict()
    assert all(torch.equal(value, received[key]) for key, value in model.state_dict().items())
    assert (teacher.name, teacher.num_examples, teacher.label_counts) == ("client 0", 10, (4, 3, 2, 1, 0))
    assert teacher.statistics.examples == 4
    assert not teacher.model.training


HEAD = "backbone.head.bias"
FORBIDDEN_KWARGS = {
    "checkpoint_path": "/etc/passwd", "pretrained": True, "pretrained_cfg": {"file": "/etc/passwd"},
    "pretrained_cfg_overlay": {"file": "x"}, "cache_dir": "/tmp", "features_only": True, "scriptable": True,
    "weight_init": "jax", "block_fn": "x",
}  # fmt: skip

BAD_REPLIES = {
    "unknown architecture": (lambda: with_spec(name="vit_made_up"), "allow-list"),
    "forbidden architecture": (lambda: with_spec(name="vit_giant_patch14_224"), "allow-list"),
    "hub name": (lambda: with_spec(name="hf-hub:someone/model"), "a hub or a directory is not looked into"),
    "local directory": (lambda: with_spec(name="local-dir:/tmp/model"), "a hub or a directory is not looked into"),
    "pretrained tag": (lambda: with_spec(name="vit_tiny_patch16_224.augreg_in21k"), "allow-list"),
    "giant width": (lambda: with_kwargs(embed_dim=100_000), "embed_dim is 100000"),
    "giant depth": (lambda: with_kwargs(depth=10**9), "depth is"),
    "giant image": (lambda: with_kwargs(img_size=10**6), "img_size is"),
    "many parameters": (lambda: with_kwargs(embed_dim=1280, depth=32), "parameters, allowed"),
    "fractional depth": (lambda: with_kwargs(depth=2.5), "depth is 2.5"),
    "boolean as number": (lambda: with_kwargs(depth=True), "depth is True"),
    "number as boolean": (lambda: with_kwargs(qk_norm=1), "qk_norm is 1"),
    "width not divided by heads": (lambda: with_kwargs(embed_dim=25), "kwargs"),
    "patch size that does not divide": (lambda: with_kwargs(patch_size=5), "patch_size"),
    "weights of another image size": (lambda: with_kwargs(img_size=32), "backbone.pos_embed is"),
    "other channels": (lambda: with_kwargs(in_chans=1), "1 channels"),
    "other classes": (lambda: with_spec(num_classes=7), "num_classes: got 7, allowed: 5, where classes have no names"),
    "spec schema": (lambda: with_spec(schema=99), "got 99, allowed: version 1"),
    "spec field": (lambda: with_spec(code="import os"), "spec.code: got"),
    "spec too long": (lambda: with_spec(class_names=["x" * 20_000] * 5), "characters, allowed"),
    "spec too deep": (lambda: with_model_text("[" * 15_000), "JSON text"),
    "overflowing normalisation": (lambda: with_spec(std=[1e-30] * 3), "normalisation is"),
    "weights that overflow": (
        lambda: with_array("backbone.head.weight", np.full((5, 24), 3e38, np.float32)), "logits are not finite",
    ),
    "spec without name": (lambda: with_spec(name=""), "spec.name"),
    "NaN": (lambda: with_array(HEAD, np.full(5, np.nan, np.float32)), f"{HEAD} is not finite"),
    "infinity": (lambda: with_array(HEAD, np.full(5, np.inf, np.float32)), "not finite"),
    "wrong shape": (lambda: with_array(HEAD, np.zeros(6, np.float32)), r"float32 \(6,\), expected float32 \(5,\)"),
    "broadcastable shape": (lambda: with_array(HEAD, np.zeros(1, np.float32)), "expected float32"),
    "wrong dtype": (lambda: with_array(HEAD, np.zeros(5, np.float64)), "float64"),
    "missing key": (lambda: with_array(HEAD, None), "missing"),
    "extra key": (lambda: with_array("backbone.extra", np.zeros(1, np.float32)), "unexpected"),
    "another packing": (
        lambda: with_array(HEAD, Array(dtype="float32", shape=(5,), stype="torch.tensor", data=b"")), "packed as 'tor",
    ),
    "large loss": (lambda: good_reply(train_loss=1e300), "train_loss is 1e.300, expected a number from 0 to 1e.06"),
    "more examples than any": (lambda: good_reply(num_examples=2**60, label_counts=None), "an int from 1 to 90"),
    "class names that steer": (lambda: with_spec(class_names=["a", "b\x1b[2J", "\ud800", "c", "d"]), "class names are"),
    "statistics of nobody": (
        lambda: with_array("examples", np.asarray(0), records.STATISTICS), "of 0 examples, expected at least 1",
    ),
    "biases of attention": (
        lambda: with_spec(
            name="beitv2_base_patch16_224",
            kwargs={"img_size": 128, "patch_size": 4, "embed_dim": 32, "depth": 1, "num_heads": 16},
        ),
        "a tensor of 16810000 numbers of an image",
    ),
    "no examples": (lambda: good_reply(num_examples=0, label_counts=None), "num-examples is 0"),
    "negative examples": (lambda: good_reply(num_examples=-5, label_counts=None), "num-examples"),
    "label counts that do not add up": (lambda: good_reply(label_counts=[10, 10, 0, 0, 0]), "add up to 10"),
    "negative label count": (lambda: good_reply(label_counts=[12, -2, 0, 0, 0]), "counts >= 0"),
    "too many label counts": (lambda: good_reply(label_counts=[4, 3, 2, 1, 0, 0]), "5 counts"),
    "NaN loss": (lambda: good_reply(train_loss=float("nan")), "train_loss is nan"),
    "NaN statistics": (
        lambda: with_array("mean.0", np.full((17, 24), np.nan, np.float32), records.STATISTICS), "mean.0 is not finite",
    ),
    "statistics of another model": (
        lambda: with_array("mean.0", np.zeros((9, 24), np.float32), records.STATISTICS), "mean.0 is",
    ),
    "negative deviation": (
        lambda: with_array("std.1", np.full((17, 24), -1, np.float32), records.STATISTICS), "deviations >= 0",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_REPLIES)
def test_bad_replies_are_refused_with_their_reason(kind):
    make, reason = BAD_REPLIES[kind]
    with pytest.raises(BadReplyError, match=reason):
        judge(make())


@pytest.mark.parametrize("key", FORBIDDEN_KWARGS)
def test_arguments_that_open_files_are_refused_before_timm_sees_them(key, monkeypatch):
    content = with_kwargs(**{key: FORBIDDEN_KWARGS[key]})
    monkeypatch.setattr("timm.create_model", lambda *_, **__: pytest.fail("timm was called"))
    with pytest.raises(BadReplyError, match=f"argument '{key}' is not allowed"):
        judge(content)


def test_nothing_is_built_in_memory_before_the_shapes_agree(monkeypatch):
    devices = []
    monkeypatch.setattr(
        "smi_fed.strategies.admission.build_model",
        lambda spec: devices.append(torch.get_default_device().type) or build_model(spec),
    )
    with pytest.raises(BadReplyError):
        judge(with_array(HEAD, np.zeros(6, np.float32)))
    assert devices == ["meta"]


def saved(array):
    buffer = BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def zipped(**arrays):
    buffer = BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def headed(header):
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + bytes(20)


ABOUT = "{{'descr': {}, 'fortran_order': False, 'shape': {}, }}"
PAYLOADS = {
    "more than it says": saved(np.zeros(100_000, np.float32)),
    "less than it says": saved(np.zeros(4, np.float32)),
    "more bytes": saved(np.zeros(5, np.float32)) + bytes(1),
    "fewer bytes": saved(np.zeros(5, np.float32))[:-1],
    "nothing": b"",
    "pickled objects": saved(np.array([{"a": 1}], dtype=object)),
    "a zip of arrays": zipped(a=np.zeros(5, np.float32)),
    "the start of a zip": b"PK\x03\x04abc",
    "petabytes": headed(ABOUT.format("'<f4'", "(1000000000000000,)")),
    "a number without end": headed(ABOUT.format("'<f4'", f"({'9' * 200},)")),
    "tuples in tuples": headed(ABOUT.format("(" * 190 + "'<f4'" + ",)" * 190, "(5,)")),
    "elements of no bytes": headed(ABOUT.format("'|V0'", "(9000000000000000000,)")),
    "half a literal": headed("{'descr': '<f4',\n  'x\n y"),
}
"""The last made numpy.load raise something else than a reader expects, ask for all memory or copy without end."""


@pytest.mark.parametrize("kind", PAYLOADS)
def test_a_payload_that_is_not_the_array_is_refused(kind):
    array = Array(dtype="float32", shape=(5,), stype="numpy.ndarray", data=PAYLOADS[kind])
    with pytest.raises(BadReplyError, match=f"^{HEAD} (cannot be decoded|carries)"):
        judge(with_array(HEAD, array))


@pytest.mark.parametrize("like", [torch.rand(3, 4), torch.rand(3, 4).T, torch.tensor(7), torch.tensor([True, False])])
def test_an_array_is_decoded_as_it_was_saved(like):
    assert torch.equal(decode("x", Array(like), like.to("meta")), like)


@pytest.mark.parametrize(
    ("where", "reason"),
    [("build_model", "cannot be built: KeyError: 'x'"), ("Classifier.forward", "does not run: KeyError: 'x'")],
)
def test_whatever_a_strangers_model_raises_is_that_replys_fault(where, reason, monkeypatch):
    def fails(*_):
        raise KeyError("x")

    content = good_reply()
    monkeypatch.setattr(f"smi_fed.strategies.admission.{where}", fails)
    with pytest.raises(BadReplyError, match=reason):
        judge(content)


def test_a_name_cannot_carry_markup_or_control_characters():
    assert judge(good_reply(name="[red]bad\x1b[0m\n name" + "x" * 100)).name == "redbad0m name" + "x" * 51
    assert judge(good_reply(name="\u202e\u3164 St Mary\u115f")).name == "St Mary"  # the others are not seen


def test_a_reason_is_one_printable_line():
    told = str(BadReplyError("no \x1b[2J\u202e\ud800\n" + "x" * 10_000 + " end"))
    assert told.isprintable()
    assert len(told) <= 1000
    assert told.startswith(r"no \x1b[2J\u202e\ud800\nxx")
    assert told.endswith("xx end")
    about = Metadata(0, "", 0, 0, "", "", 0.0, 0.0, MessageType.TRAIN)
    failure = records.failure_of(make_message(about, error=Error(2, "\x1b]0;owned\x07" * 1000)))
    assert failure.isprintable()
    assert len(failure) < 1100


@pytest.mark.parametrize("key", [records.ARRAYS, records.METRICS, records.MODEL])
def test_a_missing_record_is_named(key):
    content = good_reply()
    del content[key]
    with pytest.raises(BadReplyError, match=f"no record '{key}'"):
        records.read_reply(content)


def test_an_unknown_reply_schema_is_refused_naming_both():
    content = good_reply()
    content[records.MODEL][records.SCHEMA] = 2
    with pytest.raises(BadReplyError, match="version is 2, this server reads 1"):
        records.read_reply(content)


def test_records_of_the_wrong_kind_are_refused():
    content = RecordDict(
        {records.ARRAYS: MetricRecord(), records.METRICS: MetricRecord(), records.MODEL: ConfigRecord()}
    )
    with pytest.raises(BadReplyError, match="kinds"):
        records.read_reply(content)
    content = good_reply()
    content[records.METRICS] = MetricRecord({})
    with pytest.raises(BadReplyError, match="num-examples is None"):
        records.read_reply(content)
    assert isinstance(good_reply()[records.ARRAYS], ArrayRecord)


def test_claims_are_capped_against_the_round():
    teachers = [TrainedTeacher(str(n), None, n, (n // 2, n - n // 2)) for n in (100, 200, 1_000_000)]
    capped = cap_claims(teachers, AdmissionPolicy(max_claim_ratio=10))
    assert [t.num_examples for t in capped] == [100, 200, 2000]
    assert capped[2].label_counts == (500_000, 500_000)  # its proportions are its own
    assert [vars(t) for t in capped[:2]] == [vars(t) for t in teachers[:2]]
    two = cap_claims([replace(teachers[0]), teachers[2]], AdmissionPolicy(max_claim_ratio=10))
    assert [t.num_examples for t in two] == [100, 1000]
    assert cap_claims([], AdmissionPolicy()) == []
