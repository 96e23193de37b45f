"""Weights that both sides have do not travel; what the server puts back is what the client has, to the bit."""

import logging
from dataclasses import replace

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp.strategy import FedAvg
from safetensors.torch import save_file

from simulations.local_grid import InProcessGrid
from smi_fed.models import ModelSpec, build_model
from smi_fed.strategies import DataFreeDistillation, records
from smi_fed.strategies.admission import AdmissionPolicy, Expectation, admit
from smi_fed.strategies.left_out import sent_weights, start_weights
from smi_fed.strategies.records import BadReplyError
from smi_fed.tuning import trained_weights
from tests.models import masked_model, randomised, small_spec, small_vit
from tests.strategies.test_data_free import PIPELINE
from tests.strategies.test_records import assert_weights, over_the_wire

STUDENT = small_spec()
HEADS = {"vit": "backbone.head.", "resnet": "backbone.fc."}


def model_of(kind, seed=0):
    return small_vit(seed) if kind == "vit" else randomised(masked_model("resnet"), seed)


def starting(tmp_path, kind="vit"):
    """The spec of a model that starts from a file."""
    model, path = model_of(kind), tmp_path / f"{kind}.safetensors"
    if kind == "resnet":
        model.train()(torch.rand(4, 3, 32, 32))  # running statistics of their own
    save_file(model.backbone.state_dict(), path)
    return replace(model.spec, start=str(path))


def known_of(*specs):
    return start_weights(specs, small_vit())


def trained(spec, trainable):
    """A client's model, in which all that `trainable` names has changed."""
    model = build_model(spec)
    with torch.no_grad():
        for weight in trained_weights(model, trainable):
            weight.add_(0.01)
    return model.eval()


def reply(model, known=()):
    return records.pack_reply(model.spec, model.state_dict(), num_examples=10, train_loss=0.5, known=known)


def judge(content, known):
    expected = Expectation(STUDENT, channels=3, known=known)
    return admit(records.read_reply(over_the_wire(content)), AdmissionPolicy(), expected, torch.device("cpu"))


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_a_head_travels_alone_and_the_whole_comes_out(tmp_path, kind):
    spec = starting(tmp_path, kind)
    known, model = known_of(spec), trained(spec, "head")
    content = reply(model, frozenset(known))
    head = {key for key in model.state_dict() if key.startswith(HEADS[kind])}
    assert set(content[records.ARRAYS]) == head
    assert set(content["smi-fed.left-out"]) == model.state_dict().keys() - head
    assert_weights(judge(content, known).model.state_dict(), model.state_dict())


def test_what_was_trained_travels_and_what_another_start_has_does_not(tmp_path):
    """The client has other classes than the server's spec of the same start."""
    spec = starting(tmp_path)
    known, model = known_of(spec), trained(replace(spec, num_classes=7), "last:1")
    sent = set(reply(model, known)[records.ARRAYS])
    assert {key for key in sent if "blocks" in key} == {key for key in model.state_dict() if "blocks.1." in key}
    assert {"backbone.head.weight", "backbone.head.bias"} < sent
    assert not any(key.startswith(("backbone.patch_embed", "backbone.pos_embed")) for key in sent)
    same = build_model(spec)  # head and all
    assert not reply(same, known)[records.ARRAYS]
    assert_weights(judge(reply(same, known), known).model.state_dict(), same.state_dict())


def test_without_a_start_that_both_have_everything_travels_as_ever(tmp_path):
    spec = starting(tmp_path)
    whole = reply(small_vit(1))
    assert records.LEFT_OUT not in whole
    assert set(whole[records.ARRAYS]) == small_vit().state_dict().keys()
    random = reply(small_vit(1), known_of(spec))
    assert over_the_wire(random) == over_the_wire(whole)
    assert records.size_of(random) == records.size_of(whole)


def test_starts_that_are_not_here_are_not_offered(tmp_path, caplog):
    spec, student = starting(tmp_path), small_vit()
    draws = torch.get_rng_state()
    with caplog.at_level(logging.INFO, "smi_fed"):
        found = start_weights([STUDENT, replace(spec, start="/nowhere.pth"), spec], student)
    assert torch.equal(torch.get_rng_state(), draws)
    assert "travels whole, since what it starts from is not on this machine: start: got '/nowhere.pth'" in caplog.text
    assert found.keys() >= set(records.digests(build_model(spec).state_dict()).values())
    assert not known_of(STUDENT)


def test_the_student_is_not_built_again(tmp_path, monkeypatch):
    spec = starting(tmp_path)
    student = build_model(spec)
    monkeypatch.setattr("smi_fed.strategies.left_out.build_model", lambda _: pytest.fail("built"))
    assert start_weights([spec, spec], student)


def test_a_head_costs_kilobytes():
    """A ViT-S, whose weights are 86 MB."""
    model = build_model(ModelSpec("vit_small_patch16_224", 9, image_size=112))
    known = frozenset(records.digests(model.backbone.state_dict()).values())
    whole = sum(weight.nbytes for weight in model.state_dict().values())
    with torch.no_grad():
        for weight in model.backbone.head.parameters():
            weight.add_(1)
    assert whole > 80e6
    assert 4 * 384 * 9 < records.size_of(reply(model, known)) < 40_000


def test_what_a_question_offers_is_read():
    weights = small_vit().state_dict()
    question = RecordDict({"arrays": ArrayRecord(weights), "config": ConfigRecord({records.KNOWN: [b"a"]})})
    found = records.read_known(over_the_wire(question))
    assert found == {b"a", *records.digests(weights).values()}
    assert found == {b"a", *sent_weights([question, question])}
    question["config"] = ConfigRecord({"server-round": 1})
    assert records.read_known(over_the_wire(question)) == frozenset()


