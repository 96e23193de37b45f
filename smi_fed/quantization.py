"""Post-training quantization on synthetic images: integers are simulated, and nothing becomes faster.

A use of inverted images in the paper (Hu et al., ICML 2024): a model whose training data are
not there is calibrated on images that were inverted from it. Weights of linear layers and convolutions
have a scale for each output channel and are symmetric; what enters these layers has one static scale and
zero point, calibrated. Everything else stays in float: attention's products, normalisation, softmax and
residual additions, whose quantization to INT8 can bring accuracy to 0.

Needs the extra `quantize` (torchao).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from smi_fed.checks import require
from smi_fed.files import load_tensors, reading, save_tensors
from smi_fed.model_inputs import Inputs
from smi_fed.models import Classifier, ModelSpec, architecture_of, build_model
from smi_fed.progress import Bar

FORMAT, VERSION, BATCH = "smi-fed.quantized", 1, 32
SMALLEST = 2.0**-20
"""Least scale: that of an input that is always 0 would else be 0."""


@dataclass(frozen=True)
class Bits:
    """Widths of weights and of activations, as in `w4a8`."""

    weights: int
    activations: int

    @classmethod
    def parse(cls, text: str) -> Bits:
        """Read `w8a8`, `w4a8`, `w4a4` or another pair of 2 to 8.

        Raises:
            SettingError: another text.
        """
        found = re.fullmatch(r"w([2-8])a([2-8])", text)
        require(found is not None, "bits", text, "such as w8a8, w4a8 or w4a4, from 2 to 8")
        assert found is not None
        return cls(int(found[1]), int(found[2]))

    def __str__(self) -> str:
        return f"w{self.weights}a{self.activations}"


def quantize(model: Classifier, images: Tensor, bits: Bits) -> Classifier:
    """A copy of `model` that computes with simulated integers.

    The same images give the same integers on every device: calibration is on the CPU.

    Args:
        model: stays as it is.
        images: (b, c, h, w) in [0, 1] at the model's size, to calibrate on; at least 2.

    Returns:
        A classifier of images in [0, 1] on the device of `model`, which `save_quantized` writes.

    Raises:
        SettingError: no torchao, a module of `adapt`, which no file could name, fewer than two images, or images of
            another shape.
    """
    require(find_spec("torchao") is not None, "quantize", "no torchao", "pip install 'smi-fed[quantize]'")
    require(not model.spec.name.startswith("adapted:"), "model", model.spec.name, "a model that a file can name again")
    shape = (len(model.mean), *model.image_size)
    good = images.ndim == 4 and tuple(images.shape[1:]) == shape and len(images) >= 2
    require(good, "images", tuple(images.shape), f"(b, {', '.join(map(str, shape))}) with b >= 2")
    # An observer's search for its range reads thousands of single values, for each of which a GPU would be waited for.
    twin = deepcopy(model).cpu().eval()
    shown = twin.normalised(images.to(twin.mean))
    with torch.no_grad():
        prepared = _prepared(twin, bits)
        with Bar("calibration", len(images), unit="image") as bar:
            for done in range(0, len(images), BATCH):
                prepared(shown[done : done + BATCH])
                bar.at(min(done + BATCH, len(images)))
        return _converted(twin, prepared, bits).to(model.mean.device)


def _prepared(model: Classifier, bits: Bits) -> torch.fx.GraphModule:
    """The backbone as a graph of single operations, with observers where there will be integers."""
    from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e

    example = model.mean.new_zeros(2, len(model.mean), *model.image_size)
    graph = torch.export.export(model.backbone, (example,), dynamic_shapes=({0: Dim("images")},)).module()
    return prepare_pt2e(graph, _quantizer(bits))


def _converted(model: Classifier, prepared: torch.fx.GraphModule, bits: Bits) -> Classifier:
    """A classifier over the graph with integers in place of its observers, which are kept for a file."""
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

    observed = {key: value.clone() for key, value in prepared.state_dict().items()}
    normalisation = [tuple(each.flatten().tolist()) for each in (model.mean, model.std)]
    spec = replace(architecture_of(model.spec), mean=normalisation[0], std=normalisation[1])
    backbone = _Graph(convert_pt2e(prepared), observed, bits)
    inputs = Inputs(len(model.mean), model.image_size, *normalisation)
    return Classifier(spec, backbone, inputs).eval()


def _quantizer(bits: Bits) -> Any:
    """Which operations compute with which integers, in torchao's words."""
    from torchao.quantization.pt2e import HistogramObserver, PerChannelMinMaxObserver
    from torchao.quantization.pt2e.quantizer import QuantizationAnnotation, QuantizationSpec, Quantizer

    class Histogram(HistogramObserver):
        """Chooses its range for as many levels as there will be; torchao's own is for those of the dtype."""

        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            self.dst_nbins = 2**bits.activations

    most = 2 ** (bits.weights - 1) - 1
    weights = QuantizationSpec(
        dtype=torch.int8, quant_min=-most, quant_max=most, qscheme=torch.per_channel_symmetric, ch_axis=0,
        observer_or_fake_quant_ctr=PerChannelMinMaxObserver.with_args(eps=SMALLEST),
    )  # fmt: skip
    inputs = QuantizationSpec(
        dtype=torch.uint8, quant_min=0, quant_max=2**bits.activations - 1, qscheme=torch.per_tensor_affine,
        observer_or_fake_quant_ctr=Histogram.with_args(eps=SMALLEST),
    )  # fmt: skip
    quantized: set[Callable[..., Any]] = {torch.ops.aten.linear.default, torch.ops.aten.conv2d.default}

    class Layers(Quantizer):
        """Linear layers and convolutions."""

        def annotate(self, model: torch.fx.GraphModule) -> torch.fx.GraphModule:
            """Say of each layer what its inputs are."""
            for node in model.graph.nodes:
                if node.op == "call_function" and node.target in quantized:
                    known: dict[Any, Any] = {node.args[0]: inputs, node.args[1]: weights}
                    node.meta["quantization_annotation"] = QuantizationAnnotation(known, None, _annotated=True)
            return model

        def validate(self, model: torch.fx.GraphModule) -> None:
            """Nothing that could be wrong."""

    return Layers()


class _Graph(nn.Module):
    """A converted graph, which has no mode, and what its observers saw."""

    def __init__(self, graph: nn.Module, observed: dict[str, Tensor], bits: Bits) -> None:
        super().__init__()
        self.graph, self.observed, self.bits = graph, observed, bits

    def forward(self, images: Tensor) -> Tensor:
        return self.graph(images)

    def train(self, mode: bool = True) -> _Graph:
        self.training = mode
        return self


def save_quantized(path: str | os.PathLike[str], model: Classifier) -> None:
    """Write what `quantize` made as safetensors, atomically: float weights, and what was observed in calibrating."""
    assert isinstance(model.backbone, _Graph)
    about = {"spec": model.spec.to_json(), "bits": str(model.backbone.bits)}
    save_tensors(path, model.backbone.observed, FORMAT, VERSION, **about)


def load_quantized(path: str | os.PathLike[str]) -> Classifier:
    """What `save_quantized` wrote; the same integers come of the same observations.

    Raises:
        FileNotFoundError, FileFormatError: naming the file and what is wrong with it.
    """
    observed, about = load_tensors(path, FORMAT, VERSION)
    with reading(path), torch.no_grad():
        model, bits = build_model(architecture_of(ModelSpec.from_json(about["spec"]))).eval(), Bits.parse(about["bits"])
        prepared = _prepared(model, bits)
        prepared.load_state_dict(observed)
        return _converted(model, prepared, bits)
