"""Doors of what a client sends in training: the whole way of a reply, and each of its readers by itself."""

import json
from functools import cache
from random import Random

import numpy as np
import torch
from flwr.app import Array, ConfigRecord, Error, Message, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

from simulations.local_grid import InProcessGrid
from smi_fed.models import ModelSpec
from smi_fed.strategies import admission, left_out, records
from smi_fed.strategies.allow_list import KWARG_BOUNDS, KWARG_CHOICES, check_spec
from smi_fed.strategies.watching_grid import WatchingGrid
from tests.fuzz import messages, mutations, payloads
from tests.fuzz.door import MEBIBYTE, Case, Door, require_printable
from tests.fuzz.server import EXPECTED, NODE, POLICY, SPEC, good, model, server

ALL_KEYS = (
    records.ARRAYS, records.METRICS, records.STATISTICS, records.CLASS_STATISTICS, records.MODEL, records.LEFT_OUT,
    records.SCHEMA, records.SPEC, records.NAME, records.NUM_EXAMPLES, records.LABEL_COUNTS, records.TRAIN_LOSS,
)  # fmt: skip
SPEC_KEYS = (
    "schema", "name", "num_classes", "image_size", "kwargs", "mean", "std", "class_names", "start", *KWARG_BOUNDS,
    *KWARG_CHOICES, "checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir",
)  # fmt: skip
NAMES = (
    "vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "swin_tiny_patch4_window7_224", "resnet10t",
    "eva02_tiny_patch14_224", "beitv2_base_patch16_224", "vit_giant_patch14_224", "hf-hub:someone/model",
    "local-dir:/tmp", "vit_tiny_patch16_224.augreg_in21k", "convnext_atto", "vit_small_patch16_dinov3",
)  # fmt: skip


def spec_text(rng: Random) -> str:
    """A spec with one to three changes."""
    found = json.loads(SPEC.to_json())
    for _ in range(rng.randrange(1, 4)):
        if not isinstance(found, dict) or rng.random() < 0.4:
            found = mutations.tree(rng, found, SPEC_KEYS)
        elif rng.random() < 0.2:
            found["name"] = rng.choice(NAMES)
        elif rng.random() < 0.5 and isinstance(found.get("kwargs"), dict):
            key = rng.choice((*KWARG_BOUNDS, *KWARG_CHOICES))
            ends = (*KWARG_BOUNDS[key], rng.randint(1, 16)) if key in KWARG_BOUNDS else KWARG_CHOICES[key]
            value = rng.choice(ends)
            found["kwargs"] = {**found["kwargs"], key: rng.choice((value, value, [value] * 4, [1, 1], str(value)))}
        else:
            found["class_names"] = [mutations.text(rng, surrogates=True)[:300] for _ in range(3)]
    return mutations.as_json(rng, found)


def own_change(rng: Random, content: RecordDict) -> bool:
    """Changes that a reply's records have beyond those of any message."""
    who, left = content.get(records.MODEL), content.get(records.LEFT_OUT, ConfigRecord())
    if isinstance(who, ConfigRecord) and rng.random() < 0.6:
        text = spec_text(rng)
        who[records.SPEC] = text.encode(errors="replace").decode()
        return True
    if not isinstance(left, ConfigRecord):
        return False
    key = rng.choice((*model().state_dict(), mutations.text(rng)))
    digests = list(records.digests(model().state_dict()).values())
    content[records.LEFT_OUT] = ConfigRecord({**left, key: rng.choice((*digests, rng.randbytes(32), b"", "x", [b"x"]))})
    return True


def hostile(rng: Random) -> RecordDict:
    return messages.content(rng, good(rng.randrange(5)), ALL_KEYS, own_change)


def size_of(content: RecordDict) -> int:
    """Bytes of a message, for the bound on memory."""
    return records.size_of(content)


def reply(rng: Random) -> Case:
    content, place = hostile(rng), server()
    return Case(size_of(content), lambda: place.judge(Message(content, reply_to=place.question)))


def error(rng: Random) -> Case:
    reason, code, place = mutations.text(rng), rng.choice((0, 1, 2, 3, 8, 200, -1)), server()
    return Case(len(reason), lambda: place.judge(Message(Error(code, reason), reply_to=place.question)))


class Arriving(InProcessGrid):
    """Makes of a reply's objects a message, as Flower's HttpGrid does."""

    objects: dict[str, bytes]
    head: str

    def push_messages(self, messages):
        return [message.metadata.message_id for message in messages]

    def pull_messages(self, message_ids):
        asked = list(message_ids)
        message = inflate_object_from_contents(self.head, dict(self.objects))
        return [message] if asked else []


