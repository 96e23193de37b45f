"""`invert` sees through what people put around a model, and leaves it as it was."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from smi_fed.inversion import InversionConfig, feature_statistics, invert
from smi_fed.inversion.teacher import MaskedTeacher, TokenTeacher, adapt
from smi_fed.tokens import attention_to_patches, forward_patches
from tests.models import masked_model, token_model
from tests.same import assert_same

CONFIG = InversionConfig.paper(iterations=4, schedule="1:0.3,3:0.4", jitter=2)
TARGETS = torch.tensor([0, 3])


class Inner(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *args, **kwargs):
        return self.model(*args, **kwargs)


class Adapted(nn.Module):
    """As PEFT does it: the model as `base_model.model`, attributes handed on."""

    def __init__(self, model):
        super().__init__()
        self.base_model = Inner(model)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.base_model.model, name)

    def forward(self, *args, **kwargs):
        return self.base_model(*args, **kwargs)


class LowRank(nn.Module):
    """As PEFT does it: a layer with a low rank beside it."""

    def __init__(self, layer, rank=2):
        super().__init__()
        self.base_layer = layer
        self.lora_A, self.lora_B = (
            nn.Linear(a, b, bias=False) for a, b in ((layer.in_features, rank), (rank, layer.out_features))
        )

    def forward(self, x):
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


def compiled(module):
    return torch.compile(module, backend="eager")


def with_blocks(wrap):
    def change(model):
        blocks = model.backbone.blocks
        for i in range(len(blocks)):
            blocks[i] = wrap(blocks[i])
        return model

    return change


def with_part(name, wrap=compiled):
    def change(model):
        owner, _, last = f"backbone.{name}".rpartition(".")
        setattr(model.get_submodule(owner), last, wrap(model.get_submodule(f"backbone.{name}")))
        return model

    return change


def in_place(*names):
    def change(model):
        for name in names:
            model.get_submodule(name).compile(backend="eager")
        return model

    return change


def with_backbone(wrap):
    def change(model):
        model.backbone = wrap(model.backbone)
        return model

    return change


ANY = {
    "compiled": compiled,
    "compiled backbone": with_backbone(compiled),
    "compiled in place": in_place(""),
    "compiled backbone in place": in_place("backbone"),
    "plain compiled": lambda model: compiled(model.backbone),
    "data parallel": nn.DataParallel,
    "data parallel, compiled": lambda model: compiled(nn.DataParallel(model)),
    "data parallel backbone": with_backbone(nn.DataParallel),
    "averaged": AveragedModel,
    "adapter": Adapted,
    "adapter around the backbone": with_backbone(Adapted),
    "adapter around timm's": lambda model: Adapted(model.backbone),
}
TOKENS = ANY | {
    "compiled blocks": with_blocks(compiled),
    "compiled last block": with_part("blocks.1"),
    "compiled attention": with_part("blocks.1.attn"),
    "compiled embedding": with_part("patch_embed"),
    "blocks in place": in_place("backbone.blocks.0", "backbone.blocks.1"),
    "attention in place": in_place("backbone.blocks.1.attn"),
    "parallel blocks": with_blocks(nn.DataParallel),
}
CASES = [("plain", name) for name in TOKENS] + [("swin", name) for name in ANY] + [
    ("eva", "compiled blocks"), ("attention pooled", "compiled"), ("rotary", "blocks in place"),
]  # fmt: skip


def seeded():
    return torch.Generator().manual_seed(0)


def model_of(kind):
    return masked_model(kind) if kind == "swin" else token_model(kind)


def traces(model):
    """Everything that could be left on a model."""
    found = {}
    for name, module in model.named_modules(remove_duplicate=False):
        own = {key: value for key, value in vars(module).items() if key not in ("_parameters", "_buffers")}
        copies = {key: dict(value) for key, value in own.items() if isinstance(value, dict)}
        found[name] = (module, own | copies)
    flags = [(name, weight, weight.requires_grad, weight.grad) for name, weight in model.named_parameters()]
    return found, flags


def assert_as_before(model, before):
    now, flags = traces(model)
    assert now.keys() == before[0].keys()
    for name, (module, own) in now.items():
        assert module is before[0][name][0]
        assert own.keys() == before[0][name][1].keys(), name
        for key, value in own.items():
            then = before[0][name][1][key]
            assert value is then or value == then, (name, key)
    assert len(flags) == len(before[1])
    assert all(a[:1] == b[:1] and a[1] is b[1] and a[2:] == b[2:] for a, b in zip(flags, before[1], strict=True))


@pytest.mark.parametrize(("kind", "how"), CASES)
def test_a_wrapped_model_gives_the_images_of_the_plain_one(kind, how):
    plain = model_of(kind)
    wrapped = TOKENS[how](copy.deepcopy(plain)).train()
    next(wrapped.parameters()).requires_grad_(False)
    before = traces(wrapped)
    found = invert(wrapped, TARGETS, CONFIG, generator=seeded())
    assert_as_before(wrapped, before)
    teacher = adapt(wrapped)
    assert type(teacher) is (MaskedTeacher if kind == "swin" else TokenTeacher)
    assert_same(found, invert(plain, TARGETS, CONFIG, generator=seeded()))


@pytest.mark.parametrize("how", TOKENS)
def test_statistics_of_a_wrapped_model_are_the_plain_ones(how):
    plain = token_model("plain")
    wrapped, images = TOKENS[how](copy.deepcopy(plain)), [torch.rand(4, 3, 16, 16, generator=seeded())]
    before = traces(wrapped)
    found, expected = feature_statistics(wrapped, images), feature_statistics(plain, images)
    assert_as_before(wrapped, before)
    for own, other in zip((*found.mean, *found.std), (*expected.mean, *expected.std), strict=True):
        assert torch.equal(own, other)


@pytest.mark.parametrize("outer", [Adapted, lambda model: model])
def test_layers_with_a_low_rank_beside_them_take_part(outer):
    model, merged = token_model("plain"), token_model("plain")
    for block, other in zip(model.backbone.blocks, merged.backbone.blocks, strict=True):
        block.attn.qkv = layer = LowRank(block.attn.qkv)
        with torch.no_grad():
            other.attn.qkv.weight += layer.lora_B.weight @ layer.lora_A.weight
    found = invert(outer(model).double(), TARGETS, CONFIG, generator=seeded())
    expected = invert(merged.double(), TARGETS, CONFIG, generator=seeded())
    assert torch.equal(found.mask, expected.mask)
    torch.testing.assert_close(found.images, expected.images, atol=1e-5, rtol=0)


class Unknown(nn.Module):
    """It may do anything with its module."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.module, name)

    def forward(self, images):
        return self.module(1 - images)


