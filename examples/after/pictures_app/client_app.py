"""The ClientApp: fine-tune and evaluate on the client's own images."""

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from smi_fed.strategies.records import pack_reply

from pictures_app.task import fit, load_part, make_model, test

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Fine-tune on this client's images."""
    number, config, images = context.node_config["partition-id"], context.run_config, load_part(context)
    torch.manual_seed(number)
    model = make_model((config["model"], "deit_tiny_distilled_patch16_224")[number % 2], config, images.classes)
    loss = fit(model, images, config["local-steps"])
    content = pack_reply(model.spec, model.state_dict(), name=str(number), num_examples=len(images), train_loss=loss)
    return Message(content, reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Evaluate the global model on this client's images."""
    config, images = context.run_config, load_part(context)
    model = make_model(config["model"], config, images.classes)
    arrays: ArrayRecord = message.content["arrays"]
    model.load_state_dict(arrays.to_torch_state_dict())
    loss, accuracy = test(model, images)
    metrics = MetricRecord({"num-examples": len(images), "loss": loss, "accuracy": accuracy})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)
