"""Any module from images to logits: `adapt`, `register_model`, and an error where neither was called."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from smi_fed.checks import SettingError
from smi_fed.distillation import DistillationConfig, distill
from smi_fed.inversion import InversionConfig, invert
from smi_fed.inversion.teacher import MaskedTeacher, TokenTeacher
from smi_fed.inversion.teacher import adapt as teacher_of
from smi_fed.models import Classifier, ModelSpec, adapt, build_model, build_seeded, logits_of, register_model
from smi_fed.registry import registered
from smi_fed.report import load_student, save_student
from tests.models import TINY, masked_model, small_vit, token_model
from tests.own_models import NAME, Answering, Output, OwnNet
from tests.same import assert_same

CONFIG = InversionConfig.paper(iterations=3, schedule="1:0.5", jitter=2)
TARGETS = torch.tensor([1, 4])
ANSWERS = {"object": Output, "mapping": dict}


def seeded():
    return torch.Generator().manual_seed(0)


class Nearest(nn.Module):
    """No weights at all: how near the mean of each channel is to each class."""

    def forward(self, images):
        return -(images.mean((1, 2, 3))[:, None] - torch.linspace(0, 1, 5)).square()


def test_logits_of_a_tensor_an_object_and_a_mapping():
    logits = torch.rand(2, 5)
    assert all(logits_of(each) is logits for each in (logits, Output(logits), {"logits": logits}))
    for output in ((logits,), None, {"scores": logits}, Output("logits"), {"logits": None}):
        with pytest.raises(ValueError, match=r"model: got an output of type \w+; allowed: a tensor of logits, or"):
            logits_of(output)


@pytest.mark.parametrize("model", [OwnNet(), Answering(OwnNet()), Nearest(), nn.DataParallel(OwnNet())])
def test_a_module_that_does_not_say_what_it_takes_is_told_how(model):
    with pytest.raises(SettingError, match=r"smi_fed\.models\.adapt\(module, image_size=\.\.\., num_classes=\.\.\.\)"):
        invert(model, TARGETS, CONFIG)


@pytest.mark.parametrize("answer", [None, *ANSWERS])
@pytest.mark.parametrize("size", [16, (16, 24)])
@pytest.mark.parametrize("channels", [1, 3])
def test_an_adapted_module_is_inverted(answer, size, channels):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        module = OwnNet(channels=channels).eval()
    module.head.weight.data.mul_(5)
    outer = module if answer is None else Answering(module, ANSWERS[answer])
    mean, std = (0.3, 0.4, 0.5)[:channels], (0.5, 0.6, 0.7)[:channels]
    model = adapt(outer, image_size=size, num_classes=5, channels=channels, mean=mean, std=std)
    height, width = (size, size) if isinstance(size, int) else size
    images = torch.rand(2, channels, height, width)
    by_hand = (images - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)
    assert torch.equal(model(images), module(by_hand))
    assert isinstance(teacher_of(model), MaskedTeacher)
    found = invert(model, TARGETS, CONFIG, generator=seeded())
    assert found.images.shape == (2, channels, height, width)
    assert len(found.kept[0]) == found.mask[0].numel() // 2
    longer = invert(model, TARGETS, InversionConfig.dense(iterations=30), generator=seeded())
    losses = [nn.functional.cross_entropy(model(pixels), TARGETS).item() for pixels in (images, longer.images)]
    assert losses[1] < losses[0] - 0.2


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_a_traced_module():
    plain = OwnNet().eval()
    traced = adapt(torch.jit.trace(plain, torch.rand(2, 3, 16, 16)), image_size=16, num_classes=5)
    found, expected = (
        invert(model, TARGETS, CONFIG, generator=seeded())
        for model in (traced, adapt(plain, image_size=16, num_classes=5))
    )
    assert torch.equal(found.mask, expected.mask)
    torch.testing.assert_close(found.images, expected.images)


def test_a_module_without_weights():
    model = adapt(Nearest(), image_size=16, num_classes=5)
    images = torch.rand(2, 3, 16, 16)
    assert torch.equal(model(images), Nearest()(images))
    found = invert(model, torch.tensor([4]), InversionConfig.dense(iterations=20), generator=seeded())
    assert int(model(found.images).argmax(1)) == 4


@pytest.mark.parametrize("how", ["timm", "classifier", "compiled", "parallel"])
def test_an_adapted_vit_keeps_its_tokens_and_its_normalisation(how):
    plain = token_model("clip")
    given = {"timm": plain.backbone, "classifier": plain, "compiled": torch.compile(plain.backbone),
             "parallel": nn.DataParallel(plain)}[how]  # fmt: skip
    model = adapt(given, image_size=16, num_classes=5)
    assert isinstance(teacher_of(model), TokenTeacher)
    images = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(model(images), plain(images))
    assert_same(invert(model, TARGETS, CONFIG, generator=seeded()), invert(plain, TARGETS, CONFIG, generator=seeded()))


def test_adapted_modules_teach_and_learn():
    teacher, student = (
        adapt(Answering(OwnNet()).double() if i else OwnNet(), image_size=16, num_classes=5) for i in (0, 1)
    )
    assert student.mean.dtype == torch.float64
    student.float()
    found = invert(teacher, TARGETS, CONFIG, generator=seeded())
    before = [weight.clone() for weight in student.backbone.parameters()]
    record = distill(student, [teacher], found, DistillationConfig(steps=3, batch_size=2))
    assert record.steps == 3
    assert any(not torch.equal(a, b) for a, b in zip(before, student.backbone.parameters(), strict=True))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"image_size": 0}, "image_size: got 0"), ({"image_size": (16, 0)}, "image_size: got"),
        ({"image_size": 16.0}, "image_size"), ({"image_size": "16"}, "image_size"),
        ({"num_classes": 0}, "num_classes: got 0"), ({"channels": 0}, "channels: got 0"),
        ({"mean": (0.5,)}, "mean: got .*3 values"), ({"std": (0.5, 0.5, 0.0)}, "std: got"),
    ],
)  # fmt: skip
def test_sizes_that_cannot_be_are_named(change, says):
    with pytest.raises(SettingError, match=says):
        adapt(OwnNet(), **{"image_size": 16, "num_classes": 5, **change})


def test_sizes_that_contradict_the_module():
    with pytest.raises(SettingError, match=r"image_size: got \(32, 32\), allowed: the module's own, \(16, 16\)"):
        adapt(small_vit(), image_size=32, num_classes=5)
    with pytest.raises(ValueError, match=r"model: got \(\d, 5\), allowed: one that answers with logits \(b, 7\)"):
        invert(adapt(OwnNet(), image_size=16, num_classes=7), TARGETS, CONFIG)
    with pytest.raises(ValueError, match="an output of type tuple"):
        invert(adapt(Answering(OwnNet(), lambda logits: (logits,)), image_size=16, num_classes=5), TARGETS, CONFIG)


@pytest.mark.parametrize("kwargs", [{}, {"width": 5, "pool": "max"}])
def test_a_registered_name_builds(kwargs):
    spec = ModelSpec(NAME, 7, kwargs=kwargs)
    model = build_seeded(ModelSpec.from_json(spec.to_json()), seed=3).eval()
    assert isinstance(model, Classifier)
    assert model.spec == spec
    assert model.image_size == (16, 16)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        plain = OwnNet(7, **kwargs).eval()
    images = torch.rand(2, 3, 16, 16)
    normalised = (images - torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)) / torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1)
    torch.testing.assert_close(model(images), plain(normalised))
    assert build_model(ModelSpec(NAME, 7, image_size=24)).image_size == (24, 24)
    with torch.device("meta"):
        assert all(tensor.is_meta for tensor in build_model(spec).state_dict().values())


def test_a_registered_model_loads_files_and_is_saved(tmp_path, caplog):
    theirs = build_seeded(ModelSpec(NAME, 5), seed=1).eval()
    images = torch.rand(2, 3, 16, 16)
    for content in (theirs.state_dict(), theirs.backbone.state_dict(), torch.compile(theirs).state_dict()):
        torch.save({"state_dict": content}, tmp_path / "theirs.pth")
        path = {"checkpoint_path": str(tmp_path / "theirs.pth")}
        assert torch.equal(build_model(ModelSpec(NAME, 5, kwargs=path)).eval()(images), theirs(images))
    assert not caplog.records
    build_model(ModelSpec(NAME, 4, kwargs=path))
    assert r"model.head.weight is (5, 8), expected (4, 8)" in caplog.text
    save_student(tmp_path / "student.safetensors", nn.DataParallel(theirs))
    assert torch.equal(load_student(tmp_path / "student.safetensors")(images), theirs(images))


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel, lambda model: model])
@pytest.mark.parametrize("inside", [True, False])
def test_a_wrapped_student_is_saved_as_itself(tmp_path, wrap, inside):
    student, path = small_vit(), tmp_path / "student.safetensors"
    images = torch.rand(2, 3, 16, 16)
    expected, keys = student(images), list(student.state_dict())
    if inside:
        student.backbone.blocks[0] = wrap(student.backbone.blocks[0])
        student.backbone = wrap(student.backbone)
    else:
        student = wrap(student)
    wrapped_keys = list(student.state_dict())
    save_student(path, student)
    assert list(student.state_dict()) == wrapped_keys
    loaded = load_student(path)
    assert list(loaded.state_dict()) == keys
    assert torch.equal(loaded(images), expected)


def test_a_student_that_could_not_be_built_again_is_not_saved(tmp_path):
    student = small_vit()
    student.backbone.head = nn.Sequential(student.backbone.head)
    for model, says in (
        (student, r"student: got \['backbone.head.0.bias'.*merge_and_unload"), (student.backbone, "build_model"),
        (adapt(OwnNet(), image_size=16, num_classes=5), "register_model"),
    ):  # fmt: skip
        with pytest.raises(SettingError, match=says):
            save_student(tmp_path / "student.safetensors", model)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def forgotten():
    yield
    from smi_fed import registry

    registry._REGISTERED.pop("tests-other", None)


@pytest.mark.usefixtures("forgotten")
@pytest.mark.parametrize(
    ("builder", "options", "says"),
    [
        (lambda num_classes: OwnNet(num_classes), {}, "image_size: got None"),
        (lambda num_classes: OwnNet(num_classes + 1), {"image_size": 16}, r"logits \(b, 5\); got \(1, 6\)"),
        (lambda num_classes: OwnNet(num_classes), {"image_size": 16, "channels": 1}, "name: got 'tests-other'"),
        (lambda num_classes: "a net", {"image_size": 16}, r"a builder of a torch\.nn\.Module"),
        (lambda classes: OwnNet(classes), {"image_size": 16}, "kwargs: got .*what the builder of tests-other takes"),
        (lambda num_classes: timm.create_model("vit_tiny_patch16_224", num_classes=num_classes, **TINY),
         {"image_size": 32}, r"image_size: got 32, allowed: the module's own, \(16, 16\)"),
    ],
)  # fmt: skip
def test_a_builder_that_does_not_keep_its_word(builder, options, says):
    register_model("tests-other", builder, **options)
    with pytest.raises(SettingError, match=says):
        build_model(ModelSpec("tests-other", 5))


@pytest.mark.usefixtures("forgotten")
def test_a_builder_that_asks_for_the_image_size_gets_it():
    def build(num_classes, image_size):
        sizes.append(image_size)
        return OwnNet(num_classes)

    sizes = []
    register_model("tests-other", build)
    assert build_model(ModelSpec("tests-other", 5, image_size=24)).image_size == (24, 24)
    assert sizes == [24]
    register_model("tests-other", lambda num_classes: masked_model("resnet").backbone, image_size=32)
    assert build_model(ModelSpec("tests-other", 5)).mean.shape == (3, 1, 1)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("vit_tiny_patch16_224", OwnNet), "not one of timm's"),
        (("", OwnNet), "name: got ''"),
        (("hf-hub:a", OwnNet), "name: got 'hf-hub:a'"),
        (("tests-other", "OwnNet"), "builder: got 'OwnNet'"),
    ],
)
def test_a_registration_that_cannot_be(arguments, says):
    with pytest.raises(SettingError, match=says):
        register_model(*arguments)
    for key, value in (("channels", 0), ("bounds", {"width": (3,)}), ("bounds", {"width": (8, 4)})):
        with pytest.raises(SettingError, match=key):
            register_model("tests-other", OwnNet, **{key: value})
    assert registered("tests-other") is None


OTHER_PROCESS = """
import sys, json, torch
import tests.own_models
from smi_fed.models import ModelSpec, build_seeded
print(json.dumps(build_seeded(ModelSpec.from_json(sys.argv[1]), 5).eval()(torch.ones(1, 3, 16, 16)).tolist()))
"""


def test_another_process_builds_the_same_by_its_name():
    spec = ModelSpec(NAME, 5, kwargs={"width": 6})
    done = subprocess.run(
        [sys.executable, "-c", OTHER_PROCESS, spec.to_json()], cwd=Path(__file__).parents[1], capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    here = build_seeded(spec, 5).eval()(torch.ones(1, 3, 16, 16))
    torch.testing.assert_close(torch.tensor(json.loads(done.stdout)), here)
