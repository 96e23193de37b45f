"""The ClientApp: train and evaluate on the client's own digits."""

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from smi_fed.strategies.records import pack_reply

from digits_app.task import fit, load_partition, make_model, test

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train on this client's partition."""
    number = context.node_config["partition-id"]
    images, labels = load_partition(number, context.node_config["num-partitions"])
    model = make_model(patch_size=(16, 8)[number % 2])  # each client its own
    loss = fit(model, images, labels, context.run_config["local-steps"])
    content = pack_reply(model.spec, model.state_dict(), name=str(number), num_examples=len(labels), train_loss=loss)
    return Message(content, reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Evaluate the global model on this client's partition."""
    number = context.node_config["partition-id"]
    images, labels = load_partition(number, context.node_config["num-partitions"])
    model = make_model(context.run_config["patch-size"])
    arrays: ArrayRecord = message.content["arrays"]
    model.load_state_dict(arrays.to_torch_state_dict())
    loss, accuracy = test(model, images, labels)
    metrics = MetricRecord({"num-examples": len(labels), "loss": loss, "accuracy": accuracy})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)
