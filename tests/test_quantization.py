"""Simulated integers: how many levels there are, what a layer computes, and that a file gives the same back."""

import pytest
import torch

from smi_fed.checks import SettingError
from smi_fed.files import FileFormatError
from smi_fed.model_inputs import Inputs
from smi_fed.models import Classifier
from smi_fed.quantization import Bits, load_quantized, quantize, save_quantized
from smi_fed.spec import ModelSpec
from tests.models import masked_model, small_vit


def shown(model, count=24):
    size = (count, len(model.mean), *model.image_size)
    return torch.rand(size, generator=torch.Generator().manual_seed(1))


def answers(model, images):
    with torch.no_grad():
        return model(images)


def error(model, bits):
    images = shown(model)
    own = answers(model, images)
    return float((answers(quantize(model, images, Bits.parse(bits)), images) - own).norm() / own.norm())


@pytest.fixture(scope="module")
def model():
    return small_vit().eval()


def test_fewer_bits_cost_more_and_eight_cost_little(model):
    errors = [error(model, bits) for bits in ("w8a8", "w4a8", "w2a8")]
    assert errors == sorted(errors)
    assert errors[0] < 0.05
    assert error(model, "w8a8") < error(model, "w8a4") < error(model, "w8a2")


def test_a_layers_weights_are_rounded_to_the_scale_of_each_channel():
    """One layer says what rounded weights say, but for its input's steps."""
    head = torch.nn.Linear(6, 4)
    plain = torch.nn.Sequential(torch.nn.Flatten(), head)
    spec = ModelSpec("own", 4, 1, mean=(0.0,) * 6, std=(1.0,) * 6)
    classifier = Classifier(spec, plain, Inputs(6, (1, 1), (0.0,) * 6, (1.0,) * 6)).eval()
    images = torch.rand(200, 6, 1, 1, generator=torch.Generator().manual_seed(0))
    images[0], images[1] = 0.0, 1.0  # the whole range
    found = answers(quantize(classifier, images, Bits(3, 8)), images)
    scale = head.weight.detach().abs().amax(1, keepdim=True) / 3
    rounded = (head.weight.detach() / scale).round().clamp(-3, 3) * scale
    expected = images.flatten(1) @ rounded.T + head.bias.detach()
    step = 1 / 255 / 2 * rounded.abs().sum(1)
    assert bool(((found - expected).abs() <= 1.5 * step + 1e-6).all())
    assert not torch.allclose(found, answers(classifier, images), atol=1e-2)


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_a_file_gives_the_same_model_back(tmp_path, kind):
    model = small_vit().eval() if kind == "vit" else masked_model("resnet").eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    images = shown(model)
    made = quantize(model, images, Bits(4, 8))
    save_quantized(tmp_path / "a.safetensors", made)
    again = load_quantized(tmp_path / "a.safetensors")
    assert torch.equal(answers(again, images), answers(made, images))
    assert answers(again, images[:1]).shape == (1, model.spec.num_classes)
    assert (again.spec, again.image_size) == (made.spec, model.image_size)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not model.training


def test_it_goes_to_another_device_as_a_whole_and_alone(model):
    """A constant that stayed behind would be refused, and a weight that both have would take the model's along."""
    made = quantize(model, shown(model), Bits(8, 8))
    assert {id(weight) for weight in made.parameters()}.isdisjoint(map(id, model.parameters()))
    made.to("meta")
    assert made(shown(model, 2).to("meta")).device.type == "meta"
    assert {each.device.type for each in (*made.parameters(), *made.buffers())} == {"meta"}


def test_what_cannot_be_is_refused(tmp_path, model):
    for text in ("w9a8", "w8", "8", "w8a8 "):
        with pytest.raises(SettingError, match="bits: got"):
            Bits.parse(text)
    for images in (shown(model, 1), shown(model)[:, :, :4]):
        with pytest.raises(SettingError, match="images: got"):
            quantize(model, images, Bits(8, 8))
    (tmp_path / "a.safetensors").write_bytes(b"no model")
    with pytest.raises(FileFormatError, match=r"a.safetensors: .*"):
        load_quantized(tmp_path / "a.safetensors")
    with pytest.raises(FileNotFoundError):
        load_quantized(tmp_path / "b.safetensors")