def objects(rng: Random) -> Case:
    """A reply as it travels: pieces that Flower puts together, with bytes of one of them changed."""
    place = server()
    message = Message(good(rng.randrange(5)), reply_to=place.question)
    grid = Arriving(lambda *_: None, {NODE: {}})  # type: ignore[arg-type]
    grid.objects = {key: each.deflate() for key, each in get_all_nested_objects(message).items()}
    grid.head = message.object_id
    key = rng.choice(list(grid.objects))
    head, divider, body = grid.objects[key].partition(b"\x00")
    changed = mutations.scrambled(rng, body)
    if body.startswith(b"{") and rng.random() < 0.7:
        changed = mutations.as_json(rng, mutations.tree(rng, json.loads(body))).encode(errors="replace")
    if rng.random() < 0.1:
        head = mutations.scrambled(rng, head)
    grid.objects[key] = head + divider + changed

    def enter() -> None:
        (arrived,) = WatchingGrid(grid, interval=0.0).send_and_receive([place.question])
        place.judge(arrived)

    return Case(sum(map(len, grid.objects.values())), enter)


def reading(rng: Random) -> Case:
    content = hostile(rng)

    def enter() -> None:
        claim = records.read_reply(content)
        require_printable(claim.name, 64)
        assert np.isfinite([claim.train_loss, float(claim.num_examples), *claim.metrics.values()]).all()

    return Case(size_of(content), enter)


def spec(rng: Random) -> Case:
    text = spec_text(rng)

    def enter() -> None:
        found = check_spec(text, POLICY, EXPECTED)
        assert found.name in POLICY.architectures
        assert ModelSpec.from_json(found.to_json()) == found
        assert found.start is None

    return Case(len(text), enter)


def shape(rng: Random) -> Case:
    text = spec_text(rng)

    def enter() -> None:
        found = admission.check_model(text, POLICY, EXPECTED)
        assert all(tensor.is_meta for tensor in found.state_dict().values())
        assert max(found.image_size) <= admission.LARGEST_IMAGE

    return Case(len(text), enter)


@cache
def few_arrays():
    weights = {"a": torch.rand(2, 4), "b": torch.rand(8), "c": torch.tensor(7), "d": torch.tensor([True, False])}
    return weights, {key: Array(value) for key, value in weights.items()}


def arrays(rng: Random) -> Case:
    expected, sent = few_arrays()
    sent = dict(sent)
    for key in rng.sample(sorted(sent), rng.randrange(1, 4)):
        sent[key] = payloads.array(rng, sent[key])
    if rng.random() < 0.1:
        sent[rng.choice(("e", mutations.text(rng)))] = sent.pop("a")

    def enter() -> None:
        for key, tensor in admission.check_arrays(sent, expected).items():
            assert (tensor.shape, tensor.dtype) == (expected[key].shape, expected[key].dtype)
            assert bool(tensor.isfinite().all())

    return Case(sum(len(each.data) for each in sent.values()), enter)


def statistics(rng: Random) -> Case:
    content = messages.record(rng, good(2)[records.STATISTICS], ("mean.1", "std.0", "examples"))
    claim = records.Claim("", "", {}, content, 6, 0.0, None)

    def enter() -> None:
        found = admission.read_statistics(claim, model())
        assert all(bool(t.isfinite().all()) for t in (*found.mean, *found.std))
        assert found.examples >= 1

    return Case(content.count_bytes(), enter)


def sums(rng: Random) -> Case:
    content = messages.record(rng, good(3)[records.CLASS_STATISTICS], ("counts", "sums", "moments"))

    def enter() -> None:
        found = admission.read_class_statistics(content, 6, EXPECTED, range(3), (6, 6, 6))
        assert 0 <= float(found.counts.sum()) <= 6
        assert all(bool(tensor.isfinite().all()) for tensor in vars(found).values())

    return Case(content.count_bytes(), enter)


def left(rng: Random) -> Case:
    content = {records.LEFT_OUT: ConfigRecord({}), records.ARRAYS: good(0)[records.ARRAYS].copy()}
    for _ in range(rng.randrange(1, 4)):
        own_change(rng, content)  # type: ignore[arg-type]
    claim = records.Claim("", "", content[records.ARRAYS], {}, 6, 0.0, None, left_out=content[records.LEFT_OUT])
    if rng.random() < 0.5:
        claim.arrays.pop("backbone.cls_token")  # type: ignore[attr-defined]
    known = server().strategy.core.expectation.known

    def enter() -> None:
        found = left_out.put_back(claim, known)
        assert found.keys() == claim.arrays.keys() | claim.left_out.keys()

    return Case(32 * len(claim.left_out), enter)


DOORS = (
    Door("reply", "a whole reply to training, from arrival to the stored model", reply, 30, memory=64 * MEBIBYTE),
    Door("objects", "the pieces in which Flower carries a reply", objects, 30, memory=64 * MEBIBYTE),
    Door("error", "what a node says of its failure", error, 600),
    Door("records", "keys and kinds of a reply's records", reading, 1400),
    Door("spec", "the architecture's JSON", spec, 2600),
    Door("shape", "the architecture, built without memory", shape, 25, memory=64 * MEBIBYTE),
    Door("arrays", "names, shapes, dtypes and payloads of arrays", arrays, 1700),
    Door("statistics", "feature statistics", statistics, 500),
    Door("sums", "class statistics", sums, 700),
    Door("left out", "digests of weights that the server has", left, 300),
)
