"""The ClientApp: train one's own Vision Transformer, send it, learn from the student."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from clients.evaluation import measure
from clients.node import Node, NodeConfig, node_images, node_of, telling
from clients.rounds import OwnModels, TrainRequest, loss_of, statistics_of_start, statistics_of_student
from smi_fed.checks import require
from smi_fed.config import Settings, load_settings
from smi_fed.data import ImageSet
from smi_fed.devices import choose_device, own_threads
from smi_fed.inversion import FeatureStatistics, feature_statistics
from smi_fed.models import Classifier, ModelSpec, architecture_of, build_model, build_seeded
from smi_fed.pipeline import seeded
from smi_fed.progress import Bar, show_log
from smi_fed.starts import naming_start, start_of_client
from smi_fed.strategies.evaluation_records import pack_evaluation
from smi_fed.strategies.finishing import ACTION, pack_answer
from smi_fed.strategies.records import clean_name, pack_reply, read_known
from smi_fed.tokens import is_token_model
from smi_fed.training import train

log = logging.getLogger("smi_fed")
CONF = Path(__file__).resolve().parent.parent / "conf"
LOG_INTERVAL = 10.0
"""Seconds between two lines of training in a node's log."""

app = ClientApp()


@app.train()
def train_and_reply(message: Message, context: Context) -> Message:
    """Train on the node's own images and reply with weights, spec and what settings allow to tell."""
    settings, node = _begin(context)
    with telling(node.name):
        arch = settings.model.name_of_client(node.number, node.arch)
        with naming_start(f"model.clients.{arch}"):
            return _reply(settings, node, settings.model.clients[arch], message, context)


@app.evaluate()
def evaluate_and_reply(message: Message, context: Context) -> Message:
    """Measure the student, and the node's own newest model, on the images that the node holds out."""
    settings, node = _begin(context)
    with telling(node.name):
        request, own = TrainRequest(message, settings.model.student), OwnModels(context, node.number)
        measured = measure(settings, node, request, own, client_device(settings)[0])
        return Message(pack_evaluation(measured), reply_to=message)


@app.query(ACTION)
def show_to_student(message: Message, context: Context) -> Message:
    """Class statistics of what the finished student sees in the node's images, where the run ends with that.

    Raises:
        SettingError: the run's settings do not say so.
    """
    settings, node = _begin(context)
    with telling(node.name):
        finish = settings.strategy.finish
        require(finish == "statistics", "strategy.finish", finish, "statistics, for a server that asks for them")
        images, _, spec = node_images(settings, node, settings.model.of_client(node.number, node.arch))
        request, device = TrainRequest(message, settings.model.student), client_device(settings)[0]
        known = statistics_of_student(settings, request, spec, images, device)
        return Message(pack_answer(node.name, known), reply_to=message)


def _begin(context: Context) -> tuple[Settings, Node]:
    """The run's settings and this node; what cannot be is told with the node's name."""
    if not log.hasHandlers():  # a process of Flower's own, whose output is the node's log
        show_log()
    torch.set_num_threads(own_threads())  # of a simulation's actor: its cores, which Ray says
    with telling(clean_name(str(context.node_config.get("name", "")))):
        settings = settings_of(str(context.run_config.get("overrides", "")))
        return settings, node_of(settings, NodeConfig.of(context.node_config), context.node_id)


def _reply(settings: Settings, node: Node, spec: ModelSpec, message: Message, context: Context) -> Message:
    images, _, spec = node_images(settings, node, spec)
    data = images.loaded() if settings.clients_train else images
    settings = replace(settings, data=node.data)
    request = TrainRequest(message, settings.model.student)
    if settings.clients_train:
        own = OwnModels(context, node.number)
        model, loss = train_round(settings, node.number, spec, data, request, own, node.called)
        log.info("%s, round %d: trained %s on %d images, loss %.3f",
                 node.called, request.round, spec.name, len(data), loss)  # fmt: skip
    else:  # random weights of its architecture, so that no start of its own travels for nothing
        model, loss = build_seeded(architecture_of(spec), settings.seed), 0.0
        log.info("%s: not trained, since its class statistics are all that is needed", node.called)
    starts = start_of_client(spec, settings.model.student) != "random"
    content = pack_reply(
        spec,
        model.state_dict(),
        name=node.name,
        num_examples=len(data),
        train_loss=loss,
        label_counts=data.label_counts().tolist() if settings.client.send_label_counts else None,
        statistics=own_statistics(settings, model, data),
        class_statistics=statistics_of_start(settings, request, spec, images, client_device(settings)[0]),
        known=read_known(message.content) if starts else (),
    )
    return Message(content, reply_to=message)


@lru_cache(maxsize=8)
def settings_of(overrides: str) -> Settings:
    """The settings of a run, composed once: every message asks for them, and Hydra takes a quarter of a second."""
    return load_settings(CONF, overrides)


def train_round(
    settings: Settings,
    number: int,
    spec: ModelSpec,
    data: ImageSet,
    request: TrainRequest,
    own: OwnModels,
    called: str = "this node",
) -> tuple[Classifier, float]:
    """The client's model after this round, and its loss.

    A client of the student's architecture goes on from the student; another from its own
    newest model, if it has one: that of the last round in which it was asked. In the first
    round a pretrained client keeps its start, unless the student has one too.

    Args:
        called: the client's name in the log.

    Raises:
        SettingError: a device that is not there, a start that cannot be loaded, or more layers
            to train than the model has.
    """
    device, reason = client_device(settings)
    torch.manual_seed(settings.seed * 1000 + number)
    model = build_model(spec)
    question = request.digest(settings.seed, number, spec, settings.data, settings.client, len(data))
    known = own.answer(request.round, question, model)
    if known is not None:
        model.load_state_dict(known[0])
        return model.eval(), known[1]
    before = request.weights if request.leads(model) else own.newest_before(request.round, model)
    if before is not None:
        model.load_state_dict(before)
    model.to(device)
    training = settings.client.training
    log.info("%s, round %d: training on %d images: %s; device: %s (%s)",
             called, request.round, len(data), training.summary, device, reason)  # fmt: skip
    generator = seeded(settings.seed, number, *([request.round] if request.round > 1 else []))
    minimised = loss_of(settings, model, request)
    with Bar(f"{called}: training", training.over(len(data)).steps, "step", LOG_INTERVAL) as bar:

        def tell(step: int, now: torch.Tensor) -> None:
            bar.at(step, loss=now)

        loss = train(model, data, training, generator=generator, loss=minimised, progress=tell)
    own.save(request.round, question, model, loss)
    return model, loss


def client_device(settings: Settings) -> tuple[torch.device, str]:
    """Where this client computes, and why; raises as `choose_device`."""
    return choose_device(settings.client.device, "client.device")


def own_images(settings: Settings, number: int, partitions: int, spec: ModelSpec) -> ImageSet:
    """The training images of client `number` of so many that share the run's data, see `node_images`."""
    node = node_of(settings, NodeConfig(partition_id=number, num_partitions=partitions))
    return node_images(settings, node, spec)[0].loaded()


def own_statistics(settings: Settings, model: Classifier, data: ImageSet) -> FeatureStatistics | None:
    """Feature statistics if the run uses them, the model has tokens and there are enough examples.

    Without distillation nobody needs them, and a strategy that runs by itself wants one record of arrays in a reply.
    """
    compared = settings.distills and settings.inversion.statistics > 0
    if not compared or not is_token_model(model.backbone) or len(data) < settings.client.minimum_examples:
        return None
    return feature_statistics(model, data.images.split(256))