@pytest.mark.parametrize("model", [token_model("plain"), token_model("plain").backbone, masked_model("swin")])
def test_an_unknown_wrapper_is_refused_with_the_remedy(model):
    for call in (lambda m: invert(m, TARGETS, CONFIG), lambda m: feature_statistics(m, [torch.rand(1, 3, 16, 16)])):
        with pytest.raises(ValueError, match=r"model: got 'Unknown'.*models\.adapt\(.*\.module.*merge_and_unload\(\)"):
            call(Unknown(model))


def test_attention_that_cannot_be_heard_is_refused_with_the_remedy():
    model = in_place("backbone.blocks.1")(token_model("plain"))
    patches, positions = torch.randn(1, 16, 3, 4, 4), torch.arange(16)[None]
    with torch.no_grad():
        forward_patches(model.backbone, patches, positions)  # from here on the code is compiled, without hooks
    with pytest.raises(ValueError, match=r"model: got .*torch\.compile"):
        attention_to_patches(model.backbone, patches, positions)


class StopHereError(Exception):
    pass


@pytest.mark.parametrize("how", ["compiled blocks", "data parallel, compiled", "blocks in place"])
def test_a_wrapped_model_is_as_before_after_an_exception(how):
    model, calls = TOKENS[how](token_model("plain")), 0
    before = traces(model)

    def fail(_progress):
        nonlocal calls
        calls += 1
        if calls == 2:
            raise StopHereError

    with pytest.raises(StopHereError):
        invert(model, TARGETS, CONFIG, progress=fail)
    assert_as_before(model, before)
