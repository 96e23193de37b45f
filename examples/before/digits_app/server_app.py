"""The ServerApp: FedAdam, and a test of every round's global model."""

import json
from pathlib import Path

import torch
from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAdam

from digits_app.task import load_split, make_model, test

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the rounds and write down what each round's global model can do."""
    torch.manual_seed(0)
    model = make_model(context.run_config["patch-size"])
    _, images, _, labels = load_split()

    def evaluate(_: int, arrays: ArrayRecord) -> MetricRecord:
        model.load_state_dict(arrays.to_torch_state_dict())
        loss, accuracy = test(model, images, labels)
        return MetricRecord({"loss": loss, "accuracy": accuracy})

    strategy = FedAdam(eta=1.0, tau=0.1)
    result = strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(model.state_dict()),
        num_rounds=context.run_config["rounds"],
        evaluate_fn=evaluate,
    )
    history = {number: dict(metrics) for number, metrics in result.evaluate_metrics_serverapp.items()}
    print("test set, by round:", json.dumps(history))
    if context.run_config["output"]:
        Path(context.run_config["output"]).write_text(json.dumps(history), encoding="utf-8")