def test_a_student_that_was_sent_does_not_come_back(tmp_path):
    """FedAvg's mean of equal students differs from them in the last bits, so that after round 1 none has its start."""
    spec, sent, seen = starting(tmp_path), {}, {}

    def client(message, context):
        model, number = build_model(STUDENT), context.node_config["partition-id"]
        model.load_state_dict(next(iter(message.content.array_records.values())).to_torch_state_dict())
        with torch.no_grad():
            model.backbone.head.bias.add_(number)
        sent[message.content["config"]["server-round"], str(number)] = model.state_dict()
        known = records.read_known(message.content)
        content = records.pack_reply(
            model.spec, model.state_dict(), num_examples=1 + number, train_loss=0.5, name=str(number), known=known
        )
        assert set(content[records.ARRAYS]) <= {"backbone.head.weight", "backbone.head.bias"}
        return Message(content, reply_to=message)

    def keep(record):
        seen.update({(record.round, v.name): v.teacher.load().model.state_dict() for v in record.admitted})

    inner = FedAvg(fraction_evaluate=0.0, min_train_nodes=3, min_available_nodes=3)
    pipeline = replace(PIPELINE, distillation=replace(PIPELINE.distillation, trainable="head"))
    strategy = DataFreeDistillation(inner, student=spec, pipeline=pipeline, known_starts=[spec], on_round=keep)
    nodes = {number: {"partition-id": number} for number in range(3)}
    strategy.start(grid=InProcessGrid(client, nodes), initial_arrays=strategy.initial_arrays, num_rounds=2)
    assert seen.keys() == sent.keys()
    assert len(seen) == 6
    for key, weights in sent.items():
        assert_weights(seen[key], weights)


HEAD = "backbone.head.weight"
EMBEDDING = "backbone.patch_embed.proj.weight"


def swap(content, **digests):
    """The same reply with other digests of what is left out."""
    content[records.LEFT_OUT] = ConfigRecord({**content[records.LEFT_OUT], **digests})


MISSING = f"^{EMBEDDING} is left out, and the server has no such weights"


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (lambda c: swap(c, **{EMBEDDING: bytes(32)}), rf"{MISSING} \(sha256 0000000000000000\)"),
        (lambda c: swap(c, **{EMBEDDING: b""}), MISSING),
        (lambda c: swap(c, **{EMBEDDING: 3}), rf"{MISSING} \(int\)"),
        (lambda c: swap(c, **{EMBEDDING: [b"a"]}), rf"{MISSING} \(list\)"),
        (
            lambda c: swap(c, **{EMBEDDING: c[records.LEFT_OUT]["backbone.pos_embed"]}),
            rf"^{EMBEDDING} is float32 \(1, 17, 24\), expected float32 \(24, 3, 4, 4\)",
        ),
        (lambda c: swap(c, **{HEAD: c[records.LEFT_OUT][EMBEDDING]}), f"^{HEAD} is there, although it is said"),
        (lambda c: swap(c, made_up=c[records.LEFT_OUT][EMBEDDING]), r"unexpected \['made_up'\]"),
        (lambda c: c[records.LEFT_OUT].pop(EMBEDDING), rf"missing \['{EMBEDDING}'\]"),
        (lambda c: c[records.ARRAYS].pop(HEAD), rf"missing \['{HEAD}'\]"),
        (lambda c: c.update({records.LEFT_OUT: ArrayRecord()}), "'smi-fed.left-out' is not of digests"),
    ],
)
def test_what_cannot_be_put_back_is_refused_by_name(tmp_path, harm, says):
    spec = starting(tmp_path)
    known = known_of(spec)
    content = reply(trained(spec, "head"), known)
    harm(content)
    with pytest.raises(BadReplyError, match=says):
        judge(content, known)


def test_another_servers_starts_do_not_help(tmp_path):
    spec = starting(tmp_path)
    content = reply(trained(spec, "head"), known_of(spec))
    with pytest.raises(BadReplyError, match=r"cls_token is left out, and the server has no such"):
        judge(content, {})


def test_the_architecture_is_judged_before_anything_is_put_back_or_decoded(tmp_path, monkeypatch):
    """A reply of few bytes cannot ask for many: a start is put in its place, and never copied for a name."""
    spec = starting(tmp_path)
    known = known_of(spec)
    largest = max(known, key=lambda digest: len(known[digest].data))
    content = reply(trained(spec, "head"), known)
    content[records.LEFT_OUT] = ConfigRecord({f"backbone.{place}": largest for place in range(10_000)})
    monkeypatch.setattr("smi_fed.strategies.admission.decode", lambda *_: pytest.fail("decoded"))
    with pytest.raises(BadReplyError, match="weights do not fit the architecture"):
        judge(content, known)
    content[records.MODEL][records.SPEC] = content[records.MODEL][records.SPEC].replace("vit_tiny", "vit_giant")
    monkeypatch.setattr("smi_fed.strategies.admission.put_back", lambda *_: pytest.fail("put back"))
    with pytest.raises(BadReplyError, match="not on the allow-list"):
        judge(content, known)


def test_the_whole_is_checked(tmp_path):
    """A head that came is checked beside the start that did not; and a start that overflows with it is refused too."""
    spec = starting(tmp_path)
    known, model = known_of(spec), trained(spec, "head")
    with torch.no_grad():
        model.backbone.head.bias[0] = torch.nan
    with pytest.raises(BadReplyError, match=r"head\.bias is not finite"):
        judge(reply(model, known), known)
    with torch.no_grad():
        model.backbone.head.bias[0] = 0
        model.backbone.head.weight.fill_(3e38)
    with pytest.raises(BadReplyError, match="logits are not finite"):
        judge(reply(model, known), known)
