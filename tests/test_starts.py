"""What a spec starts from, and that nothing of it leaves the process."""

import json
import logging

import pytest
import torch
from safetensors.torch import save_file

from smi_fed.checks import SettingError
from smi_fed.models import ModelSpec, adapt, architecture_of, build_model, build_seeded, register_model
from smi_fed.policy import AdmissionPolicy
from smi_fed.report import load_student, save_student
from smi_fed.strategies import records
from smi_fed.strategies.admission import admit
from smi_fed.strategies.allow_list import Expectation, check_spec
from smi_fed.strategies.records import BadReplyError
from tests.models import TINY, small_spec, small_vit

DEIT = "deit_tiny_patch16_224"
IMAGES = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def theirs(tmp_path):
    """A tiny pretrained ViT, and the file of it."""
    model = small_vit(seed=1)
    save_file(model.backbone.state_dict(), tmp_path / "theirs.safetensors")
    return model, tmp_path / "theirs.safetensors"


def starting(path, classes=5, **kwargs):
    return ModelSpec("vit_tiny_patch16_224", classes, kwargs={**TINY, **kwargs}, start=path)


@pytest.mark.parametrize("written", ["safetensors", "torch"])
def test_a_model_starts_from_a_file(theirs, tmp_path, written):
    model, path = theirs
    if written == "torch":
        path = tmp_path / "theirs.pth"
        torch.save({"state_dict": model.state_dict()}, path)
    assert torch.equal(build_model(starting(path)).eval()(IMAGES), model(IMAGES))
    assert torch.equal(build_seeded(starting(str(path)), 3)(IMAGES), model(IMAGES))


def test_a_head_of_other_classes_is_fresh_and_the_log_says_so(theirs, caplog):
    model, path = theirs
    with caplog.at_level(logging.WARNING, "smi_fed"):
        found = build_model(starting(path, classes=7))
    for name, value in model.backbone.state_dict().items():
        assert name.startswith("head") or torch.equal(found.backbone.state_dict()[name], value)
    assert "head.weight is (5, 24), expected (7, 24)" in caplog.text


def test_positions_are_resampled_to_the_specs_size(theirs, caplog):
    model, path = theirs
    with caplog.at_level(logging.INFO, "smi_fed"):
        found = build_model(starting(path, img_size=32))
    assert found.backbone.pos_embed.shape == (1, 65, 24)
    assert torch.equal(found.backbone.pos_embed[:, :1], model.backbone.pos_embed[:, :1])
    assert "pos_embed: resampled from (1, 17, 24) to (1, 65, 24)" in caplog.text


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"depth": 3}, r"blocks\.2\.norm1\.weight is missing"),
        ({"depth": 1}, r"blocks\.1\.mlp\.fc1\.weight has no place"),
        ({"embed_dim": 36}, r"cls_token is \(1, 1, 24\), expected \(1, 1, 36\)"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_by_its_keys(theirs, kwargs, says):
    with pytest.raises(SettingError, match=f"^start: got .*theirs.*{says}"):
        build_model(starting(theirs[1], **kwargs))


@pytest.mark.parametrize("start", ["/nowhere/theirs.pth", "pretraned"])
def test_a_file_that_is_not_there_is_refused(start):
    with pytest.raises(SettingError, match=f"^start: got '{start}', allowed: pretrained, or a file"):
        build_model(starting(start))


def test_a_file_that_is_none_is_refused(tmp_path):
    (tmp_path / "broken.safetensors").write_bytes(b"no tensors")
    with pytest.raises(SettingError, match=r"^start: got .*broken\.safetensors.*a whole file of tensors"):
        build_model(starting(tmp_path / "broken.safetensors"))


def test_pretrained_is_timms_own_from_the_hub(theirs, monkeypatch, caplog):
    """The real way through timm; only what the hub would send is put in its place."""
    model, asked = theirs[0], []
    known = model.backbone.state_dict() | {"head.weight": torch.ones(1000, 24), "head.bias": torch.ones(1000)}
    monkeypatch.setattr(
        "timm.models._builder.load_state_dict_from_hf", lambda name, *_, **__: asked.append(name) or dict(known)
    )
    found = build_model(ModelSpec(DEIT, 5, kwargs=TINY, start="pretrained")).eval()
    normalised = (IMAGES - found.mean) / found.std
    assert torch.equal(found.backbone.forward_features(normalised), model.backbone.forward_features(normalised))
    assert asked == [f"timm/{DEIT}.fb_in1k"]
    assert "left at their random start, since it has no head that fits: head.weight, head.bias" in caplog.text


def test_without_the_hub_the_error_says_what_else_can_be_done(monkeypatch):
    def unreachable(*_, **__):
        raise OSError("no connection")

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", unreachable)
    with pytest.raises(SettingError, match=r"^start: got 'timm/deit.*a file that `start` names \(no connection\)"):
        build_model(ModelSpec(DEIT, 5, kwargs=TINY, start="pretrained"))


def test_a_model_of_ones_own_starts_from_a_file_alone(tmp_path):
    register_model("tests-start", lambda num_classes: torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(192, num_classes)), image_size=8)  # fmt: skip
    model = build_model(ModelSpec("tests-start", 4))
    torch.save(model.state_dict(), tmp_path / "own.pth")
    again = build_model(ModelSpec("tests-start", 4, start=tmp_path / "own.pth"))
    assert torch.equal(again(IMAGES[..., :8, :8]), model(IMAGES[..., :8, :8]))
    with pytest.raises(SettingError, match="^start: got 'pretrained', allowed: null, or a file"):
        build_model(ModelSpec("tests-start", 4, start="pretrained"))


