"""The ClientApp: train one's own Vision Transformer, send it once."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from smi_fed.config import Settings, load_settings
from smi_fed.data import ImageSet, load_images, partition
from smi_fed.inversion import FeatureStatistics, feature_statistics
from smi_fed.models import Classifier, build_model
from smi_fed.pipeline import seeded
from smi_fed.strategies.records import pack_reply
from smi_fed.tokens import is_token_model
from smi_fed.training import train

log = logging.getLogger("smi_fed")
CONF = Path(__file__).resolve().parent.parent / "conf"

app = ClientApp()


class EmptyPartitionError(RuntimeError):
    """This client has no data to train on."""


@app.train()
def train_and_reply(message: Message, context: Context) -> Message:
    """Train on the node's own partition and reply with weights, spec and what settings allow to tell."""
    # Clients of a simulation share the machine, and two threads on a busy core are far slower than one.
    torch.set_num_threads(int(os.environ.get("SMI_FED_CLIENT_THREADS", "1")))
    settings = load_settings(CONF, str(context.run_config.get("overrides", "")))
    number = int(context.node_config.get("partition-id", 0))
    data = own_images(settings, number, int(context.node_config.get("num-partitions", 1)))
    arch = context.node_config.get("arch")
    spec = settings.model.of_client(number, None if arch is None else str(arch))
    torch.manual_seed(settings.seed * 1000 + number)
    model = build_model(spec)
    loss = train(model, data, settings.client.training, generator=seeded(settings.seed, number))
    log.info("client %d trained %s on %d images, loss %.3f", number, spec.name, len(data), loss)
    content = pack_reply(
        spec,
        model.state_dict(),
        name=f"client {number}",
        num_examples=len(data),
        train_loss=loss,
        label_counts=data.label_counts().tolist() if settings.client.send_label_counts else None,
        statistics=own_statistics(settings, model, data),
    )
    return Message(content, reply_to=message)


def own_images(settings: Settings, number: int, partitions: int) -> ImageSet:
    """The training images of partition `number`.

    Raises:
        EmptyPartitionError: there are none.
        SettingError: the partition does not exist.
    """
    images, _ = load_images(settings.data)
    parts = partition(images.labels, settings.data, partitions, settings.seed)
    if not 0 <= number < len(parts):
        raise EmptyPartitionError(f"partition-id: got {number}, allowed: 0 to {len(parts) - 1}")
    if not len(parts[number]):
        raise EmptyPartitionError(f"partition {number} of {len(parts)} is empty: this client has nothing to train on")
    return images.select(parts[number])


def own_statistics(settings: Settings, model: Classifier, data: ImageSet) -> FeatureStatistics | None:
    """Feature statistics if the run uses them, the model has tokens and there are enough examples."""
    wanted = settings.inversion.statistics > 0 and is_token_model(model.backbone)
    if not wanted or len(data) < settings.client.minimum_examples:
        return None
    return feature_statistics(model, data.images.split(256))
