"""The ClientApp: train and evaluate on the client's own digits."""

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from digits_app.task import fit, load_partition, make_model, test

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train on this client's partition."""
    number = context.node_config["partition-id"]
    images, labels = load_partition(number, context.node_config["num-partitions"])
    model = make_model(context.run_config["patch-size"])
    arrays: ArrayRecord = message.content["arrays"]
    model.load_state_dict(arrays.to_torch_state_dict())
    loss = fit(model, images, labels, context.run_config["local-steps"])
    metrics = MetricRecord({"num-examples": len(labels), "train_loss": loss})
    content = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics})
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