STARTS = {
    "a file": lambda path: starting(path),
    "a file among the arguments": lambda path: small_spec(checkpoint_path=str(path)),
    "the hub": lambda _: ModelSpec(DEIT, 5, kwargs=TINY, start="pretrained"),
    "the hub among the arguments": lambda path: small_spec(pretrained=True, cache_dir=str(path)),
    "a configuration": lambda path: small_spec(pretrained=True, pretrained_cfg_overlay={"file": str(path)}),
    "a tag": lambda _: ModelSpec(f"{DEIT}.fb_in1k", 5, kwargs=TINY, start="pretrained"),
}


@pytest.mark.parametrize("how", STARTS)
def test_a_reply_names_the_architecture_alone_and_is_admitted(theirs, how, monkeypatch):
    """Whatever the client started from."""
    model, path = theirs
    known = dict(model.backbone.state_dict())
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *_, **__: dict(known))
    spec = STARTS[how](path)
    content = records.pack_reply(spec, model.state_dict(), num_examples=10, train_loss=0.5)
    _, _, metrics = records.pack_fit(spec, model.state_dict(), name="a", num_examples=10, train_loss=0.5)
    for text in (content[records.MODEL][records.SPEC], metrics[records.SPEC_METRIC]):
        assert not any(word in text for word in (str(path), "pretrained", "start", "fb_in1k", "cache"))
    policy, expected = AdmissionPolicy(), Expectation(small_spec(), 3)
    admitted = admit(records.read_reply(content), policy, expected, torch.device("cpu")).model
    with torch.device("meta"):
        known = build_model(architecture_of(spec))
    torch.testing.assert_close(admitted.backbone(IMAGES), model.backbone(IMAGES))
    assert admitted.spec == architecture_of(spec)
    assert known.image_size == admitted.image_size


@pytest.mark.parametrize("tag", ["augreg_in21k", "augreg_in21k_ft_in1k"])
def test_a_tag_becomes_what_it_says(tag):
    name = "vit_small_patch16_384" if tag.endswith("in1k") else "vit_small_patch16_224"
    tagged, plain = ModelSpec(f"{name}.{tag}", 5), architecture_of(ModelSpec(f"{name}.{tag}", 5))
    with torch.device("meta"):
        expected = build_model(tagged)
    assert (plain.name, plain.image_size) == (name, expected.image_size[0])
    assert plain.mean == plain.std == (0.5, 0.5, 0.5)


def test_a_configuration_becomes_what_it_says():
    found = architecture_of(small_spec(pretrained_cfg_overlay={"mean": (0.1, 0.2, 0.3)}))
    assert found == ModelSpec(found.name, 5, kwargs=TINY, mean=(0.1, 0.2, 0.3), std=(0.5, 0.5, 0.5))


def test_a_plain_spec_is_its_own_architecture():
    spec = small_spec()
    assert architecture_of(spec) == spec


def test_a_start_in_a_claim_is_refused():
    fields = {**json.loads(small_spec().to_json()), "start": "/etc/passwd"}
    with pytest.raises(BadReplyError, match=r"spec\.start: got '/etc/passwd', allowed: nothing"):
        check_spec(json.dumps(fields), AdmissionPolicy(), Expectation(small_spec(), 3))


def test_a_saved_student_needs_no_start_any_more(theirs, tmp_path):
    model, path = theirs
    save_student(tmp_path / "student.safetensors", build_model(starting(path)))
    path.unlink()
    assert torch.equal(load_student(tmp_path / "student.safetensors")(IMAGES), model(IMAGES))
    assert str(path).encode() not in (tmp_path / "student.safetensors").read_bytes()


def test_what_adapt_made_cannot_be_sent():
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(768, 5))
    found = adapt(module, image_size=16, num_classes=5)
    with pytest.raises(SettingError, match="name"):
        records.pack_reply(found.spec, found.state_dict(), num_examples=10, train_loss=0.5)
